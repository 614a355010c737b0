"""Whether an image opens, and holds what it should: qcowfs is asked, and QEMU too.

An image under test holds FILL in guest cluster 0. Where the two disagree a test says so (`qemu_opens`), with the reason
beside it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qcowfs import limits
from qcowfs.chain import Chain, open_chain
from qcowfs.cli import info
from qcowfs.errors import QcowfsError
from qcowfs.gate import Policy
from qcowfs.sizes import Sizes
from tests.support.qemu import qemu
from tests.support.tables import active_disk

__all__ = ["FILL", "LENGTH", "opens", "refuses"]

FILL = 0x11
LENGTH = 512  # bytes of the disk that are looked at
DATA = {0: FILL}  # what to forge


def opens(path: Path, image: bytes, *, image_format: str = "qcow2", qemu_opens: bool = True) -> None:
    """`image`, put at `path`, opens, holds its data and can be described; with QEMU too, but for `qemu_opens`."""
    path.write_bytes(image)
    with open_chain(str(path), Policy(), image_format=image_format) as chain:
        assert bytes([FILL]) * LENGTH == active_disk(chain).pread(0, LENGTH)
        assert describes(chain) == len(chain.layers)
    assert qemu_opens == _qemu_reads(path, image_format)


def refuses(
    path: Path,
    image: bytes,
    error: type[QcowfsError],
    *words: str,
    image_format: str = "qcow2",
    qemu_opens: bool = False,
) -> None:
    """`image`, put at `path`, ends in one line of `error` that says all of `words`; QEMU refuses it too."""
    path.write_bytes(image)
    with pytest.raises(error) as caught, open_chain(str(path), Policy(), image_format=image_format) as chain:
        active_disk(chain).pread(0, LENGTH)
        describes(chain)
    said = str(caught.value)

    assert caught.type is error
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    assert [word for word in words if word not in said] == [], said
    assert qemu_opens == _qemu_reads(path, image_format)


def describes(chain: Chain) -> int:
    """Return how many layers `info` can describe."""
    return len(info.document(chain, Sizes(chain, limits.MAX_LISTED_TABLES))["layers"])


def _qemu_reads(path: Path, image_format: str) -> bool:
    read = f"read -P {FILL} 0 {LENGTH}"
    return qemu("qemu-io", "-r", "-f", image_format, "-c", read, path, check=False).returncode == 0

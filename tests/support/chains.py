"""Chains forged without QEMU, and what of them was opened."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcowfs.chain import open_chain
from qcowfs.gate import Policy
from tests.support import forge
from tests.support.tables import active_disk

__all__ = ["EXTERNAL_DATA", "first_byte", "layers", "loop", "no_new_descriptors", "overlay", "with_data_file"]

EXTERNAL_DATA = 1 << 2  # incompatible feature


def overlay(path: Path, backing: str | bytes | Path, backing_format: str | None = "qcow2", **changes: int) -> Path:
    """Write an empty qcow2 image of 512 KiB at `path` that is based on `backing`; its directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    extensions = [] if backing_format is None else [(forge.BACKING_FORMAT, backing_format.encode())]
    path.write_bytes(forge.qcow2(backing_name=os.fsencode(backing), extensions=extensions, **changes))
    return path


def with_data_file(path: Path, name: str | bytes | Path | None, **changes: int) -> Path:
    """Write an empty qcow2 image at `path` whose data file has a name, or has none."""
    extensions = [] if name is None else [(forge.DATA_FILE, os.fsencode(name))]
    path.write_bytes(forge.qcow2(incompatible_features=EXTERNAL_DATA, extensions=extensions, **changes))
    return path


def layers(image: Path | str, policy: Policy | None = None, **options: str) -> list[tuple[str, str]]:
    """Open the chain of `image`, and return (path, format) of each layer."""
    with open_chain(str(image), policy or Policy(), image_format=options.get("image_format")) as chain:
        return [(layer.path, layer.format) for layer in chain.layers]


def first_byte(image: Path | str, policy: Policy | None = None) -> int:
    """Return the first byte of the active disk of `image`."""
    with open_chain(str(image), policy or Policy()) as chain:
        return active_disk(chain).pread(0, 1)[0]


def loop(first: Path, second: Path) -> Path:
    """Write two overlays that are based on each other; returns the first."""
    overlay(second, first.name)
    return overlay(first, os.path.relpath(second, first.parent))


@contextmanager
def no_new_descriptors() -> Iterator[None]:
    """Whatever happens inside, afterwards as many files are open as before."""
    before = os.listdir("/proc/self/fd")
    try:
        yield
    finally:
        assert before == os.listdir("/proc/self/fd")

"""QEMU's tools, run and believed: the judge of the oracle's tests."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.content import EIO, Content

__all__ = ["CannotRevert", "convert", "qemu", "qemu_io", "qemu_map", "qemu_reads", "qemu_says", "reverted"]

TIMEOUT = 60  # seconds that one tool may take
# A tool that makes a LUKS header measures how fast it is, and on a busy machine gives up now and then.
UNLUCKY = b"Unable to get accurate CPU usage"
ATTEMPTS = 20  # about every second one fails where the kernel counts CPU time in ticks
DUMPED = re.compile(r"[0-9a-f]{8,}:  ((?:[0-9a-f]{2} )+)")  # a line of `read -v`


class CannotRevert(Exception):
    """QEMU does not go back to that snapshot: no room for the refcounts, or it found its own image corrupt."""


def qemu(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """Run a QEMU tool; with `check`, a failure is an error that shows what it said."""
    for _ in range(ATTEMPTS):
        with _no_memory_limit():
            result = subprocess.run([str(word) for word in words], capture_output=True, timeout=TIMEOUT)
        if UNLUCKY not in result.stderr:
            break
    if check and result.returncode:
        raise AssertionError(f"{' '.join(map(str, words))}: {result.stderr.decode(errors='replace')}")
    return result


@contextmanager
def _no_memory_limit() -> Iterator[None]:
    """What the hostile tests limit is qcowfs; QEMU aborts where it cannot start a thread."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (before[1], before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def qemu_io(image: Path, *commands: str, image_format: str = "qcow2", check: bool = True) -> None:
    """Run `commands` on `image`, all in one process."""
    words = [word for command in commands for word in ("-c", command)]
    qemu("qemu-io", "-f", image_format, *words, image, check=check)


def convert(image: Path, image_format: str, *words: str) -> bytes | None:
    """Return the active state of `image` as QEMU reads it; None where QEMU cannot read all of it."""
    raw = image.with_suffix(".converted")
    result = qemu("qemu-img", "convert", "-f", image_format, "-O", "raw", *words, image, raw, check=False)
    try:
        return raw.read_bytes() if result.returncode == 0 else None
    finally:
        raw.unlink(missing_ok=True)


@contextmanager
def reverted(image: Path, snapshot: str) -> Iterator[Path]:
    """Yield a copy of `image`, beside it, whose active state is that of `snapshot`: an id, or a name that is no id.

    Not `convert -l`: it keeps the active size, and shows VM state as disk data.
    """
    copy = image.with_name(f"{image.stem}-copy.qcow2")
    shutil.copyfile(image, copy)
    try:
        result = qemu("qemu-img", "snapshot", "-a", snapshot, copy, check=False)
        if result.returncode:
            raise CannotRevert(result.stderr.decode())
        yield copy
    finally:
        copy.unlink()


def qemu_map(image: Path, image_format: str) -> list[dict[str, Any]]:
    """Return what `qemu-img map` says of the active state."""
    result = qemu("qemu-img", "map", "--output=json", "-f", image_format, image)
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def qemu_reads(image: Path, ranges: list[tuple[int, int]], image_format: str = "qcow2") -> list[Content]:
    """Return what QEMU reads of each (offset, length) of the active state of `image`: bytes, or EIO."""
    commands = [word for offset, length in ranges for word in ("-c", f"read -v {offset} {length}")]
    said = qemu("qemu-io", "-r", "-f", image_format, *commands, image, check=False)
    found: list[Content] = []
    dump = bytearray()
    for line in said.stdout.decode().splitlines():
        if line.startswith("read failed: Input/output error"):
            found.append(Content(EIO))
        elif line.startswith("read "):
            found.append(Content(bytes(dump)))
            dump.clear()
        elif match := DUMPED.match(line):
            dump += bytes.fromhex(match[1])
    assert len(found) == len(ranges), said.stderr
    return found


def qemu_says(image: Path, offset: int, expected: bytes | str) -> bool:
    """Tell whether QEMU agrees that `image` holds `expected`, bytes of one value or EIO, at `offset`.

    Quicker than `qemu_reads` for much data.
    """
    if isinstance(expected, str):
        return qemu_reads(image, [(offset, 512)]) == [expected]
    assert len(set(expected)) == 1, "QEMU can only be asked for one value"
    said = qemu(
        "qemu-io", "-r", "-f", "qcow2", "-c", f"read -P {expected[0]} {offset} {len(expected)}", image, check=False
    )
    return said.returncode == 0

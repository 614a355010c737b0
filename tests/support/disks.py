"""Disks for what looks for volumes: of a file, of bytes, of bytes that partly cannot be read; and loop devices."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from qcowfs.errors import ReadFault

__all__ = ["BytesDisk", "FileDisk", "attached", "run"]

TIMEOUT = 60  # seconds that one tool may take


class FileDisk:
    """A raw image, read with pread(2); counts its reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.virtual_size = path.stat().st_size
        self.reads = 0

    def pread(self, offset: int, length: int) -> bytes:
        assert 0 <= offset < 1 << 64 and 0 <= length < 1 << 64, "what compiled code would refuse"
        self.reads += 1
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), length, offset) if offset < self.virtual_size else b""


class BytesDisk:
    """Bytes, and zeros up to `size`; a read that touches one of the `broken` ranges (start, end) fails."""

    def __init__(self, data: bytes, size: int | None = None, broken: Sequence[tuple[int, int]] = ()) -> None:
        self.data = data
        self.virtual_size = len(data) if size is None else size
        self.broken = broken

    def pread(self, offset: int, length: int) -> bytes:
        assert 0 <= offset < 1 << 64 and 0 <= length < 1 << 64, "what compiled code would refuse"
        end = min(offset + length, self.virtual_size)
        for start, stop in self.broken:
            if offset < stop and start < end:
                raise ReadFault("disk", 0, max(start, offset), "broken on purpose", errno.EIO)
        return self.data[offset:end].ljust(max(0, end - offset), b"\0")


def run(*words: str | Path, text: str | None = None, check: bool = True) -> str:
    """Run a tool, with `text` as its input, and return what it printed; a failure shows what it said."""
    done = subprocess.run(
        [str(word) for word in words],
        input=text,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env={**os.environ, "LVM_SUPPRESS_FD_WARNINGS": "1", "LC_ALL": "C.UTF-8"},
    )
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, words))}: {done.stderr}")
    return done.stdout


@contextmanager
def attached(path: Path, *words: str) -> Iterator[str]:
    """Yield a loop device over `path`."""
    device = run("losetup", "--find", "--show", *words, path).strip()
    try:
        yield device
    finally:
        run("losetup", "--detach", device)

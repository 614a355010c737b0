"""A file or a block device that was opened: its bytes, and the facts about it.

Used by chain. What may be opened is the gate's business; here a descriptor becomes a source. Immutable but for
`close`; any thread.
"""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, replace

from qcowfs._source import FileSource, SliceSource, Source
from qcowfs.errors import SourceError

__all__ = ["File", "open_file"]

BLOCK = 512  # the unit of st_blocks
TICK = 0.02  # seconds; the clock of Linux' file systems has ticks of 1 to 10 ms, and in one of them all times are equal
SETTLING = 3  # looks at a file that somebody writes all the time without a lock


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """An opened file, or a window of it.

    Attributes:
        path: the absolute name that it was opened by, symbolic links and all.
        source: its bytes.
        descriptor: belongs to `source`.
        status: of the moment when it was opened.
    """

    path: str
    source: Source
    descriptor: int
    status: os.stat_result

    @property
    def identity(self) -> tuple[int, int]:
        """Tells whether two names lead to the same bytes: links of both kinds, and two nodes of one device."""
        if stat.S_ISBLK(self.status.st_mode):
            return -1, self.status.st_rdev
        return self.status.st_dev, self.status.st_ino

    @property
    def disk_size(self) -> int:
        """Bytes that it takes on the host: a device all of its own, though stat(2) counts no blocks of it.

        Raises:
            SourceError: the device does not tell its length.
        """
        if not stat.S_ISBLK(self.status.st_mode):
            return self.status.st_blocks * BLOCK
        try:
            return self.source.size
        except OSError as error:
            raise SourceError.from_oserror(self.path, "cannot tell its length", error) from error

    def settled(self) -> File:
        """Return this file with a status that tells of every later write by another st_mtime."""
        status = os.fstat(self.descriptor)
        for _ in range(SETTLING):
            if stat.S_ISBLK(status.st_mode) or abs(time.time() - status.st_mtime) > TICK:
                break
            time.sleep(TICK)
            status = os.fstat(self.descriptor)
        return replace(self, status=status)

    def start(self, length: int) -> bytes:
        """Return the first `length` bytes, fewer if there are no more.

        Raises:
            SourceError: they cannot be read.
        """
        try:
            return self.source.read_at(0, length)
        except OSError as error:
            raise SourceError.from_oserror(self.path, "cannot read", error) from error

    def close(self) -> None:
        """Give the descriptor back, and with it its locks."""
        with suppress(OSError):
            self.source.close()


def open_file(descriptor: int, path: str, *, offset: int = 0, size: int | None = None) -> File:
    """Make a File of an open descriptor, which belongs to it from now on, also if this fails.

    Args:
        path: for messages.
        offset, size: the window, in bytes; size None: up to the end.

    Raises:
        SourceError: the window reaches past the end of the file.
    """
    source: Source = FileSource(descriptor, path)
    status = os.fstat(descriptor)
    if offset or size is not None:
        try:
            source = SliceSource(source, offset, size)
        except ValueError as error:
            length = source.size
            source.close()
            why = f"which reaches past its end at {length:#x}"
            wanted = f"{offset:#x} to {'the end' if size is None else hex(offset + size)}"
            raise SourceError(path, f"cannot take the window from {wanted}", why) from error
    return File(path=path, source=source, descriptor=descriptor, status=status)

"""The bytes of a regular file: written where they are data, left out where they are holes, and compared again.

Used by restorer.py. One thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from qcowfs import limits
from qcowfs.errors import QcowfsError, ReadFault, TreeFault
from qcowfs.inside.walk import Place

__all__ = ["Damage", "compare", "write"]

PIECE = limits.INSIDE_WANT  # bytes that are read at once
GRAIN = 4096  # bytes of which a damaged range is made up: a block of most file systems
Moved = Callable[[int], None]


class Damage:
    """Ranges of a file that cannot be read.

    Attributes:
        ranges: start and end, in bytes.
        what: the first one's reason.
    """

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []
        self.what = ""

    def add(self, start: int, end: int, fault: QcowfsError) -> None:
        """Note a range behind all others.

        Raises:
            QcowfsError: there are too many.
        """
        self.what = self.what or str(fault)
        if self.ranges and self.ranges[-1][1] == start:
            self.ranges[-1] = (self.ranges[-1][0], end)
            return
        if len(self.ranges) == limits.MAX_DAMAGED_RANGES:
            raise fault
        self.ranges.append((start, end))

    def __str__(self) -> str:
        shown = [f"{start} to {end - 1}" for start, end in self.ranges[: limits.MAX_NOTES]]
        more = len(self.ranges) - len(shown)
        return f"bytes {', '.join(shown)}{f' and {more} more ranges' if more else ''} cannot be read: {self.what}"


def write(place: Place, descriptor: int, damage: Damage, moved: Moved) -> None:
    """Write the bytes of `place` into an empty file.

    Args:
        damage: is told what cannot be read, and reads as a hole.
        moved: is told how many bytes were written, piece by piece.

    Raises:
        QcowfsError: nothing of the file can be read.
        OSError: the file cannot be written.
    """
    size = place.inode.size
    end = 0
    for start, data in _pieces(place, damage):
        _write_all(descriptor, data, start)
        end = start + len(data)
        moved(len(data))
    if end != size:
        os.ftruncate(descriptor, size)


def compare(place: Place, descriptor: int) -> bool:
    """Tell whether the file on the medium has the bytes of `place`, and zeros where there are none to be read."""
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    at = 0
    for start, data in _pieces(place, Damage()):
        if not _is_zero(descriptor, at, start) or os.pread(descriptor, len(data), start) != data:
            return False
        at = start + len(data)
    return _is_zero(descriptor, at, place.inode.size) and os.fstat(descriptor).st_size == place.inode.size


def _pieces(place: Place, damage: Damage) -> Iterator[tuple[int, bytes]]:
    """Yield the data of a file and where it is."""
    disk = place.disk()
    if disk is None:
        yield from _made(place, damage)
        return
    start, size = 0, place.inode.size
    while start < size:
        found = disk.seek(start, os.SEEK_DATA)
        if found is None:
            return
        hole = disk.seek(found, os.SEEK_HOLE)
        end = size if hole is None else min(hole, size)
        if not start <= found < end:
            raise TreeFault(place.name, "the holes of the file contradict each other")
        for at in range(found, end, PIECE):
            yield from _readable(disk.pread, at, min(end, at + PIECE), damage)
        start = end


def _made(place: Place, damage: Damage) -> Iterator[tuple[int, bytes]]:
    """Yield the pieces of a file whose bytes its reader makes; those that are zeros are taken for holes."""
    start, size = 0, place.inode.size
    while start < size:
        end = min(size, start + PIECE)
        try:
            data = place.read(start, end - start)
            if not data:
                raise TreeFault(place.name, f"the file ends at {start}, and its size is {size}")
        except TreeFault as fault:
            damage.add(start, end, fault)
        else:
            end = start + len(data)
            if data.count(0) < len(data):
                yield start, data
        start = end


def _readable(read: Callable[[int, int], bytes], start: int, end: int, damage: Damage) -> Iterator[tuple[int, bytes]]:
    """Yield what can be read of a range; if not all of it, grain by grain."""
    try:
        yield start, read(start, end - start)
        return
    except ReadFault as fault:
        if end - start <= GRAIN:
            damage.add(start, end, fault)
            return
    for at in range(start, end, GRAIN):
        yield from _readable(read, at, min(end, at + GRAIN), damage)


def _write_all(descriptor: int, data: bytes, start: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, start)
        if count == 0:
            raise OSError(errno.EIO, "nothing was written")
        view, start = view[count:], start + count


def _is_zero(descriptor: int, start: int, end: int) -> bool:
    """Tell whether a range reads as zeros; holes are known to."""
    while start < end:
        try:
            start = os.lseek(descriptor, start, os.SEEK_DATA)
        except OSError as error:
            return error.errno == errno.ENXIO  # no data behind it
        if start >= end:
            return True
        data = os.pread(descriptor, min(PIECE, end - start), start)
        if data.count(0) < len(data) or not data:
            return False
        start += len(data)
    return True

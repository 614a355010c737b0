"""Which ranges of a point an export has to look at: those with data, or those that may differ from an older point.

Used by job.py. Only tables are read. Generators; one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qcowfs._copy import find_data
from qcowfs._core import Disk, Extent
from qcowfs.errors import ReadFault

__all__ = ["changed_ranges", "data_ranges", "pieces"]

Range = tuple[int, int]  # start and end, guest offsets

BATCH = 1024  # extents that are held in memory at once
BLIND = 65536  # bytes that are taken for different at once, where a table cannot be read


def data_ranges(disk: Disk) -> Iterator[Range]:
    """Yield what holds data, in order; what cannot be resolved counts as data.

    Empty ranges come in between, so that whoever asks can stop asking: to look through a large hole takes a while.
    """
    offset = 0
    while offset < disk.virtual_size:
        start, offset = find_data(disk, offset)
        yield start, offset


def changed_ranges(old: Disk, new: Disk) -> Iterator[Range]:
    """Yield the ranges of `new` that may differ from `old`, in order, and empty ones for those that do not.

    Ranges that both take from the same place of the same layer are the same, and so are those that hold no data in
    either. Past its end `old` counts as zeros.
    """
    olds, news = _Extents(old, new.virtual_size), _Extents(new, new.virtual_size)
    offset = 0
    while offset < new.virtual_size:
        before, now = olds.at(offset), news.at(offset)
        end = min(_end(before), _end(now))
        yield offset, offset if _same(before, now, offset) else end
        offset = end


def pieces(ranges: Iterable[Range], unit: int, most: int, virtual_size: int) -> Iterator[Range]:
    """Yield `ranges` in whole units, none of them twice, cut at multiples of `most`; empty ones as they are.

    Args:
        unit, most: bytes; `most` is a multiple of `unit`.
        virtual_size: where the last piece ends, on whatever byte that is.
    """
    done = 0
    for start, end in ranges:
        if start == end:
            yield start, end
            continue
        start = max(done, start // unit * unit)
        done = max(done, -(-end // unit) * unit)
        while start < done:
            stop = min(done, (start // most + 1) * most)
            yield start, min(stop, virtual_size)
            start = stop


class _Extents:
    """The extents of a disk, each as often as it is asked for while the offsets grow; zeros from its end to `size`."""

    def __init__(self, disk: Disk, size: int) -> None:
        self._disk = disk
        self._size = size
        self._found: list[Extent] = []  # the next one last

    def at(self, offset: int) -> Extent:
        """Return the extent that `offset` is in."""
        while self._found and _end(self._found[-1]) <= offset:
            self._found.pop()
        if not self._found:
            self._found = self._batch(offset)[::-1]
        return self._found[-1]

    def _batch(self, offset: int) -> list[Extent]:
        size = self._disk.virtual_size
        if offset >= size:
            return [Extent(offset, self._size - offset, 0, False, True, False, False, None)]
        try:
            return self._disk.extents(offset, size - offset, BATCH)
        except ReadFault:  # data at no known place: whoever reads it gets the fault
            end = min((offset // BLIND + 1) * BLIND, size)
            return [Extent(offset, end - offset, 0, True, False, True, False, None)]


def _end(extent: Extent) -> int:
    return extent.start + extent.length


def _same(before: Extent, now: Extent, offset: int) -> bool:
    if not before.data and not now.data:
        return True
    if before.offset is None or now.offset is None or before.depth != now.depth or before.data != now.data:
        return False  # where compressed data lies is not told
    return before.offset + offset - before.start == now.offset + offset - now.start

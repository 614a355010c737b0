"""Which ranges of a point an export has to look at: those with data, or those that may differ from an older point.

Used by job.py. Only tables are read. Generators; one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qcowfs._copy import find_data
from qcowfs._core import Disk
from qcowfs.blockdiff import may_differ

__all__ = ["changed_ranges", "data_ranges", "pieces"]

Range = tuple[int, int]  # start and end, guest offsets


def data_ranges(disk: Disk) -> Iterator[Range]:
    """Yield what holds data, in order; what cannot be resolved counts as data.

    Empty ranges come in between, so that whoever asks can stop asking: to look through a large hole takes a while.
    """
    offset = 0
    while offset < disk.virtual_size:
        start, offset = find_data(disk, offset)
        yield start, offset


def changed_ranges(old: Disk, new: Disk) -> Iterator[Range]:
    """Yield the ranges of `new` that may differ from `old`, in order. Past its end `old` counts as zeros."""
    for start, length in may_differ(old, new):
        if start < new.virtual_size:
            yield start, min(start + length, new.virtual_size)


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

"""Where two disks differ, as ranges of bytes.

Used by the commands. `differing` is exact: it is what a comparison of all bytes would find, but reads only what the
tables do not prove equal; `may_differ` reads no data at all. The work is that of the compiled room `_compare`; here it
is handed out to threads, and what comes back is put in order. Generators of one thread each.
"""

from __future__ import annotations

import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from qcowfs._compare import Batch, Comparison
from qcowfs._core import Disk
from qcowfs.errors import ReadFault

__all__ = ["DEFAULT_GRANULARITY", "differing", "may_differ"]

DEFAULT_GRANULARITY = 4096  # a page, and the block of most file systems
BATCH = 8 << 20  # bytes of each disk that one thread compares before it hands in what it found
SMALLEST_BATCH = 256 << 10
BLOCKS_OF_A_BATCH = 1 << 15  # when every second one differs, their ranges take 256 KiB
MOST_THREADS = 16  # more of them wait for memory and disks, not for each other
BATCHES_FOR_A_THREAD = 2  # so that none waits for the one before it to be taken away
ALL = 1 << 62  # more than any disk has

Range = tuple[int, int]
OnFault = Callable[[int, int, ReadFault], None]


def may_differ(old: Disk, new: Disk, *, granularity: int = DEFAULT_GRANULARITY) -> Iterator[Range]:
    """Yield (offset, length) of what the tables do not prove equal, in order, none touching another.

    Args:
        old, new: any two. Past the end of the smaller one the other may differ where it is not known to be zero.
        granularity: bytes, a power of two; ranges are widened to multiples of it, up to the end of the larger disk.

    No data is read. A range behind a table that cannot be read may differ, too.

    Raises:
        OSError: the status of a file cannot be had.
    """
    comparison = Comparison(old, new)
    merger = _Merger(granularity, comparison.end)
    for batch in _candidates(comparison, ALL):
        faulty = [(start, end) for start, end, _ in batch.faults]
        yield from merger.take(sorted([*_pairs(batch), *faulty]))
    yield from merger.rest()


def differing(
    old: Disk, new: Disk, *, granularity: int = DEFAULT_GRANULARITY, on_fault: OnFault | None = None
) -> Iterator[Range]:
    """Yield (offset, length) of what differs, in order, none touching another.

    Args:
        old, new: any two. Past its end the smaller one counts as zeros.
        granularity: bytes, a power of two; a block of so many bytes, at a multiple of it, differs where one of its
            bytes does. The last one ends with the larger disk.
        on_fault: called with (offset, length, fault) of each range that cannot be compared, in order; all others are
            compared. None: the first fault is raised.

    Raises:
        ReadFault: some of a disk cannot be read, and there is no `on_fault`.
        OSError: the status of a file cannot be had.
    """
    comparison = Comparison(old, new)
    merger = _Merger(granularity, comparison.end)
    for batch in _compared(comparison, granularity):
        for start, end, fault in batch.faults:
            if on_fault is None:
                raise fault
            on_fault(start, end - start, fault)
        yield from merger.take(_pairs(batch))
    yield from merger.rest()


def _candidates(comparison: Comparison, most_bytes: int) -> Iterator[Batch]:
    offset = 0
    while offset < comparison.end:
        batch = comparison.candidates(offset, most_bytes)
        offset = batch.end
        if batch.ranges or batch.faults:
            yield batch


def _compared(comparison: Comparison, granularity: int) -> Iterator[Batch]:
    """Yield what threads have found, in order. The tables are walked here, meanwhile."""
    threads = min(len(os.sched_getaffinity(0)), MOST_THREADS)
    most_bytes = min(BATCH, max(SMALLEST_BATCH, granularity * BLOCKS_OF_A_BATCH))
    waiting: deque[tuple[Batch, Future[Batch]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for batch in _candidates(comparison, most_bytes):
                waiting.append((batch, pool.submit(comparison.compare, batch.ranges, granularity)))
                if len(waiting) > threads * BATCHES_FOR_A_THREAD:
                    yield _joined(*waiting.popleft())
            while waiting:
                yield _joined(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)


def _joined(batch: Batch, compared: Future[Batch]) -> Batch:
    """Return what a thread has found, with the faults of the tables that it never got to see."""
    found = compared.result()
    if not batch.faults:
        return found
    return found._replace(faults=sorted([*batch.faults, *found.faults], key=lambda fault: fault[:2]))


def _pairs(batch: Batch) -> Iterable[Range]:
    return struct.iter_unpack("=QQ", batch.ranges)


class _Merger:
    """Widens ranges to blocks and joins those that touch."""

    def __init__(self, granularity: int, end: int) -> None:
        self._granularity = granularity
        self._end = end
        self._first = self._last = 0  # the range that may go on

    def take(self, ranges: Iterable[Range]) -> Iterator[Range]:
        """Yield what is complete now that (start, end) of `ranges` follow, in order."""
        for start, end in ranges:
            start -= start % self._granularity
            end = min(self._end, -(-end // self._granularity) * self._granularity)
            if start > self._last:
                yield from self.rest()
                self._first = start
            self._last = max(self._last, end)

    def rest(self) -> Iterator[Range]:
        """Yield the last one, which nothing follows any more."""
        if self._first < self._last:
            yield self._first, self._last - self._first
        self._first = self._last

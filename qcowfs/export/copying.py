"""The bytes of a disk on their way to a writer, on all processors, in a few buffers.

Used by job.py. Reading, comparing, compressing and writing release the GIL; what is left to Python is a few lines for
each piece of 1 MiB. The pieces are taken in order and written as they come.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Protocol

from qcowfs._copy import classify, read_into
from qcowfs._core import Disk
from qcowfs.errors import ReadFault
from qcowfs.export.changes import Range, changed_ranges, data_ranges, pieces
from qcowfs.export.kinds import SAME, ZEROS
from qcowfs.export.sharing import Run, stored_runs

__all__ = ["Copy", "Unreadable", "Writer", "merged", "stream"]

PIECE = 1 << 20  # bytes that one thread handles at once
WORKERS = max(2, min(32, len(os.sched_getaffinity(0))))  # 32 with two buffers each: 64 MiB
BLOCK = 4096  # bytes that are given up at once where something cannot be read
INTERVAL = 0.1  # seconds between two reports
UNKNOWN_OLD = bytes.maketrans(bytes([SAME]), bytes([ZEROS]))
NOTHING = bytes(PIECE)

Report = Callable[[int], None]  # is told how many bytes are done
Fetched = tuple[int, int, memoryview, list["Unreadable"]]  # start, end, a buffer, what of it could not be read


class Writer(Protocol):
    """What takes the bytes; any number of threads, each with ranges of its own."""

    unit: int  # bytes; divides PIECE

    def write(self, offset: int, data: memoryview, kinds: bytes | bytearray) -> None: ...
    def share(self, offset: int, length: int, runs: list[Run]) -> bool: ...
    def finish(self) -> None: ...


class Unreadable(NamedTuple):
    """A range of the disk that was written as zeros instead."""

    start: int
    length: int
    why: str


class Copy:
    """Copies what holds data, or what differs from an older point, to a writer.

    Args:
        old: None: all data is copied.
        keep_going: write zeros where something cannot be read.
        shared: let the writer share what is stored as it is, instead of a copy; not with `old`.

    Attributes:
        done: bytes so far, of those that `total` counts.
        unreadable: what could not be read, in no order.
    """

    def __init__(self, disk: Disk, old: Disk | None, writer: Writer, *, keep_going: bool, shared: bool = False) -> None:
        self._disk = disk
        self._old = old
        self._writer = writer
        self._keep_going = keep_going
        self._shared = shared
        self._error: BaseException | None = None
        self._lock = threading.Lock()  # for all below
        self._pieces = self._all_pieces()
        self.done = 0
        self.unreadable: list[Unreadable] = []

    def total(self) -> int:
        """Return how many bytes are looked at; walks all tables, and is remembered nowhere."""
        return sum(end - start for start, end in self._all_pieces())

    def run(self, report: Report | None) -> None:
        """Copy everything; on Ctrl-C, or if anything fails, stop soon and raise.

        Raises:
            ReadFault: something cannot be read.
            OSError: something cannot be written.
        """
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(WORKERS)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(INTERVAL)
                    if report is not None:
                        report(self.done)
        except BaseException as error:
            self._fail(error)
            for thread in threads:
                thread.join()
            raise
        if self._error is not None:
            raise self._error

    def _all_pieces(self) -> Iterator[Range]:
        ranges = data_ranges(self._disk) if self._old is None else changed_ranges(self._old, self._disk)
        return pieces(ranges, self._writer.unit, PIECE, self._disk.virtual_size)

    def _fail(self, error: BaseException) -> None:
        """Keep the first error, or one of the first. Without the lock: what holds it may look through a large hole."""
        self._error = self._error or error

    def _next(self) -> Range | None:
        with self._lock:
            while self._error is None:
                piece = next(self._pieces, None)
                if piece is None or piece[0] < piece[1]:
                    return piece
        return None

    def _work(self) -> None:
        try:
            new, old = buffer(), buffer()
            while (piece := self._next()) is not None:
                self._copy(*piece, new, old)
        except BaseException as error:  # to be raised by run()
            self._fail(error)

    def _copy(self, start: int, end: int, new: memoryview, old: memoryview) -> None:
        length = -(-(end - start) // self._writer.unit) * self._writer.unit
        new = new[:length]
        unreadable: list[Unreadable] = []
        if not self._is_shared(start, length):
            unreadable = read(self._disk, start, new, keep_going=self._keep_going)
            self._writer.write(start, new, self._kinds(start, new, old[:length]))
        with self._lock:
            self.done += end - start
            self.unreadable += unreadable

    def _is_shared(self, start: int, length: int) -> bool:
        runs = stored_runs(self._disk, start, length) if self._shared else []
        return bool(runs) and self._writer.share(start, length, runs)

    def _kinds(self, start: int, new: memoryview, old: memoryview) -> bytes | bytearray:
        if self._old is None:
            return classify(new, None, self._writer.unit)
        try:
            read_into(self._old, start, old)
        except ReadFault:  # nobody knows what the backing file has there: everything is said
            return classify(new, None, self._writer.unit).translate(UNKNOWN_OLD)
        return classify(new, old, self._writer.unit)


def buffer() -> memoryview:
    """Return room for a piece, which is taken from the host page by page as it is used.

    It begins with a page: the kernel copies 512 MiB to 16 bytes behind the start of one, where malloc(3) puts large
    blocks, in 0.25 s, and to a page in 0.07 s (AMD EPYC; a `rep movsb` whose ends do not fit together).
    """
    return memoryview(mmap.mmap(-1, PIECE))


def read(disk: Disk, start: int, buffer: memoryview, *, keep_going: bool) -> list[Unreadable]:
    """Fill `buffer`; with zeros where it cannot be read, which is returned.

    Raises:
        ReadFault: something cannot be read, without `keep_going`.
    """
    try:
        read_into(disk, start, buffer)
        return []
    except ReadFault as fault:
        if not keep_going:
            fault.hint = "--keep-going exports the rest, with zeros in the place of what cannot be read"
            raise
    return merged(_read_blocks(disk, start, buffer))


def _read_blocks(disk: Disk, start: int, buffer: memoryview) -> Iterator[Unreadable]:
    for place in range(0, len(buffer), BLOCK):
        block = buffer[place : place + BLOCK]
        try:
            read_into(disk, start + place, block)
        except ReadFault as fault:
            block[:] = bytes(len(block))
            yield Unreadable(start + place, min(len(block), disk.virtual_size - start - place), str(fault))


def merged(found: Iterator[Unreadable] | list[Unreadable]) -> list[Unreadable]:
    """Return the ranges in order, neighbours as one, with what was wrong with the first of them."""
    ranges: list[Unreadable] = []
    for one in sorted(found):
        if ranges and ranges[-1].start + ranges[-1].length == one.start:
            ranges[-1] = ranges[-1]._replace(length=ranges[-1].length + one.length)
        else:
            ranges.append(one)
    return ranges


def stream(
    disk: Disk, write: Callable[[memoryview], object], report: Report | None, *, keep_going: bool
) -> list[Unreadable]:
    """Write the whole disk in order, holes as zeros; return what could not be read.

    Raises:
        ReadFault: something cannot be read, without `keep_going`.
    """
    unreadable: list[Unreadable] = []
    done = 0
    most = 2 * WORKERS  # pieces that are read ahead
    spare = deque(buffer() for _ in range(most + 1))

    def fetch(start: int, end: int) -> Fetched:
        data = spare.pop()
        return start, end, data, read(disk, start, data[: end - start], keep_going=keep_going)

    def take(future: Future[Fetched]) -> None:
        nonlocal done
        start, end, data, missing = future.result()
        _write_zeros(write, start - done)
        write(data[: end - start])
        spare.append(data)
        done = end
        unreadable.extend(missing)
        if report is not None:
            report(done)

    waiting: deque[Future[Fetched]] = deque()
    with ThreadPoolExecutor(WORKERS) as pool:
        for start, end in pieces(data_ranges(disk), BLOCK, PIECE, disk.virtual_size):
            if start < end:
                waiting.append(pool.submit(fetch, start, end))
            if len(waiting) > most:
                take(waiting.popleft())
        while waiting:
            take(waiting.popleft())
    _write_zeros(write, disk.virtual_size - done)
    return merged(unreadable)


def _write_zeros(write: Callable[[memoryview], object], length: int) -> None:
    while length > 0:
        write(memoryview(NOTHING)[: min(length, PIECE)])
        length -= PIECE

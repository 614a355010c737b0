"""Where the bytes of a file are stored: what proves that two files are equal before either of them is read.

Used by file diff and history. Two points of an image mostly share the clusters of a file that did not change.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from qcowfs._compare import Comparison
from qcowfs._core import Disk
from qcowfs._mapped import Mapped
from qcowfs.errors import QcowfsError

__all__ = [
    "FileOf",
    "HostPlace",
    "PairOf",
    "Piece",
    "Range",
    "fingerprint",
    "pieces",
    "same_bytes",
    "same_place",
    "unproven",
]

EXTENTS = 1024  # that are asked for at once
CHUNK = 1 << 20  # bytes that are read at once where nothing is proven
ALL = 1 << 62  # more than any file has

HostPlace = tuple[object, int]
FileOf = Callable[[Disk, int], object]  # which file the layer at a depth of a disk is; equal for the same file
PairOf = Callable[[Disk, Disk], Comparison]  # what two disks share; whoever asks for many files keeps the answers
Range = tuple[int, int]  # start and length


class Bytes(Protocol):
    """What can be read."""

    def pread(self, offset: int, length: int) -> bytes: ...


class Piece(NamedTuple):
    """A part of a file, in bytes.

    Attributes:
        place: (file, offset) of its first byte on the host; None where only reading tells.
        zero: all of it reads as zeros.
    """

    start: int
    length: int
    place: HostPlace | None
    zero: bool


class _Run(NamedTuple):
    """A part of a file: of a disk, or zeros, or at hand."""

    start: int
    length: int
    disk: Disk | None
    offset: int
    zero: bool = False

    def part(self, start: int, end: int) -> _Run:
        return self._replace(start=start, length=end - start, offset=self.offset + start - self.start)


def _runs(mapped: Mapped) -> Iterator[_Run]:
    """Yield the runs of a file from its start to its end, without gaps."""
    place = 0
    for start, length, disk, offset in mapped.runs:
        if start > place:
            yield _Run(place, start - place, None, 0, True)
        yield _Run(start, length, disk, offset)
        place = start + length
    if place < mapped.virtual_size:
        yield _Run(place, mapped.virtual_size - place, None, 0, True)


def _side_by_side(old: Iterator[_Run], new: Iterator[_Run]) -> Iterator[tuple[_Run, _Run]]:
    """Yield what two equally long files have at the same place, cut where either of them goes on elsewhere."""
    one, other = next(old, None), next(new, None)
    while one is not None and other is not None:
        start, end = max(one.start, other.start), min(one.start + one.length, other.start + other.length)
        yield one.part(start, end), other.part(start, end)
        if one.start + one.length == end:
            one = next(old, None)
        if other.start + other.length == end:
            other = next(new, None)


def _of_pair(run: _Run, other: Disk, pair_of: PairOf) -> Iterator[Range]:
    """Yield what is not proven of a run of one disk and of what the other disk has at the same offset."""
    assert run.disk is not None
    offset, end = run.offset, run.offset + run.length
    try:
        pair = pair_of(run.disk, other)
    except (OSError, ValueError):  # a file has no status, or is closed: whoever reads it hears why
        yield run.start, run.length
        return
    while offset < end:
        batch = pair.candidates(offset, ALL, end)
        faulty = [(start, last) for start, last, _ in batch.faults]  # whoever reads it hears why
        for start, last in sorted([*struct.iter_unpack("=QQ", batch.ranges), *faulty]):
            yield run.start + start - run.offset, min(last, end) - start
        offset = batch.end


def pieces(mapped: Mapped, file_of: FileOf) -> Iterator[Piece]:
    """Yield the pieces of a file from its start to its end, without gaps. Only tables are read."""
    for run in _runs(mapped):
        yield from _pieces(run, file_of)


def _pieces(run: _Run, file_of: FileOf) -> Iterator[Piece]:
    if run.disk is None:
        yield Piece(run.start, run.length, None, run.zero)
    else:
        yield from _of_disk(run.disk, run.start, run.length, run.offset, file_of)


def _of_disk(disk: Disk, start: int, length: int, offset: int, file_of: FileOf) -> Iterator[Piece]:
    end = offset + length
    while offset < end:
        try:
            extents = disk.extents(offset, end - offset, EXTENTS)
        except QcowfsError:  # whoever reads it hears why
            yield Piece(start, end - offset, None, False)
            return
        for extent in extents:
            known = extent.offset is not None and extent.data and not extent.compressed
            place = (file_of(disk, extent.depth), extent.offset) if known and extent.offset is not None else None
            yield Piece(start, extent.length, place, extent.zero)
            start += extent.length
            offset += extent.length


def same_bytes(old: Mapped, new: Mapped, file_of: FileOf, pair_of: PairOf = Comparison) -> bool:
    """Tell whether two files have the same bytes; reads only what is not proven by where it is stored.

    Raises:
        QcowfsError: bytes that had to be read cannot be.
    """
    if old.virtual_size != new.virtual_size:
        return False
    return all(_same_range(old, new, start, length) for start, length in unproven(old, new, file_of, pair_of))


def same_place(old: Mapped, new: Mapped, file_of: FileOf, pair_of: PairOf = Comparison) -> bool:
    """Tell whether two files are stored in the same places: then they are equal. Reads no bytes of theirs."""
    if old.virtual_size != new.virtual_size:
        return False
    return next(unproven(old, new, file_of, pair_of), None) is None


def unproven(old: Mapped, new: Mapped, file_of: FileOf, pair_of: PairOf = Comparison) -> Iterator[Range]:
    """Yield what is not proven equal of two files of the same length, in order. Only tables are read.

    What is at the same place of both disks, their tables prove, compressed clusters too. What was moved is equal where
    the host has it in one place.
    """
    for one, other in _side_by_side(_runs(old), _runs(new)):
        if one.disk is not None and other.disk is not None and one.offset == other.offset:
            yield from _of_pair(one, other.disk, pair_of)
        else:
            both = _overlaps(_pieces(one, file_of), _pieces(other, file_of))
            yield from ((start, length) for start, length, proven in both if not proven)


def fingerprint(mapped: Mapped, file_of: FileOf) -> bytes | None:
    """Return what only files that are stored in the same places have in common; None if only reading tells.

    It is good for this process: it has no meaning without its `file_of`.
    """
    found = hashlib.sha256(b"%d" % mapped.virtual_size)
    last: Piece | None = None
    for piece in pieces(mapped, file_of):
        if piece.place is None and not piece.zero:
            return None
        if last is not None and _continues(last, piece):
            last = last._replace(length=last.length + piece.length)
            continue
        if last is not None:
            found.update(_told(last))
        last = piece
    if last is not None:
        found.update(_told(last))
    return found.digest()


def _continues(last: Piece, piece: Piece) -> bool:
    """Tell whether `piece` goes on where `last` ends: two tables may cut one run at different places."""
    if last.zero or piece.zero or last.place is None or piece.place is None:
        return last.zero and piece.zero
    return (last.place[0], last.place[1] + last.length) == piece.place


def _told(piece: Piece) -> bytes:
    return repr((piece.start, piece.length, None if piece.zero else piece.place)).encode()


def _overlaps(old: Iterator[Piece], new: Iterator[Piece]) -> Iterator[tuple[int, int, bool]]:
    """Yield (start, length, is it proven that they are equal) for two sequences of pieces of equally long files."""
    one, other = next(old, None), next(new, None)
    while one is not None and other is not None:
        start = max(one.start, other.start)
        end = min(one.start + one.length, other.start + other.length)
        yield start, end - start, _proven(one, other)
        if one.start + one.length == end:
            one = next(old, None)
        if other.start + other.length == end:
            other = next(new, None)


def _proven(one: Piece, other: Piece) -> bool:
    if one.zero or other.zero:
        return one.zero and other.zero
    if one.place is None or other.place is None or one.place[0] != other.place[0]:
        return False
    return one.place[1] - one.start == other.place[1] - other.start


def _same_range(old: Bytes, new: Bytes, start: int, length: int) -> bool:
    end = start + length
    while start < end:
        step = min(CHUNK, end - start)
        if old.pread(start, step) != new.pread(start, step):
            return False
        start += step
    return True

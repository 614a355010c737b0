"""Where the bytes of a file are stored: what proves that two files are equal before either of them is read.

Used by file diff and history. Two points of an image mostly share the clusters of a file that did not change.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from qcowfs._core import Disk
from qcowfs._mapped import Mapped
from qcowfs.errors import QcowfsError

__all__ = ["FileOf", "HostPlace", "Piece", "fingerprint", "pieces", "same_bytes", "same_place"]

EXTENTS = 1024  # that are asked for at once
CHUNK = 1 << 20  # bytes that are read at once where nothing is proven

HostPlace = tuple[object, int]
FileOf = Callable[[Disk, int], object]  # which file the layer at a depth of a disk is; equal for the same file


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


def pieces(mapped: Mapped, file_of: FileOf) -> Iterator[Piece]:
    """Yield the pieces of a file from its start to its end, without gaps. Only tables are read."""
    place = 0
    for start, length, disk, offset in mapped.runs:
        if start > place:
            yield Piece(place, start - place, None, True)
        if disk is None:
            yield Piece(start, length, None, False)
        else:
            yield from _of_disk(disk, start, length, offset, file_of)
        place = start + length
    if place < mapped.virtual_size:
        yield Piece(place, mapped.virtual_size - place, None, True)


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


def same_bytes(old: Mapped, new: Mapped, file_of: FileOf) -> bool:
    """Tell whether two files have the same bytes; reads only what is not proven by where it is stored.

    Raises:
        QcowfsError: bytes that had to be read cannot be.
    """
    if old.virtual_size != new.virtual_size:
        return False
    return all(
        proven or _same_range(old, new, start, length)
        for start, length, proven in _overlaps(pieces(old, file_of), pieces(new, file_of))
    )


def same_place(old: Mapped, new: Mapped, file_of: FileOf) -> bool:
    """Tell whether two files are stored in the same places: then they are equal. Reads no bytes of theirs."""
    if old.virtual_size != new.virtual_size:
        return False
    return all(proven for _, _, proven in _overlaps(pieces(old, file_of), pieces(new, file_of)))


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

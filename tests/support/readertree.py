"""What a reader says of a whole tree, in the form of tests.support.trees, so that it can be compared with a mount."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from typing import Any

from qcowfs.inside.reader import INLINE, Device, Reader
from qcowfs.inside.record import ENTRY, EXTENT, INODE, NO_XATTRS, UNMAPPED, Extent, Inode
from tests.support.sparse import digest

__all__ = ["describe_reader", "entries_of", "listing"]

NANO = 10**9
CHUNK = 1 << 20
Entry = tuple[bytes, Inode, list[Extent] | None]
PIECE = 100_000  # bytes of a compressed file that are read at once: no multiple of anything
EXTENTS_AT_ONCE = 100  # that a question for them asks for: few, so that many a file takes more than one


def describe_reader(reader: Reader, device: Device, *, sha256: bool = False) -> dict[bytes, Any]:
    """Return, for each name of the tree (b"" is its root), all that can be told of it. `device` has its bytes.

    With `sha256`, contents are told by that of the whole file, for judges that have nothing else.
    """
    told = {b"": _one(reader, device, Inode._make(INODE.unpack(reader.stat(reader.root))), sha256=sha256)}
    left = [(b"", reader.root)]
    while left:
        path, directory = left.pop()
        for number, (name, inode, extents) in enumerate(entries_of(reader, directory)):
            full = path + b"/" + name if path else name
            assert full not in told
            told[full] = _one(reader, device, inode, sha256=sha256)
            _check_entry(reader, inode, extents)
            if number % 50 == 0:
                assert reader.lookup(directory, name) == inode.ino
            if stat.S_ISDIR(inode.mode):
                left.append((full, inode.ino))
    return told


def entries_of(
    reader: Reader, directory: int, room: int = 1 << 16
) -> Iterator[tuple[bytes, Inode, list[Extent] | None]]:
    """Yield name, inode and extents (None: to be asked for) of each entry, asked for in pages of `room` bytes."""
    cookie = 0
    while page := reader.entries(directory, cookie, room):
        place = 0
        while place < len(page):
            cookie, length, count, whole = ENTRY.unpack_from(page, place)
            inode = Inode._make(INODE.unpack_from(page, place + ENTRY.size))
            start = place + ENTRY.size + INODE.size
            end = start + EXTENT.size * (0 if count == UNMAPPED else count)
            extents = [Extent._make(extent) for extent in EXTENT.iter_unpack(page[start:end])]
            yield page[end : end + length], inode, None if count == UNMAPPED else extents
            place += whole


def listing(reader: Reader, directory: int, room: int = 1 << 16) -> Iterator[tuple[bytes, Inode]]:
    """Yield name and inode of each entry."""
    return ((name, inode) for name, inode, _ in entries_of(reader, directory, room))


def _check_entry(reader: Reader, inode: Inode, extents: list[Extent] | None) -> None:
    """Compare what an entry says beside its inode with the answers to the questions that it makes needless."""
    assert reader.stat(inode.ino) == inode.pack()
    if extents is not None:
        assert _all_extents(reader, inode)[0] == extents
    if inode.flags & NO_XATTRS:
        assert not reader.xattrs(inode.ino)


def _one(reader: Reader, device: Device, inode: Inode, *, sha256: bool) -> tuple[Any, ...]:
    kept = (inode.mode, inode.nlink, inode.uid, inode.gid, inode.rdev, inode.size, inode.blocks)
    times = tuple(
        second * NANO + nano
        for second, nano in (
            (inode.mtime, inode.mtime_ns),
            (inode.ctime, inode.ctime_ns),
            (inode.atime, inode.atime_ns),
        )
    )
    content: bytes | str | None = None
    if stat.S_ISLNK(inode.mode):
        content = reader.readlink(inode.ino)
    elif stat.S_ISREG(inode.mode):
        pieces = _pieces(reader, device, inode)
        content = hashlib.sha256(_joined(pieces, inode.size)).hexdigest() if sha256 else digest(pieces)
    return (*kept, times, {name.decode(): value for name, value in reader.xattrs(inode.ino).items()}, content)


def _joined(pieces: Iterator[tuple[int, bytes]], size: int) -> bytes:
    whole = bytearray(size)
    for start, piece in pieces:
        whole[start : start + len(piece)] = piece
    return bytes(whole[:size])


def _pieces(reader: Reader, device: Device, inode: Inode) -> Iterator[tuple[int, bytes]]:
    if reader.extents(inode.ino, 0, 1) is None:
        yield from ((place, reader.read(inode.ino, place, PIECE)) for place in range(0, inode.size, PIECE))
        return
    extents, inline = _all_extents(reader, inode)
    for start, length, offset in extents:
        if offset >= INLINE:
            yield start, inline[offset - INLINE :][:length]
            continue
        for place in range(0, length, CHUNK):
            yield start + place, device.read(offset + place, min(CHUNK, length - place))


def _all_extents(reader: Reader, inode: Inode) -> tuple[list[Extent], bytes]:
    """Return all extents of a file and its inline bytes, asked for in as many questions as it takes."""
    extents: list[Extent] = []
    inline = b""
    place = 0
    while place < inode.size:
        found = reader.extents(inode.ino, place, EXTENTS_AT_ONCE)
        assert found is not None
        assert place < found.end <= inode.size
        for start, length, offset in found.extents:
            extents.append(Extent(start, length, offset + len(inline) if offset >= INLINE else offset))
        inline += found.inline
        place = found.end
    return extents, inline

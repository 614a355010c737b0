"""What a reader says of a whole tree, in the form of tests.support.trees, so that it can be compared with a mount."""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from typing import Any

from qcowfs.inside.reader import INLINE, Device, Reader
from qcowfs.inside.record import ENTRY, EXTENT, INODE, UNMAPPED, Inode

__all__ = ["describe_reader", "listing"]

NANO = 10**9
PIECE = 100_000  # bytes of a compressed file that are read at once: no multiple of anything


def describe_reader(reader: Reader, device: Device) -> dict[bytes, Any]:
    """Return, for each name of the tree (b"" is its root), all that can be told of it. `device` has its bytes."""
    told = {b"": _one(reader, device, Inode._make(INODE.unpack(reader.stat(reader.root))))}
    left = [(b"", reader.root)]
    while left:
        path, directory = left.pop()
        for name, inode in listing(reader, directory):
            full = path + b"/" + name if path else name
            assert full not in told
            told[full] = _one(reader, device, inode)
            if stat.S_ISDIR(inode.mode):
                left.append((full, inode.ino))
    return told


def listing(reader: Reader, directory: int, room: int = 1 << 16) -> Iterator[tuple[bytes, Inode]]:
    """Yield the entries of a directory, asked for by `room` bytes."""
    cookie = 0
    while page := reader.entries(directory, cookie, room):
        place = 0
        while place < len(page):
            cookie, length, extents, whole = ENTRY.unpack_from(page, place)
            inode = Inode._make(INODE.unpack_from(page, place + ENTRY.size))
            start = place + ENTRY.size + INODE.size + EXTENT.size * (0 if extents == UNMAPPED else extents)
            yield page[start : start + length], inode
            place += whole


def _one(reader: Reader, device: Device, inode: Inode) -> tuple[Any, ...]:
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
        content = hashlib.sha256(_content(reader, device, inode)).hexdigest()
    return (*kept, times, {name.decode(): value for name, value in reader.xattrs(inode.ino).items()}, content)


def _content(reader: Reader, device: Device, inode: Inode) -> bytes:
    found = reader.extents(inode.ino, 0, 1 << 16)
    if found is None:
        return b"".join(reader.read(inode.ino, place, PIECE) for place in range(0, inode.size, PIECE))
    content = bytearray(inode.size)
    assert found.end == inode.size
    for start, length, offset in found.extents:
        length = min(length, inode.size - start)
        piece = found.inline[offset - INLINE :][:length] if offset >= INLINE else device.read(offset, length)
        content[start : start + length] = piece
    return bytes(content)

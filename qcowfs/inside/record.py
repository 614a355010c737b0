"""The bytes in which a worker tells of inodes, directory entries and extents.

Used by the readers of file systems, which make them, and by client.py and the vfs, which take them apart;
`_records.pxd` has the same structures for compiled code. Little-endian, no padding. Whoever takes them apart trusts
nothing: a worker may have been taken over by the file system that it reads.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

__all__ = [
    "ENTRY",
    "EXTENT",
    "INODE",
    "INODE_BITS",
    "NO_CHANGE_TIME",
    "NO_XATTRS",
    "TYPES",
    "UNMAPPED",
    "Extent",
    "Inode",
    "pack_entry",
]

INODE = struct.Struct("<QQQqqqIIIIIIIIII")
ENTRY = struct.Struct("<QHHI")  # cookie of the next entry, length of the name, extents that follow, bytes of all
EXTENT = struct.Struct("<QQQ")

INODE_BITS = 40  # a reader's inode number is less than 2 ** 40, and not 0
NO_XATTRS = 1  # of `Inode.flags`: nobody needs to ask for extended attributes
NO_CHANGE_TIME = 2  # of `Inode.flags`: `ctime` is only what programs set, so that equal inodes do not prove equal files
TYPES = frozenset((stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK))
UNMAPPED = 0xFFFF  # instead of a count of extents: they are to be asked for


class Extent(NamedTuple):
    """Bytes of a file that are stored; what no extent covers reads as zeros. All in bytes.

    `start` is the place in the file, `offset` the place in the volume.
    """

    start: int
    length: int
    offset: int


class Inode(NamedTuple):
    """An inode as stat(2) tells it, in the order of INODE.

    `blocks` is in units of 512 bytes. `rdev` is as in st_rdev. Times are seconds since the epoch, before it negative,
    and nanoseconds >= 0. `error` is an errno if the inode cannot be read; then only `ino` and the type in `mode` count.
    """

    ino: int
    size: int
    blocks: int
    atime: int
    mtime: int
    ctime: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    nlink: int
    uid: int
    gid: int
    rdev: int
    flags: int
    error: int

    def pack(self) -> bytes:
        """Return the bytes of INODE."""
        return INODE.pack(*self)


def pack_entry(name: bytes, inode: bytes, cookie: int, extents: Sequence[Extent] | None = None) -> bytes:
    """Return the bytes of one entry of a directory: ENTRY, INODE, extents, the name, zeros up to 8 bytes.

    Args:
        name: 1 to 255 bytes; neither "." nor ".." is ever listed.
        inode: the bytes of INODE.
        cookie: where a listing goes on after this entry: larger than that of the entry before, and less than 2 ** 63.
        extents: all that the file has, if they are few; None: they are to be asked for.
    """
    packed = b"".join(EXTENT.pack(*extent) for extent in extents or ())
    length = -(-(ENTRY.size + len(inode) + len(packed) + len(name)) // 8) * 8
    count = UNMAPPED if extents is None else len(extents)
    return (ENTRY.pack(cookie, len(name), count, length) + inode + packed + name).ljust(length, b"\0")


def unpack_entries(page: bytes) -> Iterator[tuple[int, bytes, int, bytes | None]]:
    """Yield cookie, name, place of the bytes of INODE, and bytes of the EXTENTs (None: not told) of each entry.

    Args:
        page: entries whose lengths were checked (answer.py).
    """
    place = 0
    while place < len(page):
        cookie, name_length, extents, length = ENTRY.unpack_from(page, place)
        inode = place + ENTRY.size
        first = inode + INODE.size
        name = first + EXTENT.size * (0 if extents == UNMAPPED else extents)
        yield cookie, page[name : name + name_length], inode, None if extents == UNMAPPED else page[first:name]
        place += length


def fill(entries: Iterable[bytes], room: int) -> bytes:
    """Return as many of `entries` as go into `room` bytes, and at least one if there is one."""
    taken: list[bytes] = []
    size = 0
    for entry in entries:
        if taken and size + len(entry) > room:
            break
        taken.append(entry)
        size += len(entry)
    return b"".join(taken)

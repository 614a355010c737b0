"""What a worker's answers are checked for. Used by client.py. Pure.

A worker may have been taken over by what it reads: every count, length and name is looked at before it goes on, and
whatever breaks a rule raises ValueError.
"""

from __future__ import annotations

import stat
from typing import Any

from qcowfs import limits
from qcowfs._answer import check_entries
from qcowfs.inside.reader import DIGEST, INLINE, Extents, Layout, Unproven
from qcowfs.inside.record import EXTENT, INODE, INODE_BITS, TYPES, Extent
from qcowfs.inside.wire import EXTENTS, PAIR, SPAN

__all__ = ["entries", "extents", "inode", "layout", "link", "nothing", "number", "pairs", "unproven"]

LONGEST_NAME = 255
LONGEST_LINK = 4095  # PATH_MAX without its NUL: no symlink(2) makes a longer one
MAX_NANOSECONDS = 999_999_999
MAX_ERRNO = 4095
MAX_SIZE = (1 << 63) - 1


def number(body: bytes) -> int:
    """Return the inode number that `body` is."""
    found = int.from_bytes(body[:8], "little")
    if len(body) != 8 or not 0 < found < 1 << INODE_BITS:
        raise ValueError(f"inode number {found}")
    return found


def inode(body: bytes, ino: int) -> bytes:
    """Return `body` if it is the INODE of `ino`."""
    if len(body) != INODE.size or _inode(INODE.unpack(body)) != ino:
        raise ValueError("another inode than the one that was asked for")
    return body


def _inode(fields: tuple[Any, ...]) -> int:
    """Return the number of an inode whose fields may be passed on."""
    if not 0 < fields[0] < 1 << INODE_BITS or fields[1] > MAX_SIZE or fields[2] > MAX_SIZE >> 9:
        raise ValueError("an inode's number or size")
    if max(fields[6:9]) > MAX_NANOSECONDS or fields[15] > MAX_ERRNO:
        raise ValueError("an inode's nanoseconds or error")
    if stat.S_IFMT(fields[9]) not in TYPES or fields[9] > 0xFFFF:
        raise ValueError(f"an inode's mode {fields[9]:#o}")
    return int(fields[0])


def entries(body: bytes, cookie: int, volume_size: int) -> bytes:
    """Return `body` if it is nothing but entries of a directory that come after `cookie`."""
    check_entries(body, cookie, volume_size)
    return body


def layout(body: bytes, volume_size: int) -> Layout:
    """Return what is moved, all of it within the volume, in order and apart."""
    spans = body[DIGEST:]
    if len(body) < DIGEST or len(spans) % SPAN.size or len(spans) > limits.INSIDE_RANGES * SPAN.size:
        raise ValueError("a layout's length")
    moved = list(SPAN.iter_unpack(spans))
    before = 0
    for start, end in moved:
        if not before <= start < end <= volume_size:
            raise ValueError("a range's place in the volume")
        before = end
    return Layout(body[:DIGEST], moved)


def unproven(body: bytes, volume_size: int) -> Unproven | None:
    """Return entries of a directory and whether they are the same; None if that is not said of any."""
    if not body:
        return None
    if len(body) < 1 + DIGEST:
        raise ValueError("what may differ is cut off")
    told, page = body[1 : 1 + DIGEST], body[1 + DIGEST :]
    check_entries(page, 0, volume_size)
    return Unproven(page, body[:1] == b"\1", told if any(told) else b"")


def nothing(body: bytes) -> None:
    """Return if nothing is said."""
    if body:
        raise ValueError("an answer where none is")


def link(body: bytes) -> bytes:
    """Return `body` if it can be the target of a symbolic link."""
    if not 0 < len(body) <= LONGEST_LINK or b"\0" in body:
        raise ValueError("a target that no symbolic link can have")
    return body


def pairs(body: bytes) -> dict[bytes, bytes]:
    """Return names and values; every name is there once, and has no NUL."""
    found: dict[bytes, bytes] = {}
    place = 0
    while place < len(body):
        if len(body) - place < PAIR.size:
            raise ValueError("a pair that is cut off")
        name_length, value_length = PAIR.unpack_from(body, place)
        middle = place + PAIR.size + name_length
        name, place = body[place + PAIR.size : middle], middle + value_length
        if not 0 < name_length <= LONGEST_NAME or b"\0" in name or name in found or place > len(body):
            raise ValueError("a pair's name or length")
        found[name] = body[middle:place]
    return found


def extents(body: bytes, limit: int, volume_size: int) -> Extents | None:
    """Return the extents that `body` tells, `limit` at most, all of them within the volume or the inline bytes."""
    if len(body) < EXTENTS.size:
        raise ValueError("extents that are cut off")
    present, end, count = EXTENTS.unpack_from(body)
    if not present:
        return None
    inline = EXTENTS.size + count * EXTENT.size
    if count > min(limit, limits.INSIDE_EXTENTS) or inline > len(body) or end > MAX_SIZE:
        raise ValueError("a count of extents")
    found = [Extent(*extent) for extent in EXTENT.iter_unpack(body[EXTENTS.size : inline])]
    _extents(found, end, volume_size, len(body) - inline)
    return Extents(found, end, body[inline:])


def _extents(found: list[Extent], end: int, volume_size: int, inline_size: int) -> None:
    before = 0
    for start, length, offset in found:
        if start < before or length == 0 or start + length > end:
            raise ValueError("an extent's place in its file")
        stored = offset - INLINE if offset >= INLINE else offset
        if stored + length > (inline_size if offset >= INLINE else volume_size):
            raise ValueError("an extent's place in the volume")
        before = start + length

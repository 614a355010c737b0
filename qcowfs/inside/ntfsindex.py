"""The names in a directory of NTFS: an index of file names, some in the directory's record, the others in blocks.

Used by ntfs.py. The blocks are read in the order in which they lie, as ntfs-3g and Linux do, and not as the tree has
them: a tree may lead back to itself.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from qcowfs import limits
from qcowfs.inside.mft import Mft, Record, damaged, mended

__all__ = ["I30", "INDEX_ALLOCATION", "references"]

INDEX_ROOT, INDEX_ALLOCATION, BITMAP = 0x90, 0xA0, 0xB0
I30 = "$I30".encode("utf-16-le")  # the name of the attributes of an index of file names
LAST = 2  # flag of an entry
DOS = 2  # a short name: there is a long one too
NAME = 16 + 66  # where the name of an entry begins


def references(mft: Mft, directory: Record) -> Iterator[tuple[bytes, int]]:
    """Yield the names of a directory, in UTF-16, with the file references."""
    root = directory.find(INDEX_ROOT, I30)
    if root is None or root.value is None or len(root.value) < 32:
        raise damaged("a directory without an index")
    yield from _entries(root.value[16:])
    blocks, used = directory.find(INDEX_ALLOCATION, I30), directory.find(BITMAP, I30)
    if blocks is None:
        return
    size = int.from_bytes(root.value[8:12], "little")
    if used is None or size not in (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536):
        raise damaged("a directory whose index has blocks of an impossible size")
    count = blocks.size // size
    if count > limits.MAX_NTFS_INDEX_BLOCKS:
        raise damaged("a directory of too many blocks")
    bits = mft.read(used, 0, -(-count // 8))
    for number in range(min(count, len(bits) * 8)):
        if bits[number // 8] >> number % 8 & 1:
            yield from _entries(mended(mft.read(blocks, number * size, size), b"INDX")[24:])


def _entries(node: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield names and references from a header of index entries and what follows it."""
    at, end = struct.unpack_from("<II", node)
    end = min(end, len(node))
    while at + 16 <= end:
        reference, length, _key, flags = struct.unpack_from("<QHHH", node, at)
        if flags & LAST:
            return
        if length < NAME or at + length > end:
            break
        count, space = node[at + NAME - 2], node[at + NAME - 1]
        if space != DOS:
            yield node[at + NAME : at + length][: 2 * count], reference
        at += length
    raise damaged("an index that has no end")

"""A regular file of a tree as bytes that are read where they are stored: its extents, composed with its volume once.

Used by the vfs and the commands. Any thread; a file of many pieces takes some requests of its tree.
"""

from __future__ import annotations

import errno
import os

from qcowfs import limits
from qcowfs._mapped import Mapped
from qcowfs.errors import TreeFault
from qcowfs.inside.client import Tree
from qcowfs.inside.reader import INLINE, Extents
from qcowfs.inside.record import EXTENT

__all__ = ["Broken", "file_disk"]


class Broken:
    """A regular file of which only the beginning can be read: where the rest is stored cannot be told."""

    def __init__(self, beginning: Mapped, size: int, fault: TreeFault) -> None:
        self._beginning = beginning
        self._fault = fault
        self.virtual_size = size

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`, fewer only at the end of the file.

        Raises:
            QcowfsError: not all of them can be read.
        """
        length = max(0, min(length, self.virtual_size - offset))
        if length and offset + length > self._beginning.virtual_size:
            raise self._fault
        return self._beginning.pread(offset, length)

    def seek(self, offset: int, whence: int) -> int | None:
        """Return where the first data (SEEK_DATA) or hole (SEEK_HOLE) at `offset` or after it is; None: nowhere.

        What cannot be read counts as data, so that reading it is an error and not a hole.
        """
        known = self._beginning.virtual_size
        if offset >= self.virtual_size:
            return None
        if offset >= known:
            return offset if whence == os.SEEK_DATA else self.virtual_size
        found = self._beginning.seek(offset, whence)
        if whence == os.SEEK_DATA:
            return known if found is None else found
        return self.virtual_size if found is None or found >= known else found


def file_disk(tree: Tree, volume: Mapped, ino: int, size: int) -> Mapped | Broken | None:
    """Return the bytes of a regular file; None if it is not stored as it is, and `tree.read` makes its bytes.

    Args:
        tree: on `volume`.
        volume: the bytes of it.
        ino: the inode number in the tree.
        size: bytes of the file.

    Raises:
        TreeFault: not even where it begins can be told, or its extents contradict each other, the volume or `size`.
    """
    packed: list[bytes] = []
    inline = bytearray()
    place = 0
    fault: TreeFault | None = None
    while place < size and fault is None:
        try:
            found = tree.extents(ino, place, limits.INSIDE_EXTENTS)
        except TreeFault as error:
            if not place:
                raise
            fault = error
            continue
        if found is None and not packed:
            return None
        if found is None or not place < found.end <= size or len(inline) + len(found.inline) > limits.MAX_FILE_INLINE:
            raise _damaged(tree, ino)
        _check_count(tree, ino, packed, found)
        packed.append(_packed(found, len(inline)))
        inline += found.inline
        place = found.end
    try:
        disk = volume.part(place, b"".join(packed), bytes(inline))
    except ValueError as error:
        raise _damaged(tree, ino) from error
    return disk if fault is None else Broken(disk, size, fault)


def _check_count(tree: Tree, ino: int, packed: list[bytes], found: Extents) -> None:
    count = sum(map(len, packed)) // EXTENT.size + len(found.extents)
    if count > limits.MAX_FILE_EXTENTS or len(packed) == limits.MAX_FILE_QUESTIONS:
        raise TreeFault(tree.name, f"inode {ino}: the file is in too many pieces", errno.EFBIG)


def _packed(found: Extents, before: int) -> bytes:
    """Return the extents as EXTENTs, their inline bytes behind `before` others."""
    return b"".join(
        [EXTENT.pack(start, length, place + before if place >= INLINE else place) for start, length, place in found[0]]
    )


def _damaged(tree: Tree, ino: int) -> TreeFault:
    return TreeFault(tree.name, f"inode {ino}: the file's extents contradict its size or each other")

"""A regular file of a tree as bytes that are read where they are stored: its extents, composed with its volume once.

Used by the vfs and the commands. Any thread; a file of many pieces takes some requests of its tree.
"""

from __future__ import annotations

import errno

from qcowfs import limits
from qcowfs._mapped import Mapped
from qcowfs.errors import TreeFault
from qcowfs.inside.client import Tree
from qcowfs.inside.reader import INLINE, Extents
from qcowfs.inside.record import EXTENT

__all__ = ["file_disk"]

PAGES = limits.MAX_FILE_EXTENTS // limits.INSIDE_EXTENTS


def file_disk(tree: Tree, volume: Mapped, ino: int, size: int) -> Mapped | None:
    """Return the bytes of a regular file; None if it is not stored as it is, and `tree.read` makes its bytes.

    Args:
        tree: on `volume`.
        volume: the bytes of it.
        ino: the inode number in the tree.
        size: bytes of the file.

    Raises:
        TreeFault: its extents cannot be told, or contradict each other, the volume or `size`.
    """
    packed: list[bytes] = []
    inline = bytearray()
    place = 0
    while place < size:
        found = tree.extents(ino, place, limits.INSIDE_EXTENTS)
        if found is None and not packed:
            return None
        if found is None or not place < found.end <= size or len(inline) + len(found.inline) > limits.MAX_FILE_INLINE:
            raise _damaged(tree, ino)
        if len(packed) == PAGES:
            raise TreeFault(tree.name, f"inode {ino}: the file is in too many pieces", errno.EFBIG)
        packed.append(_packed(found, len(inline)))
        inline += found.inline
        place = found.end
    try:
        return volume.part(size, b"".join(packed), bytes(inline))
    except ValueError as error:
        raise _damaged(tree, ino) from error


def _packed(found: Extents, before: int) -> bytes:
    """Return the extents as EXTENTs, their inline bytes behind `before` others."""
    return b"".join(
        [EXTENT.pack(start, length, place + before if place >= INLINE else place) for start, length, place in found[0]]
    )


def _damaged(tree: Tree, ino: int) -> TreeFault:
    return TreeFault(tree.name, f"inode {ino}: the file's extents contradict its size or each other")

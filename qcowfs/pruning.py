"""What of two trees has to be listed: what their volumes prove to be the same in both is left out.

Used by file diff. One thread. A directory whose inode and blocks are the same has the same names for the same inodes.
All its entries but directories are left out whose inodes are the same, too; the readers know where inodes are.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from qcowfs import limits
from qcowfs._mapped import Mapped
from qcowfs.errors import QcowfsError, TreeFault
from qcowfs.inside.client import Tree
from qcowfs.inside.reader import Unproven
from qcowfs.inside.record import INODE, unpack_entries
from qcowfs.inside.walk import File
from qcowfs.stored import Range

__all__ = ["Left", "Pruning"]

BLOCK = 4096  # bytes that are passed over at once where they are equal
INODE_SIZE = 128  # bytes of the smallest ones: finer than that, nothing is told apart
Inodes = dict[bytes, bytes]


class Left(NamedTuple):
    """What is left of a directory in two trees: packed inodes by name."""

    old: Inodes
    new: Inodes


class Pruning:
    """What is proven of pairs of trees. A tree has one other at a time.

    Args:
        unproven: yields the ranges that are not proven equal of two volumes of the same size.
    """

    def __init__(self, unproven: Callable[[Mapped, Mapped], Iterable[Range]]) -> None:
        self._unproven = unproven
        self._known: dict[tuple[Tree, Tree], bool] = {}

    def left(self, old: File, new: File) -> Left | None:
        """Return what has to be looked at of a directory that is the same in both trees; None: list both.

        Names that are left out have the same inode, which is undamaged.
        """
        if old.inode.ino != new.inode.ino or not self._is_known(old, new):
            return None
        try:
            one = old.tree.unproven(old.inode.ino)
            if one is None:
                return None
            other = one if one.same and not one.map else new.tree.unproven(new.inode.ino)
        except TreeFault:  # who lists it hears why
            return None
        return Left(_inodes(one), _inodes(other)) if other is not None and one.map == other.map else None

    def _is_known(self, old: File, new: File) -> bool:
        pair = old.tree, new.tree
        if pair not in self._known:
            self._known[pair] = self._tell(old, new)
        return self._known[pair]

    def _tell(self, old: File, new: File) -> bool:
        """Tell two trees in what they may differ; return whether both make use of it."""
        if old.volume.virtual_size != new.volume.virtual_size:
            return False
        try:
            layouts = old.tree.layout(), new.tree.layout()
            if layouts[0].digest != layouts[1].digest:
                return False
            differing = _narrowed(old.volume, new.volume, self._unproven(old.volume, new.volume))
            spans = _joined([*differing, *layouts[0].moved, *layouts[1].moved])
            if len(spans) > limits.INSIDE_RANGES:
                return False
            packed = b"".join(struct.pack("<QQ", *span) for span in spans)
            old.tree.suspect(packed)
            new.tree.suspect(packed)
        except TreeFault:
            return False
        return True


def _inodes(found: Unproven) -> Inodes:
    page = found.entries
    return {name: page[place : place + INODE.size] for _, name, place, _ in unpack_entries(page)}


def _narrowed(old: Mapped, new: Mapped, ranges: Iterable[Range]) -> Iterator[tuple[int, int]]:
    """Yield start and end of what may differ, the first of it compared: a cluster has the inodes of many files."""
    left = limits.MAX_NARROWED
    for start, length in ranges:
        if length > left:
            yield start, start + length
            continue
        left -= length
        try:
            one, other = old.pread(start, length), new.pread(start, length)
        except QcowfsError:
            yield start, start + length
            continue
        yield from ((start + first, start + end) for first, end in _differing(one, other))


def _differing(one: bytes, other: bytes) -> Iterator[tuple[int, int]]:
    length = len(one)
    for block in range(0, length, BLOCK):
        if one[block : block + BLOCK] != other[block : block + BLOCK]:
            for place in range(block, min(block + BLOCK, length), INODE_SIZE):
                if one[place : place + INODE_SIZE] != other[place : place + INODE_SIZE]:
                    yield place, min(place + INODE_SIZE, length)


def _joined(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same in order, without overlaps."""
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found

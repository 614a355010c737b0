"""Files with several hard links: where the first of them was restored, until all were.

Used by restorer.py. One thread. Directories that were left are opened again name by name, without following links.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

from qcowfs import limits
from qcowfs.inside.walk import Place
from qcowfs.restore.directory import FLAGS, Directory
from qcowfs.restore.trail import Trail

__all__ = ["Links"]


class _First:
    """The restored file that further links lead to; `left` of them are to come."""

    __slots__ = ("above", "ino", "left", "name")

    def __init__(self, above: Trail, name: bytes, ino: int, left: int) -> None:
        self.above = above
        self.name = name
        self.ino = ino
        self.left = left


class Links:
    """The files of one source whose further links may come.

    Args:
        top: descriptor of the directory that the first name of each Trail is in.
    """

    def __init__(self, top: int) -> None:
        self._top = top
        self._known: dict[tuple[str, int], _First] = {}
        self._opened: tuple[Trail, int] | None = None

    def close(self) -> None:
        """Close what was opened."""
        if self._opened is not None:
            os.close(self._opened[1])
            self._opened = None

    def note(self, place: Place, above: Trail, directory: Directory, name: bytes) -> bool:
        """Remember that `place` was restored as `name`; return whether there was room for that."""
        if place.inode.nlink < 2 or not place.inode.ino:
            return True
        if len(self._known) == limits.MAX_RESTORED_LINKS:
            return False
        ino = os.stat(name, dir_fd=directory.descriptor, follow_symlinks=False).st_ino
        self._known[place.name, place.inode.ino] = _First(above, name, ino, place.inode.nlink - 1)
        return True

    def link(
        self, place: Place, above: Trail, directory: Directory, put: Callable[[Callable[[bytes], None]], None]
    ) -> bool:
        """Make a link to where `place` was restored already; return whether that was so, and worked.

        Args:
            above: of `directory`, in which the link is to be made.
            put: gives the link its name with a function that makes one.

        Raises:
            Occupied: something has the name.
        """
        first = self._known.get((place.name, place.inode.ino))
        if first is None:
            return False
        at = directory.descriptor if first.above is above else self._reopened(first.above)
        if at is None or not _is(at, first):
            return False
        source = at  # for the closure: it is an int from here on

        def make(name: bytes) -> None:
            os.link(first.name, name, src_dir_fd=source, dst_dir_fd=directory.descriptor, follow_symlinks=False)

        put(make)
        first.left -= 1
        if first.left == 0:
            del self._known[place.name, place.inode.ino]
        return True

    def _reopened(self, trail: Trail) -> int | None:
        """Return a descriptor of a directory that was written into; None if this user cannot go there any more."""
        if self._opened is not None and self._opened[0] is trail:
            return self._opened[1]
        self.close()
        at = os.dup(self._top)
        for name in trail.names()[1:]:
            below = -1
            with suppress(OSError):
                below = os.open(name, FLAGS | os.O_PATH, dir_fd=at)
            os.close(at)
            if below < 0:
                return None
            at = below
        self._opened = (trail, at)
        return at


def _is(directory: int, first: _First) -> bool:
    """Tell whether the name still has the file that was restored: others may write there."""
    with suppress(OSError):
        return os.stat(first.name, dir_fd=directory, follow_symlinks=False).st_ino == first.ino
    return False

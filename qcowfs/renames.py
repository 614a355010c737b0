"""Which of the differences of two trees are renames: what was removed and what was added is the same inode.

Used by the commands. Pure but for what the comparison of a pair reads. Inode numbers are used again, so that a number
alone proves nothing: what says more is how old the thing is, where it is stored, or what is in it.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence

from qcowfs import limits
from qcowfs.filediff import ADDED, REMOVED, RENAMED, Change, Comparison, is_directory
from qcowfs.inside.record import Inode
from qcowfs.inside.walk import File, join

__all__ = ["with_renames"]


def with_renames(changes: Iterator[Change], comparison: Comparison, too_many: Callable[[], None]) -> Iterator[Change]:
    """Yield `changes`, what was renamed as such, and what differs in it under its new path; by path.

    Args:
        changes: of one tree, in the order of a walk.
        comparison: that made them.
        too_many: is called if there are so many that renames are not looked for.
    """
    held: list[Change] = []
    for change in changes:
        held.append(change)
        if len(held) > limits.MAX_RENAME_CHANGES:
            too_many()
            yield from held
            yield from changes
            return
    if {ADDED, REMOVED} <= {change.kind for change in held}:
        held = _Renames(held, comparison).found()
    yield from held


class _Renames:
    """The differences of one tree, among which renames are found.

    What is added or removed is there with all that is in it, so that a directory's entries need not be listed again.
    """

    def __init__(self, changes: Sequence[Change], comparison: Comparison) -> None:
        self._comparison = comparison
        self._removed = {change.path: change for change in changes if change.kind == REMOVED}
        self._added = {change.path: change for change in changes if change.kind == ADDED}
        self._others = [change for change in changes if change.kind not in (ADDED, REMOVED)]
        self._names = _names(self._removed), _names(self._added)
        self._candidates: dict[int, list[bytes]] = {}
        for path, change in self._removed.items():
            if isinstance(change.old, File):
                self._candidates.setdefault(change.old.inode.ino, []).append(path)

    def found(self) -> list[Change]:
        """Return all differences, by path."""
        # Directories first: what was renamed with its directory is no rename of its own, even if a link of it is there.
        for directories in (True, False):
            for path in [path for path, change in self._added.items() if is_directory(change.new) == directories]:
                self._find(path)
        left = [*self._others, *self._removed.values(), *self._added.values()]
        return sorted(left, key=lambda change: change.path.split(b"/"))

    def _find(self, path: bytes) -> None:
        """Find what the added `path` was before."""
        change = self._added.get(path)
        if change is None or not isinstance(change.new, File):
            return
        for before in self._candidates.get(change.new.inode.ino, ()):
            candidate = self._removed.get(before)
            if candidate is not None and self._is_same(candidate, change):
                self._others.append(Change(RENAMED, path, candidate.old, change.new, (), before))
                self._settle(before, path)
                return

    def _is_same(self, old: Change, new: Change) -> bool:
        """Tell whether a removed thing is the added one that has its number."""
        assert old.old is not None
        assert new.new is not None
        one, other = old.old.inode, new.new.inode
        if stat.S_IFMT(one.mode) != stat.S_IFMT(other.mode) or one.error or other.error:
            return False
        if _age(one) == _age(other):
            return True
        if stat.S_ISDIR(one.mode):
            return self._half_the_same(old.path, new.path)
        # Without a byte that is stored, two files of one size are always in the same places.
        stored = stat.S_ISREG(one.mode) and one.blocks and other.blocks
        return bool(stored) and self._comparison.same_stored(old.old, new.new)

    def _half_the_same(self, old: bytes, new: bytes) -> bool:
        before, after = self._names[0].get(old, {}), self._names[1].get(new, {})
        common = len(before.items() & after.items())
        return common > 0 and 2 * common >= max(len(before), len(after))

    def _settle(self, old: bytes, new: bytes) -> None:
        """Compare what was renamed, and all that is in both, under the new path."""
        waiting = [(old, new)]
        while waiting:
            before, after = waiting.pop()
            one, other = self._removed.pop(before).old, self._added.pop(after).new
            self._others += self._comparison.pair(after, one, other)
            for name in self._names[0].get(before, {}).keys() & self._names[1].get(after, {}).keys():
                inner = join(before, name), join(after, name)
                if inner[0] in self._removed and inner[1] in self._added:
                    waiting.append(inner)


def _age(inode: Inode) -> tuple[int, int, int]:
    """Return what a rename does not change and another inode of the same number hardly has; a directory's size may."""
    return 0 if stat.S_ISDIR(inode.mode) else inode.size, inode.mtime, inode.mtime_ns


def _names(changes: dict[bytes, Change]) -> dict[bytes, dict[bytes, int]]:
    """Return the names and inode numbers that are in each directory, by its path."""
    found: dict[bytes, dict[bytes, int]] = {}
    for path, change in changes.items():
        parent, _, name = path.rpartition(b"/")
        place = change.old or change.new
        found.setdefault(parent, {})[name] = place.inode.ino if place is not None else 0
    return found

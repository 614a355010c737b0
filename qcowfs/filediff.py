"""What differs between two trees: both are walked side by side, and contents are read only where nothing else decides.

Used by the commands. One thread. Differences come in the order of a walk: a directory before what is in it, by name.
"""

from __future__ import annotations

import errno
import functools
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple, Protocol

from qcowfs import _compare, limits
from qcowfs._mapped import Mapped
from qcowfs.errors import QcowfsError, TreeFault
from qcowfs.inside.pointfiles import RawVolume
from qcowfs.inside.record import NO_CHANGE_TIME, NO_XATTRS, Inode
from qcowfs.inside.walk import File, Place, join, unpacked
from qcowfs.pruning import Pruning
from qcowfs.stored import FileOf, same_bytes, same_place, unproven

__all__ = [
    "ADDED",
    "METADATA",
    "MODIFIED",
    "NEW",
    "OLD",
    "REMOVED",
    "RENAMED",
    "TYPE",
    "Change",
    "Comparison",
    "Tell",
    "is_directory",
]

ADDED, REMOVED, MODIFIED, METADATA, TYPE, RENAMED = "added", "removed", "modified", "metadata", "type", "renamed"
OLD, NEW = 0, 1  # sides
CONTENTS = "contents"
SAME = ("size", "mtime", "mtime_ns", "ctime", "ctime_ns", "mode", "uid", "gid", "rdev", "ino")

Pair = tuple[bytes, Place | None, Place | None]


class Tell(Protocol):
    """Is told what is damaged.

    Args:
        side: OLD or NEW; None: both or unknown.
        path: in the directory of a point.
        what: is wrong there.
        hint: what a person can do.
    """

    def __call__(self, side: int | None, path: bytes, what: str, *, hint: str | None = None) -> None: ...


class Change(NamedTuple):
    """A difference.

    Attributes:
        kind: ADDED, ...
        path: of the new one; where there is none, of the old one.
        old, new: None where there is none, or none that can be looked at.
        differs: of what is on both sides: "contents", "type", "mode", "uid", "gid", "device", "mtime", "xattrs".
        old_path: of what was RENAMED.
    """

    kind: str
    path: bytes
    old: Place | None
    new: Place | None
    differs: tuple[str, ...] = ()
    old_path: bytes | None = None


@dataclass(slots=True)
class _Listing:
    """A directory's packed inodes by name, and whether these are all."""

    inodes: dict[bytes, bytes] = field(default_factory=dict)
    whole: bool = True


class Comparison:
    """A comparison of places of two points.

    Args:
        file_of: tells which file the layers of disks are.
        checksum: do not believe equal inodes: compare the contents of all files.
        tell: is told what is damaged; the rest is compared.
    """

    def __init__(self, file_of: FileOf, *, checksum: bool, tell: Tell) -> None:
        self._proofs = file_of, functools.cache(_compare.Comparison)
        self._checksum = checksum
        self._pruning = Pruning(lambda old, new: unproven(old, new, *self._proofs))
        self.tell = tell
        self._seen: tuple[set[tuple[str, int]], set[tuple[str, int]]] = (set(), set())
        self._entered = 0

    def compare(self, path: bytes, old: Place | None, new: Place | None) -> Iterator[Change]:
        """Yield what differs between two places and all that is below them.

        Args:
            path: of both.
            old, new: None where there is none; not both.
        """
        if isinstance(old, File) and isinstance(new, File) and self._is_proven(old, new):
            return
        levels: list[Iterator[Pair]] = [iter([(path, old, new)])]
        while levels:
            pair = next(levels[-1], None)
            if pair is None:
                levels.pop()
                continue
            yield from self.pair(*pair)
            if is_directory(pair[1]) or is_directory(pair[2]):
                levels.append(self._below(*pair, len(levels)))

    def pair(self, path: bytes, old: Place | None, new: Place | None) -> Iterator[Change]:
        """Yield what differs between two places themselves."""
        if old is None or new is None:
            yield Change(ADDED if old is None else REMOVED, path, old, new)
        elif stat.S_IFMT(old.inode.mode) != stat.S_IFMT(new.inode.mode):
            yield Change(TYPE, path, old, new, ("type",))
        elif not (old.inode.error or new.inode.error):
            differs = self._differences(path, old, new)
            if differs:
                yield Change(MODIFIED if CONTENTS in differs else METADATA, path, old, new, differs)

    def same_stored(self, old: Place, new: Place) -> bool:
        """Tell whether two files are the same bytes in the same places; False where that cannot be told."""
        try:
            one, other = old.stored(), new.stored()
        except QcowfsError:
            return False
        return one is not None and other is not None and same_place(one, other, *self._proofs)

    def same_contents(self, old: Place, new: Place) -> bool:
        """Tell whether two regular files, or two symbolic links, hold the same.

        Raises:
            QcowfsError: one of them cannot be read.
        """
        if stat.S_ISLNK(old.inode.mode):
            return old.target(old.inode) == new.target(new.inode)
        if old.inode.size != new.inode.size:
            return False
        one, other = old.stored(), new.stored()
        if one is not None and other is not None:
            return same_bytes(one, other, *self._proofs)
        if old.inode.size > limits.MAX_READ_FILE:
            raise TreeFault(old.name, f"too large to be compared: {old.inode.size} bytes", errno.EFBIG)
        return all(a == b for a, b in zip_longest(old.chunks(), new.chunks()))

    def same_volume(self, old: Mapped | None, new: Mapped | None) -> bool:
        """Tell whether two volumes are stored in the same places; False where there are no bytes."""
        return old is not None and new is not None and same_place(old, new, *self._proofs)

    def _is_proven(self, old: File, new: File) -> bool:
        """Tell whether two places are the same in volumes that are the same: then all below is."""
        return old.inode.ino == new.inode.ino and self.same_volume(old.volume, new.volume)

    def _below(self, path: bytes, old: Place | None, new: Place | None, depth: int) -> Iterator[Pair]:
        """Yield the pairs in a directory that need to be looked at; one of the two may be none."""
        here = self._lists(path, old, new, depth)
        before, after = here[OLD].inodes, here[NEW].inodes
        for name in sorted(before.keys() | after.keys()):
            one, other = before.get(name), after.get(name)
            if (one is None and not here[OLD].whole) or (other is None and not here[NEW].whole):
                continue  # it may be there, too: the trouble was told
            if one == other and one is not None and self._settled(one):
                continue
            yield join(path, name), _child(old, name, one), _child(new, name, other)

    def _settled(self, inode: bytes) -> bool:
        """Tell whether nothing is to be asked of what has this packed inode on both sides."""
        found = unpacked((b"", inode))[1]
        if stat.S_ISDIR(found.mode):
            return False
        return bool(found.error) or not (self._checksum or found.flags & NO_CHANGE_TIME)

    def _lists(self, path: bytes, old: Place | None, new: Place | None, depth: int) -> tuple[_Listing, _Listing]:
        """Return what of both has to be looked at."""
        entered = self._enters(OLD, path, old, depth), self._enters(NEW, path, new, depth)
        if all(entered) and not self._checksum and isinstance(old, File) and isinstance(new, File):
            left = self._pruning.left(old, new)
            if left is not None:
                return _Listing(left.old), _Listing(left.new)
        return (
            self._list(OLD, path, old) if entered[OLD] else _Listing(whole=not is_directory(old)),
            self._list(NEW, path, new) if entered[NEW] else _Listing(whole=not is_directory(new)),
        )

    def _enters(self, side: int, path: bytes, place: Place | None, depth: int) -> bool:
        """Tell whether there is a directory that is to be listed."""
        if place is None or not is_directory(place):
            return False
        why = self._refuses(side, place, depth)
        if why:
            self.tell(side, path, why)
        return not why

    def _list(self, side: int, path: bytes, place: Place | None) -> _Listing:
        assert place is not None
        try:
            found = place.children()
        except TreeFault as fault:
            self.tell(side, path, fault.what)
            return _Listing(whole=False)
        for name, what in found.troubles:
            self.tell(side, join(path, name), what)
        return _Listing(dict(found.entries), all(trouble.name for trouble in found.troubles))

    def _refuses(self, side: int, place: Place, depth: int) -> str:
        """Return why a directory is not entered, "" if it is."""
        self._entered += 1
        key = place.name, place.inode.ino
        if key in self._seen[side]:
            return "the directory is also in another place, or in itself"
        if depth > limits.MAX_WALK_DEPTH or self._entered > 2 * limits.MAX_WALKED_DIRECTORIES:
            return "not listed: there are too many directories, or too deep ones"
        self._seen[side].add(key)
        return ""

    def _differences(self, path: bytes, old: Place, new: Place) -> tuple[str, ...]:
        one, other = old.inode, new.inode
        settled = bool(one.ino) and all(getattr(one, name) == getattr(other, name) for name in SAME)
        if settled and not self._checksum and not one.flags & NO_CHANGE_TIME:
            return ()
        has_contents = stat.S_ISREG(one.mode) or stat.S_ISLNK(one.mode)
        try:
            found = [CONTENTS] if has_contents and not self.same_contents(old, new) else []
            if not settled and not isinstance(old, RawVolume):
                found += _metadata(one, other)
                found += ["xattrs"] if not _same_xattrs(old, new) else []
        except QcowfsError as error:
            self.tell(None, path, error.what if isinstance(error, TreeFault) else str(error))
            return ()
        return tuple(found)


def is_directory(place: Place | None) -> bool:
    """Tell whether there is something to be listed in `place`."""
    return place is not None and stat.S_ISDIR(place.inode.mode) and not place.inode.error


def _child(directory: Place | None, name: bytes, inode: bytes | None) -> Place | None:
    if directory is None or inode is None:
        return None
    return directory.child(*unpacked((name, inode)))


def _metadata(old: Inode, new: Inode) -> Iterator[str]:
    if old.mode != new.mode:
        yield "mode"
    if old.uid != new.uid:
        yield "uid"
    if old.gid != new.gid:
        yield "gid"
    if old.rdev != new.rdev:
        yield "device"
    # A directory's follows from what was added and removed in it, and that is told.
    if (old.mtime, old.mtime_ns) != (new.mtime, new.mtime_ns) and not stat.S_ISDIR(old.mode):
        yield "mtime"


def _same_xattrs(old: Place, new: Place) -> bool:
    """Tell whether two places have the same extended attributes; they are asked for only if they can differ."""
    if not isinstance(old, File) or not isinstance(new, File):
        return True
    one, other = old.inode, new.inode
    if one.flags & other.flags & NO_XATTRS:
        return True
    if (one.ino, one.ctime, one.ctime_ns) == (other.ino, other.ctime, other.ctime_ns):
        return True
    return old.tree.xattrs(one.ino) == new.tree.xattrs(other.ino)

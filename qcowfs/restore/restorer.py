"""Walks a tree of a point and makes it anew in a directory: directories first, their own metadata last.

Used by the command. One thread. Memory does not grow with what a directory holds, but for the names of the directories
in it. What the tree says is not trusted; see walk.py.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

from qcowfs import limits
from qcowfs.errors import QcowfsError, TreeFault, printable
from qcowfs.inside.walk import Place
from qcowfs.restore import content
from qcowfs.restore.directory import Directory
from qcowfs.restore.draft import PROC, draft
from qcowfs.restore.ledger import Ledger
from qcowfs.restore.links import Links
from qcowfs.restore.metadata import NO_ROOM, Metadata
from qcowfs.restore.trail import Trail

__all__ = ["NoRoom", "Restorer"]

BLOCK = 512  # bytes: the unit of Inode.blocks
DEVICES = (stat.S_IFCHR, stat.S_IFBLK)


class NoRoom(QcowfsError):
    """{what}"""


@dataclass(slots=True)
class _Level:
    """A directory of the tree that is being restored.

    Attributes:
        below: name and inode number of the directories in it, which come when all else in it was restored.
    """

    place: Place
    trail: Trail
    directory: Directory
    below: list[tuple[bytes, int]] = field(default_factory=list)


class Restorer:
    """Restores one source after the other.

    Args:
        ledger: is told what becomes of everything.
        check: is called again and again, and raises what is to end the restore.
        verify: compare what was written with the source before it gets its name.
        keep_damaged: restore files of which some cannot be read, with zeros there.
    """

    def __init__(
        self, ledger: Ledger, check: Callable[[], None], *, verify: bool = False, keep_damaged: bool = False
    ) -> None:
        self._ledger = ledger
        self._check = check
        self._verify = verify
        self._keep_damaged = keep_damaged
        self._metadata = Metadata(ledger)
        self._seen: dict[str, set[int]] = {}
        self._count = 0
        self._links = Links(-1)

    def restore(self, place: Place, directory: Directory, name: bytes, shown: bytes) -> None:
        """Restore `place` as `name` in `directory`; with no name, what is in `place`.

        Args:
            shown: how a person calls `directory`; b"": not at all, only what is in it.

        Raises:
            NoRoom: the file system is full, or cannot be written.
        """
        top = Trail(None, shown.rstrip(b"/") + b"/" if shown else b"")
        self._seen = {place.name: {place.inode.ino}}
        self._count = 0
        self._links = Links(directory.descriptor)
        try:
            if not name:
                self._restore_tree(_Level(place, top, directory))
            elif stat.S_ISDIR(place.inode.mode):
                level = self._entered(Trail(top, name), directory, lambda: place)
                if level is not None:
                    self._restore_tree(level)
            else:
                self._restore_one(place, top, directory, name)
        finally:
            self._links.close()

    def _entered(self, trail: Trail, directory: Directory, find: Callable[[], Place]) -> _Level | None:
        """Return a directory below `directory`, None if it cannot be restored."""
        with self._told(trail):
            return _Level(find(), trail, directory.enter(trail.name))
        return None

    def _restore_tree(self, first: _Level) -> None:
        levels = [first]
        try:
            self._fill(first)
            while levels:
                level = levels[-1]
                if level.below:
                    self._descend(levels, *level.below.pop())
                    continue
                if level.directory.ours:
                    self._finish(level)
                levels.pop()
                if levels:
                    level.directory.close()
        finally:
            for level in levels[1:]:
                level.directory.close()
            if first.trail.above is not None:
                first.directory.close()

    def _fill(self, level: _Level) -> None:
        """Restore all that is in a directory but for the directories, which are noted."""
        for name, child in self._entries(level):
            self._check()
            why = child.trouble()
            if why:
                self._ledger.failed(Trail(level.trail, name).path(), why)
            elif stat.S_ISDIR(child.inode.mode):
                self._note(level, name, child)
            else:
                self._restore_one(child, level.trail, level.directory, name)
        level.below.reverse()

    def _entries(self, level: _Level) -> Iterator[tuple[bytes, Place]]:
        with self._told(level.trail):
            yield from level.place.entries()

    def _note(self, level: _Level, name: bytes, child: Place) -> None:
        known = self._seen.setdefault(child.name, set())
        self._count += 1
        if child.inode.ino in known:
            what = "not restored: the directory is also in another place, or in itself"
            self._ledger.failed(Trail(level.trail, name).path(), what)
        elif self._count > limits.MAX_WALKED_DIRECTORIES:
            self._ledger.failed(Trail(level.trail, name).path(), "not restored: there are too many directories")
        else:
            known.add(child.inode.ino)
            level.below.append((name, child.inode.ino))

    def _descend(self, levels: list[_Level], name: bytes, ino: int) -> None:
        level = levels[-1]
        trail = Trail(level.trail, name)
        self._check()
        if len(levels) > limits.MAX_WALK_DEPTH:
            self._ledger.failed(trail.path(), "not restored: the directories are too deep")
            return
        below = self._entered(trail, level.directory, lambda: level.place.again(name, ino))
        if below is not None:
            levels.append(below)
            self._fill(below)

    def _finish(self, level: _Level) -> None:
        """Give a directory its metadata, when nothing in it will change its time any more."""
        done = False
        with self._told(level.trail):
            xattrs = self._xattrs(level.place, level.trail)
            handle = level.directory.descriptor
            lost = self._metadata.apply(handle, level.place.inode, xattrs, level.trail)
            if self._verify:
                self._agree(self._metadata.differences(handle, level.place.inode, xattrs, lost))
            done = True
        if done:
            self._ledger.restored(level.trail.path(), level.place, directory=True)

    def _restore_one(self, place: Place, above: Trail, directory: Directory, name: bytes) -> None:
        """Restore anything but a directory; what is wrong with it is told, and the rest goes on."""
        trail = Trail(above, name)
        done = False
        with self._told(trail):
            done = self._anew(place, trail, directory, name)
        if done:
            self._ledger.restored(trail.path(), place)

    def _anew(self, place: Place, trail: Trail, directory: Directory, name: bytes) -> bool:
        """Make a link to a file that was restored, or the file; return whether this user may have it."""
        assert trail.above is not None
        if place.inode.nlink > 1 and self._linked(place, trail, directory, partial(directory.put, name)):
            return True
        if stat.S_ISREG(place.inode.mode):
            self._write(place, trail, directory, name)
        elif not self._make(place, trail, directory, name):
            return False
        if not self._links.note(place, trail.above, directory, name):
            text = "from here on, further hard links become files of their own: there are too many"
            self._ledger.warn("links", trail.path(), text)
        return True

    def _linked(
        self, place: Place, trail: Trail, directory: Directory, put: Callable[[Callable[[bytes], None]], None]
    ) -> bool:
        assert trail.above is not None
        try:
            return self._links.link(place, trail.above, directory, put)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            text = f"a hard link becomes a file of its own: {error.strerror}"
            self._ledger.warn(f"link {error.errno}", trail.path(), text)
        return False

    def _write(self, place: Place, trail: Trail, directory: Directory, name: bytes) -> None:
        """Restore a regular file: bytes, metadata, and the name at last."""
        damage = content.Damage()
        directory.check_room(name)
        try:
            self._draw_up(place, trail, directory, name, damage)
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            raise NoRoom(f"{printable(trail.path())}: {error.strerror}{_missing(place, directory, error)}") from error
        if damage.ranges:
            self._ledger.failed(trail.path(), f"restored with zeros: {damage}")

    def _draw_up(self, place: Place, trail: Trail, directory: Directory, name: bytes, damage: content.Damage) -> None:
        with draft(directory) as made:
            count = self._copy(place, made.descriptor, damage, trail)
            if self._verify and not content.compare(place, made.descriptor):  # before it has its time of access
                raise QcowfsError("not restored: what was written reads back otherwise")
            directory.disinherit(made.descriptor)
            xattrs = self._xattrs(place, trail)
            lost = self._metadata.apply(made.descriptor, place.inode, xattrs, trail)
            if damage.ranges and not self._keep_damaged:
                raise QcowfsError(
                    f"not restored: {damage}", hint="--keep-damaged restores such files, with zeros there"
                )
            if self._verify:
                self._agree(self._metadata.differences(made.descriptor, place.inode, xattrs, lost))
            directory.put(name, made.publish)
        self._ledger.bytes += count

    def _copy(self, place: Place, descriptor: int, damage: content.Damage, trail: Trail) -> int:
        """Write the bytes of a file; return how many there are, without holes."""
        path = trail.path()
        count = 0

        def moved(written: int) -> None:
            nonlocal count
            self._check()
            self._ledger.moved(path, written)
            count += written

        content.write(place, descriptor, damage, moved)
        return count

    def _make(self, place: Place, trail: Trail, directory: Directory, name: bytes) -> bool:
        """Restore a symbolic link, a device, a pipe or a socket; return whether this user may have it."""
        kind = stat.S_IFMT(place.inode.mode)
        target = place.target(place.inode) if kind == stat.S_IFLNK else b""
        xattrs = self._xattrs(place, trail)

        def make(at: bytes) -> None:
            if kind == stat.S_IFLNK:
                os.symlink(target, at, dir_fd=directory.descriptor)
            else:
                os.mknod(at, kind, place.inode.rdev, dir_fd=directory.descriptor)
            try:
                self._equip(place, trail, directory, at, xattrs)
            except BaseException:
                os.unlink(at, dir_fd=directory.descriptor)
                raise

        try:
            directory.put(name, make)
        except PermissionError:
            if kind not in DEVICES or os.geteuid() == 0:
                raise
            self._ledger.skipped(trail.path(), "devices can only be made by root")
            return False
        return True

    def _equip(self, place: Place, trail: Trail, directory: Directory, at: bytes, xattrs: dict[bytes, bytes]) -> None:
        descriptor = os.open(at, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory.descriptor)
        try:
            handle = f"{PROC}/{descriptor}"
            made = os.stat(handle)
            if stat.S_IFMT(made.st_mode) != stat.S_IFMT(place.inode.mode) or made.st_nlink != 1:
                raise QcowfsError("not restored: somebody put another file in its place")  # it would get this owner
            directory.disinherit(handle)
            lost = self._metadata.apply(handle, place.inode, xattrs, trail)
            if self._verify:
                self._agree(self._metadata.differences(handle, place.inode, xattrs, lost))
        finally:
            os.close(descriptor)

    def _xattrs(self, place: Place, trail: Trail) -> dict[bytes, bytes]:
        """Return the attributes; a file without them is better than none."""
        try:
            return place.xattrs()
        except TreeFault as fault:
            self._ledger.failed(trail.path(), f"restored without its extended attributes: {fault.what}")
        return {}

    def _agree(self, differences: list[str]) -> None:
        if differences:
            raise QcowfsError(f"it has other {', '.join(differences)} than the guest's")

    @contextmanager
    def _told(self, trail: Trail) -> Iterator[None]:
        """Tell what goes wrong within the context, unless there is no use in going on.

        What is told prints, and whatever goes wrong with that is the command's: it does not happen in the context.
        """
        try:
            yield
        except NoRoom:
            raise
        except QcowfsError as error:
            self._ledger.failed(trail.path(), getattr(error, "what", str(error)), error.hint)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise NoRoom(f"{printable(trail.path())}: {error.strerror}") from error
            self._ledger.failed(trail.path(), error.strerror or str(error))


def _missing(place: Place, directory: Directory, error: OSError) -> str:
    """Return how much more room a file needs than there is, now that the half of it is gone."""
    room = os.fstatvfs(directory.descriptor)
    missing = place.inode.blocks * BLOCK - room.f_bavail * room.f_frsize
    if error.errno != errno.ENOSPC or missing <= 0:
        return ""
    return f": it needs {missing} bytes more than there are"

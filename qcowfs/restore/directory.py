"""A directory of this machine that is written into by its descriptor: nothing there is followed, nothing is replaced
unless a person asked for it.

Used by the other files of this room. One thread; others may change the directory meanwhile.
"""

from __future__ import annotations

import enum
import errno
import itertools
import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress

from qcowfs.errors import QcowfsError

__all__ = ["Directory", "Existing", "Occupied"]

FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
PRIVATE = 0o700  # until all is in it, and its own mode comes
INHERITED = ("system.posix_acl_default", "system.posix_acl_access")
BACKUP = re.compile(rb"(.+)\.~([1-9][0-9]{0,17})~", re.DOTALL)
_numbers = itertools.count(1)


class Existing(enum.Enum):
    """What becomes of a file that is where another is to be restored."""

    KEPT = "kept"
    REPLACED = "replaced"
    RENAMED = "renamed"


class Occupied(QcowfsError):
    """{what}"""

    errno = errno.EEXIST


class Directory:
    """An open directory.

    Args:
        descriptor: of it; it is closed with this.
        new: this run made it, so whatever is in it was made by this run.
        existing: what becomes of files that are there.
    """

    def __init__(self, descriptor: int, *, new: bool, existing: Existing) -> None:
        self.descriptor = descriptor
        self.new = new
        self.existing = existing
        self._made: set[int] = set()  # inode numbers; kept only where something may be replaced
        self._backups: dict[bytes, int] | None = None
        self._passes_on = not new and INHERITED[0] in _xattr_names(descriptor)

    @property
    def ours(self) -> bool:
        """Whether its own owner, mode, times and attributes may be changed."""
        return self.new or self.existing is Existing.REPLACED

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)

    def enter(self, name: bytes) -> Directory:
        """Return the directory `name` in this one, made if there is none; one that is there is used.

        Raises:
            Occupied: something else is there.
            OSError: it cannot be made.
        """
        try:
            os.mkdir(name, PRIVATE, dir_fd=self.descriptor)
        except FileExistsError:
            there = self._there(name)
            if there is not None and stat.S_ISDIR(there.st_mode):
                return Directory(self.opened(name), new=False, existing=self.existing)
            if self.existing is not Existing.RENAMED:
                raise Occupied("a file that is no directory is there already", hint=_RENAMES) from None
            self._back_up(name)
            os.mkdir(name, PRIVATE, dir_fd=self.descriptor)
        entered = Directory(self.opened(name), new=True, existing=self.existing)
        self.disinherit(entered.descriptor)
        self._note(name)
        return entered

    def opened(self, name: bytes) -> int:
        """Return a descriptor of the directory `name`, which no symbolic link leads to."""
        return os.open(name, FLAGS, dir_fd=self.descriptor)

    def check_room(self, name: bytes) -> None:
        """See before much work is done for `name` that it can be put there.

        Raises:
            Occupied: something is there.
        """
        if not self.new and self.existing is Existing.KEPT and self._there(name) is not None:
            raise Occupied("it is there already", hint=_HINT)

    def put(self, name: bytes, make: Callable[[bytes], None]) -> None:
        """Let `make` make something complete by a name, and see that this is `name` in the end.

        Args:
            make: raises FileExistsError if there is something, and leaves nothing behind if it fails.

        Raises:
            Occupied: something is there.
            OSError: it cannot be made.
        """
        try:
            make(name)
        except FileExistsError:
            there = self._there(name)
            if self.existing is Existing.KEPT:
                raise Occupied("it is there already", hint=_HINT) from None
            if self.existing is Existing.RENAMED:
                self._back_up(name)
                make(name)
            elif there is not None and stat.S_ISDIR(there.st_mode):
                raise Occupied("a directory is there already", hint=_RENAMES) from None
            else:
                self._replace(name, make)
        self._note(name)

    def disinherit(self, handle: int | str) -> None:
        """Take from something new what the default ACL of this directory gave it: it has its own, or none.

        Args:
            handle: a descriptor, or the path of one in /proc.
        """
        if self._passes_on:
            for attribute in set(INHERITED) & set(_xattr_names(handle)):
                os.removexattr(handle, attribute)

    def temporary_name(self) -> bytes:
        """Return a name that nothing here has."""
        return b".qcowfs-restore.%d.%d" % (os.getpid(), next(_numbers))

    def _there(self, name: bytes) -> os.stat_result | None:
        """Return what has a name that is wanted, None if it has gone; what this run made is never touched again."""
        try:
            there = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if self.new or there.st_ino in self._made:
            raise Occupied("another file of the same directory has this name here")
        return there

    def _note(self, name: bytes) -> None:
        if not self.new and self.existing is not Existing.KEPT:
            self._made.add(os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_ino)

    def _replace(self, name: bytes, make: Callable[[bytes], None]) -> None:
        temporary = self.temporary_name()
        make(temporary)
        try:
            os.rename(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)
        except BaseException:
            os.unlink(temporary, dir_fd=self.descriptor)
            raise

    def _back_up(self, name: bytes) -> None:
        """Rename what is there as `cp --backup=numbered` does."""
        if self._backups is None:
            self._backups = {}
            for found in map(BACKUP.fullmatch, map(os.fsencode, os.listdir(self.descriptor))):
                if found is not None:
                    self._backups[found[1]] = max(self._backups.get(found[1], 0), int(found[2]))
        self._backups[name] = number = self._backups.get(name, 0) + 1
        os.rename(name, b"%s.~%d~" % (name, number), src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)


_HINT = "--force replaces files, --backup renames them"
_RENAMES = "--backup renames it"  # a file and a directory never replace each other


def _xattr_names(handle: int | str) -> list[str]:
    with suppress(OSError):  # a file system without any
        return os.listxattr(handle)
    return []

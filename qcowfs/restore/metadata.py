"""Owner, mode, times and extended attributes of what was restored, in the order in which none undoes another.

Used by restorer.py. One thread. What the file system or this user cannot keep is a warning, once for each kind.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from qcowfs.inside.record import Inode
from qcowfs.restore.ledger import Ledger
from qcowfs.restore.trail import Trail

__all__ = ["NO_ROOM", "Metadata"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # there is no use in going on
OF_ROOT = (b"trusted.", b"security.")
SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX
NANOSECONDS = 1_000_000_000


class Metadata:
    """Sets what a guest's inode has."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._privileged = os.geteuid() == 0

    def apply(self, handle: int | str, inode: Inode, xattrs: dict[bytes, bytes], at: Trail) -> list[str]:
        """Set everything; return what of it cannot be kept here.

        Args:
            handle: a descriptor, or the path of one in /proc.
            at: where it is, for messages.

        Raises:
            OSError: there is no room.
        """
        lost: list[str] = []
        mode = stat.S_IMODE(inode.mode)
        # A change of owner clears setuid bits and capabilities, one of bytes too, and a mode may forbid attributes.
        if not self._own(handle, inode, at, lost):
            mode &= ~SPECIAL_BITS  # as cp: they would be those of another user
        for name, value in xattrs.items():
            self._set_xattr(handle, name, value, at, lost)
        try:
            if not stat.S_ISLNK(inode.mode):
                os.chmod(handle, mode)
        except OSError as error:
            self._lost("mode", error, at, lost)
        try:
            os.utime(handle, ns=times(inode))
        except OSError as error:
            self._lost("times", error, at, lost)
        return lost

    def differences(self, handle: int | str, inode: Inode, xattrs: dict[bytes, bytes], lost: list[str]) -> list[str]:
        """Return what the file system tells otherwise than `inode` has it, but for what is `lost`."""
        there = os.stat(handle)
        mask = 0o7777 & ~(SPECIAL_BITS if "owner" in lost else 0)
        checks = {
            "owner": ((there.st_uid, there.st_gid), (inode.uid, inode.gid)),
            "mode": (there.st_mode & mask, inode.mode & mask),
            "times": (there.st_mtime_ns, times(inode)[1]),
        }
        if stat.S_ISLNK(inode.mode):
            del checks["mode"]
        found = [what for what, (one, other) in checks.items() if one != other and what not in lost]
        for name, value in xattrs.items():
            if os.fsdecode(name) not in lost and os.getxattr(handle, name) != value:
                found.append(os.fsdecode(name))
        return found

    def _own(self, handle: int | str, inode: Inode, at: Trail, lost: list[str]) -> bool:
        """Set owner and group; return whether they are those of the guest."""
        there = os.stat(handle)
        if (there.st_uid, there.st_gid) == (inode.uid, inode.gid):
            return True
        try:
            os.chown(handle, inode.uid, inode.gid)
        except OSError as error:
            if self._privileged:  # an ordinary user knows
                self._lost("owner", error, at, lost)
                return False
            lost.append("owner")
        else:
            return True
        with suppress(OSError):  # not one of this user's groups
            os.chown(handle, -1, inode.gid)
        return False

    def _set_xattr(self, handle: int | str, name: bytes, value: bytes, at: Trail, lost: list[str]) -> None:
        text = os.fsdecode(name)
        if name.startswith(OF_ROOT) and not self._privileged:
            lost.append(text)
            kind = name.partition(b".")[0].decode()
            self._ledger.warn(
                f"{kind} for root", at.path(), f"attributes {kind}.* are left out: only root can set them"
            )
            return
        try:
            os.setxattr(handle, name, value)
        except OSError as error:
            self._lost(text, error, at, lost)

    def _lost(self, what: str, error: OSError, at: Trail, lost: list[str]) -> None:
        if error.errno == errno.EDQUOT or (error.errno in NO_ROOM and what in ("owner", "mode", "times")):
            raise error
        lost.append(what)
        kind = what if what in ("owner", "mode", "times") else "attribute"  # a hostile tree has a million names of them
        self._ledger.warn(f"{kind} {error.errno}", at.path(), f"its {what} cannot be kept here: {error.strerror}")


def times(inode: Inode) -> tuple[int, int]:
    """Return the times of access and of the last change, in nanoseconds since the epoch."""
    return inode.atime * NANOSECONDS + inode.atime_ns, inode.mtime * NANOSECONDS + inode.mtime_ns

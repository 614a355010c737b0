"""QEMU's lock bytes on an image file: is somebody writing it, and "please do not write it while I read".

Used by chain. A byte at 100 + n says "I use permission n", one at 200 + n "nobody else may have permission n"; the
bytes, their order and their meaning are QEMU's (block/file-posix.c). Open file description locks: they go when the
descriptor is closed, also by a crash. docs/decisions/0003-lock-bytes.md has the reasons. Any thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

__all__ = ["LocksUnsupported", "hold_reader_locks", "writer_present"]

CONSISTENT_READ, WRITE, _WRITE_UNCHANGED, RESIZE = range(4)
USED = 100  # + permission: "I use it"
FORBIDDEN = 200  # + permission: "nobody else may"

_FLOCK = struct.Struct("@hhqqi0q")  # l_type, l_whence, l_start, l_len, l_pid of struct flock with 64-bit offsets
_UNSUPPORTED = {errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


class LocksUnsupported(Exception):
    """This file system has no byte-range locks."""


def writer_present(fd: int) -> bool:
    """Tell whether another process may write the image behind `fd`, without taking a lock.

    Raises:
        LocksUnsupported: nobody can tell.
    """
    return _held_by_others(fd, USED + WRITE) or _held_by_others(fd, USED + RESIZE)


def hold_reader_locks(fd: int) -> bool:
    """Hold what a QEMU reader holds until `fd` is closed; False, and nothing held, if there is a writer.

    A running VM is never disturbed: the locks are probed before they are taken, taken shared, and probed again, so
    that of a writer and a reader who start at the same moment at least one sees the other.

    Raises:
        LocksUnsupported: nothing is held.
    """
    if _conflict(fd):
        return False
    bytes_to_hold = (USED + CONSISTENT_READ, FORBIDDEN + WRITE, FORBIDDEN + RESIZE)
    if all(_take(fd, place) for place in bytes_to_hold) and not _conflict(fd):
        return True
    for place in bytes_to_hold:
        _command(fd, fcntl.F_OFD_SETLK, fcntl.F_UNLCK, place)
    return False


def _take(fd: int, place: int) -> bool:
    """Take a shared lock; False where somebody has an exclusive one, which QEMU never takes."""
    try:
        _command(fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, place)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _conflict(fd: int) -> bool:
    return writer_present(fd) or _held_by_others(fd, FORBIDDEN + CONSISTENT_READ)


def _held_by_others(fd: int, place: int) -> bool:
    # A write lock conflicts with every lock, so asking whether one could be had finds them all.
    answer = _command(fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, place)
    return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK


def _command(fd: int, command: int, kind: int, place: int) -> bytes:
    try:
        return fcntl.fcntl(fd, command, _FLOCK.pack(kind, os.SEEK_SET, place, 1, 0))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            raise LocksUnsupported from error
        raise

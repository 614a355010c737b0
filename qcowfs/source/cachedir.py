"""A directory that keeps blocks of remote images from one mount to the next, bounded, and shared by several mounts.

Used by chain, which makes one, and by `_blocks`, which reads and writes its files (`_blockfile` says what is in one).
Any thread. No process waits for another: whoever finds somebody else tidying up writes nothing meanwhile.
docs/decisions/0010-block-cache.md has the reasons.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager, suppress

from qcowfs import limits
from qcowfs._blockfile import BLOCK_BYTES, Allowance, BlockFile, drop, survey
from qcowfs._crc32c import crc32c
from qcowfs.errors import UsageError

__all__ = ["CacheDirectory"]

logger = logging.getLogger("qcowfs.source")

LAYOUT = 1  # of the files; another one finds other names, and what is old goes as the oldest
ALLOWANCE_SHARE = 32  # of the bound: what a process may write until it looks again how much there is
FULL = 7 / 8  # of the bound: then the oldest goes; four processes that use up their allowances do not pass the bound
KEPT = 3 / 4  # of the bound: so much is left
TRIES = 8  # to open a file that others remove at the same time
PAUSE = 0.01  # seconds between two of them: to remove a file takes less

_NAME = re.compile(r"[0-9a-f]{64}-([0-9a-f]{1,16})\.blocks")
_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # NONBLOCK: a pipe is no reason to wait


class CacheDirectory:
    """The directory `path`, whose files take at most `bound` bytes, whoever wrote them.

    Attributes:
        path: for messages.
        bound: bytes.
        allowance: what this process may write until `tidy` is called.
    """

    def __init__(self, path: str, bound: int = limits.DEFAULT_CACHE_DIRECTORY) -> None:
        """Open the directory, or make it, for this user alone.

        Raises:
            UsageError: it is another user's, others may write it, or it cannot be written.
        """
        if bound < limits.MIN_CACHE_DIRECTORY:
            least = limits.MIN_CACHE_DIRECTORY >> 20
            raise UsageError(f"{path}: {bound} bytes are too few to keep blocks of images: {least}M are needed")
        self.path = path
        self.bound = bound
        self.allowance = Allowance()
        self._fd = _open_directory(path)

    def close(self) -> None:
        """Give the directory back, after the sources that keep blocks in it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def open_blocks(self, identity: Hashable, size: int) -> BlockFile | None:
        """Open the file of the image with this `identity`, whose content never changes; None, and a line in the log,
        if that is not possible.

        Args:
            identity: made of strings, bytes, numbers and None; the same in every process, and without secrets.
            size: of the image, in bytes.
        """
        if size > limits.MAX_VIRTUAL_SIZE:
            return None
        digest = hashlib.sha256(repr((LAYOUT, identity, size)).encode("utf-8", "surrogatepass")).digest()
        name = f"{digest.hex()}-{size:x}.blocks"
        seed = crc32c(0xFFFFFFFF, digest)
        try:
            for _ in range(TRIES):
                fd = self._opened(name)
                if fd is not None:
                    return BlockFile(fd, size, seed, self.allowance)
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        except OSError as error:
            logger.warning("%s: no blocks are kept of an image: %s", self.path, error.strerror)
            return None

    def tidy(self) -> None:
        """Let the oldest blocks go if there are too many, and allow some bytes more. Only from the writing thread."""
        try:
            with self._alone() as alone:
                if not alone:
                    return
                full, share = int(self.bound * FULL), self.bound // ALLOWANCE_SHARE
                used = self._used()
                if used + share > full:
                    self._shrink(used - int(self.bound * KEPT))
                    used = self._used()
                self.allowance.grant(max(0, min(share, full - used)))
        except OSError as error:
            self.give_up(error.errno or errno.EIO)

    def give_up(self, failure: int) -> None:
        """Say, once, that nothing is written any more, because of this errno; what is there is still read."""
        if self.allowance.stop():
            logger.warning("%s: no more blocks are kept from now on: %s", self.path, os.strerror(failure))

    def _opened(self, name: str) -> int | None:
        """Open the file, or make it; None: it was no file of ours, or is just being removed, so look again."""
        try:
            fd = os.open(name, _FLAGS | os.O_CREAT, 0o600, dir_fd=self._fd)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a pipe or socket
                raise
            os.unlink(name, dir_fd=self._fd)
            return None
        try:
            # Held for as long as the file is open: _remove_if_unused leaves it alone.
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            status = os.fstat(fd)
            if _is_ours(status):
                return fd
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self._fd)
        except BlockingIOError:
            time.sleep(PAUSE)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
        return None

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Keep other processes from tidying up; False: one does already."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
        finally:
            os.close(fd)

    def _names(self) -> list[str]:
        return [name for name in os.listdir(self._fd) if _NAME.fullmatch(name)]

    def _used(self) -> int:
        """Return the bytes that the files take; holes are free."""
        used = 0
        for name in self._names():
            with suppress(FileNotFoundError):
                used += 512 * os.stat(name, dir_fd=self._fd, follow_symlinks=False).st_blocks
        return used

    def _shrink(self, excess: int) -> None:
        """Let the oldest blocks of all files go, `excess` bytes or some more."""
        names = self._names()
        counts: dict[str, list[int]] = {}
        for name in names:
            with self._file(name) as (fd, size):
                counts[name] = [] if fd < 0 else list(survey(fd, size))
        ages = [sum(of_age) for of_age in zip(*filter(None, counts.values()), strict=True)]
        left = -(-excess // BLOCK_BYTES)
        oldest = len(ages)
        while left > 0 and oldest > 0:
            oldest -= 1
            # Of one age class all go, but for the youngest that has to go: of that as many as are needed.
            most = min(left, ages[oldest])
            left -= most
            for name in names if most else ():
                if most and counts[name] and counts[name][oldest]:
                    most -= self._drop(name, oldest, most)
        for name in names:
            self._remove_if_unused(name)

    def _drop(self, name: str, youngest: int, most: int) -> int:
        with self._file(name) as (fd, size):
            if fd < 0:
                return 0
            try:
                return drop(fd, size, youngest, most)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    raise
                os.ftruncate(fd, 0)  # a file system without holes: all or nothing
                return most

    def _remove_if_unused(self, name: str) -> None:
        """Remove the file if it holds no block and nobody has it open."""
        with self._file(name) as (fd, size):
            if fd < 0 or any(survey(fd, size)):
                return
            with suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(name, dir_fd=self._fd)

    @contextmanager
    def _file(self, name: str) -> Iterator[tuple[int, int]]:
        """Open a file that is there, for a moment; yields -1 if it is none of ours, and the size of its image."""
        match = _NAME.fullmatch(name)
        size = min(int(match[1], 16) if match else 0, limits.MAX_VIRTUAL_SIZE)
        try:
            fd = os.open(name, _FLAGS, dir_fd=self._fd)
        except OSError:
            yield -1, 0
            return
        try:
            yield (fd if _is_ours(os.fstat(fd)) else -1), size
        finally:
            os.close(fd)


def _is_ours(status: os.stat_result) -> bool:
    """Tell whether it is a file as we make them: what has two names may be a file that somebody needs."""
    private = not status.st_mode & 0o077
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid() and private


def _open_directory(path: str) -> int:
    """Open the directory, made if there is none, with those above it: not everybody has a ~/.cache.

    Raises:
        UsageError: no directory, not ours alone, or not to be written.
    """
    try:
        with suppress(FileExistsError):
            os.makedirs(path, 0o700)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(f"cannot keep blocks of images in {path}: {error.strerror}") from error
    status = os.fstat(fd)
    why = hint = None
    if status.st_uid != os.geteuid():
        why = f"it belongs to another user, number {status.st_uid}"
    elif status.st_mode & 0o022:
        why, hint = "other users may write there", f"chmod 700 {path}"
    elif not os.access(path, os.W_OK | os.X_OK, effective_ids=True):
        why = "it cannot be written"
    if why is not None:
        os.close(fd)
        raise UsageError(f"cannot keep blocks of images in {path}: {why}", hint=hint)
    return fd

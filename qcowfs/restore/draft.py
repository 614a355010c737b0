"""A regular file that has no name before it is complete, so that nothing that stops the program leaves half of one.

Used by restorer.py. One thread. Where the file system cannot do that, the draft has a temporary name.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from qcowfs.restore.directory import Directory

__all__ = ["Draft", "draft"]

NAMELESS = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
NAMED = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_RDWR | os.O_CLOEXEC
PRIVATE = 0o600  # until all is in it, and its own mode comes
NOT_HERE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)  # O_TMPFILE: file systems, and old kernels
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
PROC = "/proc/self/fd"


class Draft:
    """An open file in `directory`, and how it gets its name."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._name: bytes | None = None
        self.descriptor = self._nameless() if os.path.isdir(PROC) else -1
        if self.descriptor < 0:
            self._name = directory.temporary_name()
            self.descriptor = os.open(self._name, NAMED, PRIVATE, dir_fd=directory.descriptor)

    def _nameless(self) -> int:
        try:
            return os.open(b".", NAMELESS, PRIVATE, dir_fd=self._directory.descriptor)
        except OSError as error:
            if error.errno not in NOT_HERE:
                raise
        return -1

    def publish(self, name: bytes) -> None:
        """Give the file its name.

        Raises:
            FileExistsError: something has it.
        """
        at = self._directory.descriptor
        if self._name is None:
            os.link(f"{PROC}/{self.descriptor}", name, dst_dir_fd=at, follow_symlinks=True)
            return
        try:
            os.link(self._name, name, src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            self._rename(name)

    def _rename(self, name: bytes) -> None:
        """Rename where there are no hard links: FAT. What somebody else made just now would be replaced."""
        assert self._name is not None
        at = self._directory.descriptor
        with suppress(FileNotFoundError):
            os.stat(name, dir_fd=at, follow_symlinks=False)
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.rename(self._name, name, src_dir_fd=at, dst_dir_fd=at)
        self._name = None

    def close(self) -> None:
        """Close the file; what was not published is gone."""
        os.close(self.descriptor)
        if self._name is not None:
            os.unlink(self._name, dir_fd=self._directory.descriptor)


@contextmanager
def draft(directory: Directory) -> Iterator[Draft]:
    """Make a draft for the time of the context."""
    made = Draft(directory)
    try:
        yield made
    finally:
        made.close()

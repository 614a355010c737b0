"""The file that an export makes: under a temporary name beside its own until it is complete, or gone.

Used by job.py. One thread.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Collection, Hashable
from contextlib import suppress
from types import TracebackType

from qcowfs.chain import Chain
from qcowfs.errors import QcowfsError, SourceError, UsageError, printable

__all__ = ["Target", "files_of", "private_mode", "require_free"]

OWNER = stat.S_IRUSR | stat.S_IWUSR
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


def require_free(path: str, chain: Chain, *, force: bool) -> None:
    """Refuse `path` if writing it would destroy what nobody wants destroyed.

    Raises:
        UsageError: it is a directory, a device, a file of `chain`, or any file at all without `force`.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = None
    except OSError as error:
        raise SourceError.from_oserror(path, "cannot write", error) from error
    shown = printable(path)
    if status is not None and (status.st_dev, status.st_ino) in files_of(chain):
        raise UsageError(f"{shown}: is a file of the image itself")
    if status is not None and not stat.S_ISREG(status.st_mode):
        what = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise UsageError(f"{shown}: is {what}", hint="- as the output writes a raw disk to standard output")
    if os.path.lexists(path) and not force:
        raise UsageError(f"{shown}: exists already", hint="--force replaces it")


class Target:
    """A file that appears under its name when the `with` block ends well, and leaves nothing behind if it does not.

    What was written has to be flushed at the end of the block.

    Args:
        path: the name; a symbolic link of that name is replaced, not followed.
        force: something else of that name may be replaced.
        mode: who may read and write it, before the umask.

    Attributes:
        descriptor: for writing.

    Raises:
        SourceError: it cannot be made.
    """

    def __init__(self, path: str, *, force: bool, mode: int) -> None:
        self.path = path
        self._force = force
        directory, self._name = os.path.split(path)
        self._temporary = f".qcowfs-export-{secrets.token_hex(8)}"
        try:
            # By its descriptor the directory is the same to the end, whoever moves it meanwhile.
            self._directory = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                self.descriptor = os.open(self._temporary, flags, mode, dir_fd=self._directory)
            except BaseException:
                os.close(self._directory)
                raise
        except OSError as error:
            raise SourceError.from_oserror(path, "cannot write", error) from error

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._complete()
        except OSError as failure:
            raise SourceError.from_oserror(self.path, "cannot write", failure) from failure
        finally:
            os.close(self.descriptor)
            with suppress(FileNotFoundError):
                os.unlink(self._temporary, dir_fd=self._directory)
            os.close(self._directory)

    def flush(self) -> None:
        """Put the file on the disk, before its name is there: after a crash there is all of it or nothing.

        Raises:
            OSError: there is no room for it, on file systems that find that out only now.
        """
        os.fsync(self.descriptor)

    def _complete(self) -> None:
        if self._force:
            self._rename()
        else:
            self._rename_if_free()
        os.fsync(self._directory)

    def _rename(self) -> None:
        os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)

    def _rename_if_free(self) -> None:
        """rename(2) would replace what somebody else has made meanwhile; link(2) does not, but vfat has none."""
        try:
            os.link(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except FileExistsError:
            raise QcowfsError(f"{printable(self.path)}: somebody else has made it meanwhile") from None
        except OSError as error:
            if error.errno not in NO_LINKS or os.path.lexists(self.path):
                raise
            self._rename()


def private_mode(chain: Chain) -> int:
    """Return the permissions of a copy: nobody but its owner may do what he may not do with every file of `chain`.

    What is in a disk is as secret as the image, which is often readable by few.
    """
    mode = 0o666
    for layer in chain.layers:
        for path in (layer.path, layer.data_path or layer.path):
            with suppress(OSError):
                mode &= os.stat(path).st_mode
    return mode | OWNER


def files_of(chain: Chain) -> Collection[Hashable]:
    """Return device and inode number of each file that `chain` is in."""
    found: set[Hashable] = set()
    for layer in chain.layers:
        found.add(layer.file_id)
        if layer.data_path is not None:
            with suppress(OSError):
                status = os.stat(layer.data_path)
                found.add((status.st_dev, status.st_ino))
    return found

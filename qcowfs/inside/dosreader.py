"""What the readers of FAT and exFAT have in common.

Used by fat.py and exfat.py. A file's inode number is the place of its (first) directory entry in the volume, in
entries. All of it is what Linux shows by default: owner 0, the modes that a umask of 022 leaves, no second time beside
the last change. The count of a directory's links is 1, which stands for unknown: to tell it, every directory in a
listing would have to be read.
"""

from __future__ import annotations

import errno
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from qcowfs.inside.clusters import Chain, Heap, Table
from qcowfs.inside.directories import Directories
from qcowfs.inside.reader import Device, Extents
from qcowfs.inside.record import NO_CHANGE_TIME, NO_XATTRS, Extent, Inode, pack_entry

__all__ = ["DIRECTORY", "ENTRY", "READ_ONLY", "ROOT", "DosFile", "DosReader"]

ROOT = 1  # byte 32 of the volume, where no directory entry can be
ENTRY = 32  # bytes
READ_ONLY, DIRECTORY = 0x01, 0x10  # attributes
FEW_EXTENTS = 4
FEW_CLUSTERS = 256  # of the table that are followed for each file of a listing


class DosFile(NamedTuple):
    """A file or directory as its entries tell it; sizes in bytes.

    Attributes:
        first: its first cluster.
        valid: what was ever written of it; the rest is zeros.
        scattered: its clusters are in the table, and not just one behind the other.
        times: seconds of the last access and of the last change, and nanoseconds of this.
    """

    attributes: int
    first: int
    size: int
    valid: int
    scattered: bool
    times: tuple[int, int, int]

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return bool(self.attributes & DIRECTORY)


class DosReader(ABC):
    """A Reader, but for how a directory entry is read."""

    root = ROOT

    def __init__(self, device: Device, table: Table, heap: Heap, *, dirty: bool) -> None:
        self._device = device
        self._table = table
        self._heap = heap
        self._dirty = dirty
        self._directories = Directories(self._listed)
        self._followed: tuple[int, int, Chain] | None = None  # start, clusters and chain of the last file

    @abstractmethod
    def _file(self, ino: int) -> DosFile:
        """Return a file; OSError if it cannot be read."""

    @abstractmethod
    def _attributes(self, ino: int) -> int:
        """Return a file's attributes, even if nothing else of it can be read."""

    @abstractmethod
    def _names(self, ino: int) -> Iterator[tuple[bytes, int]]:
        """Yield the names in a directory, and their inode numbers."""

    def facts(self) -> Mapping[str, str]:
        return {"state": "not clean" if self._dirty else "clean"}

    def stat(self, ino: int) -> bytes:
        return self._told(ino, self._file(ino)).pack()

    def lookup(self, ino: int, name: bytes) -> int:
        return self._directories.lookup(ino, name)

    def entries(self, ino: int, cookie: int, room: int) -> bytes:
        return self._directories.entries(ino, cookie, room, self._entry)

    def readlink(self, ino: int) -> bytes:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def xattrs(self, ino: int) -> Mapping[bytes, bytes]:
        return {}

    def extents(self, ino: int, offset: int, limit: int) -> Extents:
        file = self._file(ino)
        if file.is_directory:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return self._heap.extents(self._chain(file), offset, max(limit, 1), file.valid, file.size)

    def read(self, ino: int, offset: int, length: int) -> bytes:
        raise OSError(errno.EINVAL, "every file of FAT and exFAT has extents")

    def _told(self, ino: int, file: DosFile) -> Inode:
        mode = stat.S_IFDIR if file.is_directory else stat.S_IFREG
        mode |= 0o555 if file.attributes & READ_ONLY and not file.is_directory else 0o755
        blocks = -(-file.size // self._heap.size) * self._heap.size // 512
        atime, mtime, nanoseconds = file.times
        flags = NO_XATTRS | NO_CHANGE_TIME
        return Inode(
            ino, file.size, blocks, atime, mtime, mtime, 0, nanoseconds, nanoseconds, mode, 1, 0, 0, 0, flags, 0
        )  # fmt: skip

    def _entry(self, name: bytes, ino: int, cookie: int) -> bytes:
        try:
            file = self._file(ino)
        except OSError as error:
            return pack_entry(name, self._unreadable(ino, error.errno or errno.EIO).pack(), cookie)
        return pack_entry(name, self._told(ino, file).pack(), cookie, self._few(file))

    def _unreadable(self, ino: int, number: int) -> Inode:
        try:
            directory = self._attributes(ino) & DIRECTORY
        except OSError:
            directory = 0
        mode = stat.S_IFDIR if directory else stat.S_IFREG
        return Inode(ino, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, NO_XATTRS, number)

    def _few(self, file: DosFile) -> Sequence[Extent] | None:
        """Return all extents of a file, if that is quick and they are few."""
        if file.is_directory or (file.scattered and file.size > FEW_CLUSTERS * self._heap.size):
            return None
        try:
            found = self._heap.extents(self._chain(file), 0, FEW_EXTENTS, file.valid, file.size)
        except OSError:
            return None  # who reads the file will be told
        return found.extents if found.end == file.size else None

    def _listed(self, ino: int) -> Iterator[tuple[bytes, int]]:
        if not self._attributes(ino) & DIRECTORY:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        return self._names(ino)

    def _entries_of(self, pieces: Iterator[tuple[int, int]]) -> Iterator[tuple[int, bytes]]:
        """Yield place and bytes of each directory entry in pieces of the volume, given by place and length."""
        for place, length in pieces:
            stored = self._device.read(place, length)
            for at in range(0, length, ENTRY):
                yield place + at, stored[at : at + ENTRY]

    def _chain(self, file: DosFile) -> Chain:
        """Return the clusters of a file; those in the table that were asked for last are held."""
        clusters = -(-file.size // self._heap.size)
        if not file.scattered:
            return self._table.contiguous(file.first, clusters)
        if self._followed is None or self._followed[:2] != (file.first, clusters):
            self._followed = None  # not two of them at once: one may take 8 MiB
            self._followed = file.first, clusters, self._table.follow(file.first, clusters)
        return self._followed[2]

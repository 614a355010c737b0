"""The reader of FAT12, FAT16 and FAT32 with long names, by the rules of Linux's vfat driver.

Used by the worker. A file's inode number is the place of its directory entry in the volume, in entries. Files can be
told apart by case; short names without a long one are those of codepage 437. What vfat shows by default: owner 0, the
modes that a umask of 022 leaves, no second time beside the last change. The count of a directory's links is 1, which
stands for unknown: to tell it, every directory in a listing would have to be read.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence

from qcowfs import limits
from qcowfs.inside.clusters import Chain, Heap, Table
from qcowfs.inside.directories import Directories
from qcowfs.inside.dostime import from_dos
from qcowfs.inside.fatnames import ENTRY, names
from qcowfs.inside.probes.windows import FAT12_MAX, FAT16_MAX, FAT32_MAX, FatGeometry, fat_geometry
from qcowfs.inside.reader import Device, Extents, Reader, Unreadable
from qcowfs.inside.record import NO_XATTRS, Extent, Inode, pack_entry

__all__ = ["FatReader", "open_reader"]

ROOT = 1  # byte 32 of the volume, where no directory entry can be
READ_ONLY, DIRECTORY = 0x01, 0x10  # attributes
FEW_EXTENTS = 4
FEW_CLUSTERS = 256  # followed for each file of a listing


def open_reader(device: Device, *, recover: bool) -> Reader:
    """Return the reader of the file system on `device`. There is nothing to recover in FAT.

    Raises:
        Unreadable: it is no FAT, or too damaged.
    """
    try:
        sector = device.read(0, 512)
    except OSError as error:
        raise Unreadable(f"FAT: {error.strerror}") from error
    geometry = fat_geometry(sector)
    if geometry is None:
        raise Unreadable("FAT: a boot sector that makes no sense")
    return FatReader(device, geometry, sector)


class FatReader:
    """A Reader."""

    root = ROOT

    def __init__(self, device: Device, geometry: FatGeometry, sector: bytes) -> None:
        bits = 28 if geometry.is_fat32 else 16 if geometry.clusters > FAT12_MAX else 12
        heap = geometry.root + geometry.root_entries * ENTRY
        size = geometry.cluster_size * geometry.sector_size
        width = 32 if bits == 28 else bits
        in_table = geometry.fat_length * geometry.sector_size * 8 // width - 2
        count = min(geometry.clusters, in_table, (device.size - heap) // size)
        if geometry.clusters > {12: FAT12_MAX, 16: FAT16_MAX, 28: FAT32_MAX}[bits] or count < 1:
            raise Unreadable("FAT: a count of clusters that cannot be")
        self._device = device
        self._geometry = geometry
        self._dirty = bool(sector[0x41 if geometry.is_fat32 else 0x25] & 1)
        self._table = Table(device, geometry.reserved * geometry.sector_size, bits, count)
        self._heap = Heap(device, heap, size)
        self._directories = Directories(self._names)
        self._followed: tuple[int, int, Chain] | None = None  # start, clusters and chain of the last file

    def facts(self) -> Mapping[str, str]:
        return {"state": "not clean" if self._dirty else "clean"}

    def stat(self, ino: int) -> bytes:
        return self._told(ino).pack()

    def lookup(self, ino: int, name: bytes) -> int:
        return self._directories.lookup(ino, name)

    def entries(self, ino: int, cookie: int, room: int) -> bytes:
        return self._directories.entries(ino, cookie, room, self._entry)

    def readlink(self, ino: int) -> bytes:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def xattrs(self, ino: int) -> Mapping[bytes, bytes]:
        return {}

    def extents(self, ino: int, offset: int, limit: int) -> Extents:
        entry = self._raw(ino)
        if _is_directory(ino, entry):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        size = _size(entry)
        return self._heap.extents(self._chain(self._start(entry), size), offset, max(limit, 1), size, size)

    def read(self, ino: int, offset: int, length: int) -> bytes:
        raise OSError(errno.EINVAL, "every file of FAT has extents")

    def _raw(self, ino: int) -> bytes:
        """Return a directory entry; for the root, one that is all zeros."""
        if ino == ROOT:
            return bytes(ENTRY)
        entry = self._device.read(ino * ENTRY, ENTRY)
        if entry[0] in (0, 0xE5):
            raise FileNotFoundError(errno.ENOENT, "a deleted entry")
        return entry

    def _told(self, ino: int) -> Inode:
        entry = self._raw(ino)
        if _is_directory(ino, entry):
            mode = stat.S_IFDIR | 0o755
            size = sum(length for _place, length in self._pieces(ino, entry))
        else:
            mode = stat.S_IFREG | (0o555 if entry[11] & READ_ONLY else 0o755)
            size = _size(entry)
        blocks = -(-size // self._heap.size) * self._heap.size // 512
        atime, mtime = _times(entry) if ino != ROOT else (0, 0)
        return Inode(ino, size, blocks, atime, mtime, mtime, 0, 0, 0, mode, 1, 0, 0, 0, NO_XATTRS, 0)

    def _entry(self, name: bytes, ino: int, cookie: int) -> bytes:
        try:
            told = self._told(ino)
        except OSError as error:
            told = self._unreadable(ino, error.errno or errno.EIO)
        return pack_entry(name, told.pack(), cookie, self._few(told))

    def _unreadable(self, ino: int, number: int) -> Inode:
        try:
            mode = stat.S_IFDIR if _is_directory(ino, self._raw(ino)) else stat.S_IFREG
        except OSError:
            mode = stat.S_IFREG
        return Inode(ino, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, NO_XATTRS, number)

    def _few(self, told: Inode) -> Sequence[Extent] | None:
        """Return all extents of a file, if that is quick and they are few."""
        if told.error or not stat.S_ISREG(told.mode) or told.size > FEW_CLUSTERS * self._heap.size:
            return None
        try:
            found = self.extents(told.ino, 0, FEW_EXTENTS)
        except OSError:
            return None  # who reads the file will be told
        return found.extents if found.end == told.size else None

    def _names(self, ino: int) -> Iterator[tuple[bytes, int]]:
        entry = self._raw(ino)
        if not _is_directory(ino, entry):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        directories = 0
        for name, place, attributes in names(self._directory_entries(ino, entry)):
            directories += bool(attributes & DIRECTORY)
            if name not in (b".", b".."):
                yield name, place // ENTRY
        if ino != ROOT and directories < 2:  # Linux takes it for what it is not, too
            raise OSError(errno.EIO, "a directory that names neither itself nor its parent")

    def _directory_entries(self, ino: int, entry: bytes) -> Iterator[tuple[int, bytes]]:
        for place, length in self._pieces(ino, entry):
            stored = self._device.read(place, length)
            for at in range(0, length, ENTRY):
                yield place + at, stored[at : at + ENTRY]

    def _pieces(self, ino: int, entry: bytes) -> Iterator[tuple[int, int]]:
        """Yield place and length of the pieces of a directory."""
        geometry = self._geometry
        if ino == ROOT and not geometry.is_fat32:
            yield geometry.root, geometry.root_entries * ENTRY
            return
        start = geometry.root_cluster if ino == ROOT else self._start(entry)
        if ino != ROOT and start in (0, geometry.root_cluster if geometry.is_fat32 else 0):
            raise OSError(errno.EIO, "a directory that is the root")
        most = max(limits.MAX_FAT_DIRECTORY // self._heap.size, 1)
        chain = self._table.follow(start, most)
        if not chain.ended:
            raise OSError(errno.EIO, "a directory whose chain of clusters has no end")
        yield from self._heap.pieces(chain)

    def _start(self, entry: bytes) -> int:
        high, low = struct.unpack_from("<H4xH", entry, 20)
        return int(high << 16 | low) if self._geometry.is_fat32 else int(low)

    def _chain(self, start: int, size: int) -> Chain:
        """Return the chain of a file; that of the file that was asked for last is held."""
        clusters = -(-size // self._heap.size)
        if self._followed is None or self._followed[:2] != (start, clusters):
            self._followed = start, clusters, self._table.follow(start, clusters)
        return self._followed[2]


def _is_directory(ino: int, entry: bytes) -> bool:
    return ino == ROOT or bool(entry[11] & DIRECTORY)


def _size(entry: bytes) -> int:
    return int.from_bytes(entry[28:32], "little")


def _times(entry: bytes) -> tuple[int, int]:
    """Return the times of the last access, which is a day, and of the last change."""
    accessed, time, date = struct.unpack_from("<H2xHH", entry, 18)
    return from_dos(accessed, 0)[0], from_dos(date, time)[0]

"""The reader of FAT12, FAT16 and FAT32 with long names, by the rules of Linux's vfat driver. Used by the worker."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

from qcowfs import limits
from qcowfs.inside.clusters import Heap, Table
from qcowfs.inside.dosreader import DIRECTORY, ENTRY, ROOT, DosFile, DosReader
from qcowfs.inside.dostime import from_dos
from qcowfs.inside.fatnames import names
from qcowfs.inside.probes.windows import FAT12_MAX, FAT16_MAX, FAT32_MAX, FatGeometry, fat_geometry
from qcowfs.inside.reader import Device, Reader, Unreadable

__all__ = ["FatReader", "open_reader"]


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


class FatReader(DosReader):
    """A Reader."""

    def __init__(self, device: Device, geometry: FatGeometry, sector: bytes) -> None:
        bits = 28 if geometry.is_fat32 else 16 if geometry.clusters > FAT12_MAX else 12
        heap = geometry.root + geometry.root_entries * ENTRY
        size = geometry.cluster_size * geometry.sector_size
        width = 32 if bits == 28 else bits
        in_table = geometry.fat_length * geometry.sector_size * 8 // width - 2
        count = min(geometry.clusters, in_table, (device.size - heap) // size)
        if geometry.clusters > {12: FAT12_MAX, 16: FAT16_MAX, 28: FAT32_MAX}[bits] or count < 1:
            raise Unreadable("FAT: a count of clusters that cannot be")
        table = Table(device, geometry.reserved * geometry.sector_size, bits, count)
        dirty = bool(sector[0x41 if geometry.is_fat32 else 0x25] & 1)
        super().__init__(device, table, Heap(device, heap, size), dirty=dirty)
        self._geometry = geometry

    def _file(self, ino: int) -> DosFile:
        entry = self._raw(ino)
        attributes = entry[11]
        if attributes & DIRECTORY:
            size = sum(length for _place, length in self._pieces(ino, entry))
        else:
            size = int.from_bytes(entry[28:32], "little")
        return DosFile(attributes, self._start(entry), size, size, True, (0, 0, 0) if ino == ROOT else _times(entry))

    def _attributes(self, ino: int) -> int:
        return self._raw(ino)[11]

    def _names(self, ino: int) -> Iterator[tuple[bytes, int]]:
        directories = 0
        for name, place, attributes in names(self._entries_of(self._pieces(ino, self._raw(ino)))):
            directories += bool(attributes & DIRECTORY)
            if name not in (b".", b".."):
                yield name, place // ENTRY
        if ino != ROOT and directories < 2:  # Linux takes it for what it is not, too
            raise OSError(errno.EIO, "a directory that names neither itself nor its parent")

    def _raw(self, ino: int) -> bytes:
        """Return a directory entry; for the root, one that tells nothing but that it is a directory."""
        if ino == ROOT:
            return bytes([0] * 11 + [DIRECTORY] + [0] * 20)
        entry = self._device.read(ino * ENTRY, ENTRY)
        if entry[0] in (0, 0xE5):
            raise FileNotFoundError(errno.ENOENT, "a deleted entry")
        return entry

    def _pieces(self, ino: int, entry: bytes) -> Iterator[tuple[int, int]]:
        """Yield place and length of the pieces of a directory."""
        geometry = self._geometry
        if ino == ROOT and not geometry.is_fat32:
            yield geometry.root, geometry.root_entries * ENTRY
            return
        root = geometry.root_cluster if geometry.is_fat32 else 0
        start = root if ino == ROOT else self._start(entry)
        if ino != ROOT and start in (0, root):
            raise OSError(errno.EIO, "a directory that is the root")
        chain = self._table.follow(start, max(limits.MAX_FAT_DIRECTORY // self._heap.size, 1))
        if not chain.ended:
            raise OSError(errno.EIO, "a directory whose chain of clusters has no end")
        yield from self._heap.pieces(chain)

    def _start(self, entry: bytes) -> int:
        high, low = struct.unpack_from("<H4xH", entry, 20)
        return int(high << 16 | low) if self._geometry.is_fat32 else int(low)


def _times(entry: bytes) -> tuple[int, int, int]:
    """Return the times of the last access, which is a day, and of the last change."""
    accessed, time, date = struct.unpack_from("<H2xHH", entry, 18)
    return from_dos(accessed, 0)[0], *from_dos(date, time)

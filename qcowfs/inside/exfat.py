"""The reader of exFAT, by the rules of Linux's exfat driver.

Used by the worker. A file's inode number is the place of its first directory entry in the volume, in entries. Owners,
modes and counts of links are as in fat.py. What lies behind a file's valid length reads as zeros, as in Windows and in
Linux since 6.8.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from qcowfs import limits
from qcowfs.inside.clusters import FIRST, Chain, Heap, Table, contiguous
from qcowfs.inside.directories import Directories, is_name, utf8
from qcowfs.inside.dostime import from_dos
from qcowfs.inside.reader import Device, Extents, Reader, Unreadable
from qcowfs.inside.record import INODE_BITS, NO_XATTRS, Extent, Inode, pack_entry

__all__ = ["ExfatReader", "open_reader"]

ROOT = 1  # byte 32 of the volume, where no directory entry can be
ENTRY = 32  # bytes
END, FILE, STREAM, NAME = 0x00, 0x85, 0xC0, 0xC1  # kinds of entries
SECONDARY = 0xC0  # the bits of an entry that goes on with the one before it, and is in use
READ_ONLY, DIRECTORY = 0x01, 0x10  # attributes
NO_FAT_CHAIN = 0x02  # of a stream: its clusters lie one behind the other, and are in no table
MOST_SECONDARIES = 18
ZONE_VALID = 0x80
BOOT_SECTORS = 11  # of the boot region, which the twelfth has a checksum of
UNSUMMED = (106, 107, 112)  # bytes of the boot sector that change
DIRTY = 2
FEW_EXTENTS = 4
FEW_CLUSTERS = 256  # followed for each file of a listing


class _Boot(NamedTuple):
    """What the boot sector says. Places are in bytes; the root is a cluster."""

    table: int
    heap: int
    clusters: int
    root: int
    cluster_size: int
    dirty: bool


class _File(NamedTuple):
    """A file as its first two directory entries tell it; sizes in bytes."""

    entry: bytes
    attributes: int
    scattered: bool
    first: int
    valid: int
    size: int


def open_reader(device: Device, *, recover: bool) -> Reader:
    """Return the reader of the file system on `device`. There is nothing to recover in exFAT.

    Raises:
        Unreadable: it is no exFAT, or too damaged.
    """
    try:
        return ExfatReader(device, _boot(device))
    except OSError as error:
        raise Unreadable(f"exFAT: {error.strerror}") from error


def _boot(device: Device) -> _Boot:
    sector = device.read(0, 512)
    table, table_length, heap, clusters, root = struct.unpack_from("<IIIII", sector, 80)
    flags, sector_bits, cluster_bits, tables = struct.unpack_from("<HBBB", sector, 106)
    sane = sector[3:11] == b"EXFAT   " and not any(sector[11:64]) and sector[510:512] == b"\x55\xaa"
    if not sane or not 9 <= sector_bits <= 12 or sector_bits + cluster_bits > 25 or tables not in (1, 2):
        raise Unreadable("exFAT: a boot sector that makes no sense")
    if not _is_whole(device, 1 << sector_bits):
        raise Unreadable("exFAT: a boot region with a wrong checksum")
    active = flags & 1 if tables == 2 else 0
    size = 1 << (sector_bits + cluster_bits)
    present = max(device.size - (heap << sector_bits), 0) // size
    in_table = (table_length << sector_bits) // 4 - FIRST
    if clusters > in_table or device.size // ENTRY >> INODE_BITS:
        raise Unreadable("exFAT: more clusters than its table has, or than can be read")
    return _Boot(
        table=(table + active * table_length) << sector_bits,
        heap=heap << sector_bits,
        clusters=min(clusters, present),
        root=root,
        cluster_size=size,
        dirty=bool(flags & DIRTY),
    )


def _is_whole(device: Device, sector_size: int) -> bool:
    region = bytearray(device.read(0, BOOT_SECTORS * sector_size))
    stored = device.read(BOOT_SECTORS * sector_size, 4)
    for at in reversed(UNSUMMED):
        del region[at]
    total = 0
    for byte in region:
        total = ((total << 31 | total >> 1) + byte) & 0xFFFFFFFF
    return total == int.from_bytes(stored, "little")


class ExfatReader:
    """A Reader."""

    root = ROOT

    def __init__(self, device: Device, boot: _Boot) -> None:
        self._device = device
        self._boot = boot
        self._table = Table(device, boot.table, 32, boot.clusters)
        self._heap = Heap(device, boot.heap, boot.cluster_size)
        self._directories = Directories(self._names)
        self._followed: tuple[int, int, Chain] | None = None  # start, clusters and chain of the last file in the table

    def facts(self) -> Mapping[str, str]:
        return {"state": "not clean" if self._boot.dirty else "clean"}

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
        if file.attributes & DIRECTORY:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        return self._heap.extents(self._chain(file), offset, max(limit, 1), file.valid, file.size)

    def read(self, ino: int, offset: int, length: int) -> bytes:
        raise OSError(errno.EINVAL, "every file of exFAT has extents")

    def _file(self, ino: int) -> _File:
        if ino == ROOT:
            chain = self._root_chain()
            return _File(bytes(ENTRY), DIRECTORY, True, self._boot.root, 0, chain.length * self._heap.size)
        entry = self._device.read(ino * ENTRY, ENTRY)
        if entry[0] != FILE:
            raise FileNotFoundError(errno.ENOENT, "a deleted entry")
        stream = self._stream(ino * ENTRY, entry)
        flags, valid, first, size = struct.unpack_from("<xB6xQ4xIQ", stream)
        if size >> 63 or valid > size:
            raise OSError(errno.EIO, "a file of an impossible size")
        return _File(entry, entry[4], not flags & NO_FAT_CHAIN, first, valid, size)

    def _stream(self, place: int, entry: bytes) -> bytes:
        """Return the entry that follows `entry`, which is at `place` and may be the last one of its cluster.

        Which cluster then comes next is not known here: the one behind it, or the next in the table. The checksum of
        all entries of the file tells which.
        """
        cluster = self._heap.cluster(place)
        if place + ENTRY < self._heap.place(cluster + 1):
            stream = self._device.read(place + ENTRY, ENTRY)
            if stream[0] == STREAM:
                return stream
        else:
            count = min(entry[1], MOST_SECONDARIES)
            need = -(-count * ENTRY // self._heap.size) + 1
            for chain in (self._table.follow(cluster, need), contiguous(cluster, need)):
                found = entry + self._bytes(chain)[self._heap.size :][: count * ENTRY]
                if found[ENTRY : ENTRY + 1] == bytes([STREAM]) and _checksum(found) == entry[2:4]:
                    return found[ENTRY : 2 * ENTRY]
        raise OSError(errno.EIO, "a file whose directory entries do not fit together")

    def _bytes(self, chain: Chain) -> bytes:
        stored = [(place, length) for place, length in self._heap.pieces(chain) if place + length <= self._device.size]
        return b"".join(self._device.read(place, length) for place, length in stored)

    def _told(self, ino: int, file: _File) -> Inode:
        if file.attributes & DIRECTORY:
            mode = stat.S_IFDIR | 0o755
        else:
            mode = stat.S_IFREG | (0o555 if file.attributes & READ_ONLY else 0o755)
        blocks = -(-file.size // self._heap.size) * self._heap.size // 512
        (atime, _), (mtime, mtime_ns) = ((0, 0), (0, 0)) if ino == ROOT else _times(file.entry)
        return Inode(
            ino, file.size, blocks, atime, mtime, mtime, 0, mtime_ns, mtime_ns, mode, 1, 0, 0, 0, NO_XATTRS, 0
        )  # fmt: skip

    def _entry(self, name: bytes, ino: int, cookie: int) -> bytes:
        extents: Sequence[Extent] | None = None
        try:
            file = self._file(ino)
            told = self._told(ino, file)
            extents = self._few(file)
        except OSError as error:
            told = self._unreadable(ino, error.errno or errno.EIO)
        return pack_entry(name, told.pack(), cookie, extents)

    def _unreadable(self, ino: int, number: int) -> Inode:
        try:
            directory = self._device.read(ino * ENTRY, ENTRY)[4] & DIRECTORY
        except OSError:
            directory = 0
        mode = stat.S_IFDIR if directory else stat.S_IFREG
        return Inode(ino, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, NO_XATTRS, number)

    def _few(self, file: _File) -> Sequence[Extent] | None:
        """Return all extents of a file, if that is quick and they are few."""
        if file.attributes & DIRECTORY or (file.scattered and file.size > FEW_CLUSTERS * self._heap.size):
            return None
        try:
            found = self._heap.extents(self._chain(file), 0, FEW_EXTENTS, file.valid, file.size)
        except OSError:
            return None  # who reads the file will be told
        return found.extents if found.end == file.size else None

    def _names(self, ino: int) -> Iterator[tuple[bytes, int]]:
        file = self._file(ino)
        if not file.attributes & DIRECTORY:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        chain = self._root_chain() if ino == ROOT else self._chain(file)
        if chain.length * self._heap.size < file.size or file.size > limits.MAX_EXFAT_DIRECTORY:
            raise OSError(errno.EIO, "a directory whose clusters are not all there")
        return _names(self._directory_entries(chain))

    def _directory_entries(self, chain: Chain) -> Iterator[tuple[int, bytes]]:
        for place, length in self._heap.pieces(chain):
            stored = self._device.read(place, length)
            for at in range(0, length, ENTRY):
                yield place + at, stored[at : at + ENTRY]

    def _root_chain(self) -> Chain:
        chain = self._table.follow(self._boot.root, limits.MAX_EXFAT_DIRECTORY // self._heap.size)
        if not chain.ended:
            raise OSError(errno.EIO, "a root directory whose chain of clusters has no end")
        return chain

    def _chain(self, file: _File) -> Chain:
        """Return the chain of a file; that of the file of the table that was asked for last is held."""
        clusters = -(-file.size // self._heap.size)
        if not file.scattered:
            present = self._boot.clusters + FIRST - file.first
            return contiguous(file.first, min(clusters, present) if FIRST <= file.first and present > 0 else 0)
        if self._followed is None or self._followed[:2] != (file.first, clusters):
            self._followed = file.first, clusters, self._table.follow(file.first, clusters)
        return self._followed[2]


def _names(entries: Iterable[tuple[int, bytes]]) -> Iterator[tuple[bytes, int]]:
    """Yield name and inode number of each file."""
    file, left, length = 0, 0, 0
    parts: list[bytes] = []
    for place, entry in entries:
        if left and entry[0] & SECONDARY == SECONDARY:
            left -= 1
            if entry[0] == STREAM:
                length = entry[3]
            elif entry[0] == NAME:
                parts.append(entry[2:])
            name = utf8(b"".join(parts)[: 2 * length]) if not left else b""
            if is_name(name):
                yield name, file // ENTRY
            continue
        left = 0
        if entry[0] == END:
            return
        if entry[0] == FILE:
            file, left, length, parts = place, entry[1], 0, []


def _checksum(entries: bytes) -> bytes:
    """Return the checksum of the entries of a file, as its first one has it."""
    total = 0
    for byte in entries[:2] + entries[4:]:
        total = ((total << 15 | total >> 1) + byte) & 0xFFFF
    return total.to_bytes(2, "little")


def _times(entry: bytes) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the times of the last access and of the last change, in seconds and nanoseconds."""
    time, date, accessed_time, accessed = struct.unpack_from("<HHHH", entry, 12)
    hundredths, zone, accessed_zone = entry[21], entry[23], entry[24]
    seconds, nanoseconds = from_dos(date, time, hundredths)
    return (from_dos(accessed, accessed_time)[0] - _zone(accessed_zone), 0), (seconds - _zone(zone), nanoseconds)


def _zone(stored: int) -> int:
    """Return how far before UTC a time is, in seconds: it is stored in quarters of an hour, in 7 bits with a sign."""
    if not stored & ZONE_VALID:
        return 0
    quarters = stored & 0x7F
    return (quarters - 0x80 if quarters & 0x40 else quarters) * 900

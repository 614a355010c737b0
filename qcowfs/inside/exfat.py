"""The reader of exFAT, by the rules of Linux's exfat driver.

Used by the worker. What lies behind a file's valid length reads as zeros, as in Windows and in Linux since 6.8.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from qcowfs import limits
from qcowfs.inside.clusters import FIRST, Chain, Heap, Table
from qcowfs.inside.directories import is_name, utf8
from qcowfs.inside.dosreader import DIRECTORY, ENTRY, ROOT, DosFile, DosReader
from qcowfs.inside.dostime import from_dos
from qcowfs.inside.reader import Device, Reader, Unreadable
from qcowfs.inside.record import INODE_BITS

__all__ = ["ExfatReader", "open_reader"]

END, FILE, STREAM, NAME = 0x00, 0x85, 0xC0, 0xC1  # kinds of entries
SECONDARY = 0xC0  # the bits of an entry that goes on with the one before it, and is in use
NO_FAT_CHAIN = 0x02  # of a stream: its clusters lie one behind the other, and are in no table
MOST_SECONDARIES = 18
ZONE_VALID = 0x80
BOOT_SECTORS = 11  # of the boot region, which the twelfth has a checksum of
UNSUMMED = (106, 107, 112)  # bytes of the boot sector that change
DIRTY = 2


class _Boot(NamedTuple):
    """What the boot sector says. Places are in bytes; the root is a cluster."""

    table: int
    heap: int
    clusters: int
    root: int
    cluster_size: int
    dirty: bool


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


class ExfatReader(DosReader):
    """A Reader."""

    def __init__(self, device: Device, boot: _Boot) -> None:
        table = Table(device, boot.table, 32, boot.clusters)
        super().__init__(device, table, Heap(device, boot.heap, boot.cluster_size), dirty=boot.dirty)
        self._root_cluster = boot.root

    def _file(self, ino: int) -> DosFile:
        if ino == ROOT:
            size = self._root_chain().length * self._heap.size
            return DosFile(DIRECTORY, self._root_cluster, size, size, True, (0, 0, 0))
        entry = self._device.read(ino * ENTRY, ENTRY)
        if entry[0] != FILE:
            raise FileNotFoundError(errno.ENOENT, "a deleted entry")
        stream = self._stream(ino * ENTRY, entry)
        flags, valid, first, size = struct.unpack_from("<xB6xQ4xIQ", stream)
        if size >> 63 or valid > size:
            raise OSError(errno.EIO, "a file of an impossible size")
        return DosFile(entry[4], first, size, valid, not flags & NO_FAT_CHAIN, _times(entry))

    def _attributes(self, ino: int) -> int:
        return DIRECTORY if ino == ROOT else self._device.read(ino * ENTRY, ENTRY)[4]

    def _names(self, ino: int) -> Iterator[tuple[bytes, int]]:
        file = self._file(ino)
        chain = self._root_chain() if ino == ROOT else self._chain(file)
        if chain.length * self._heap.size < file.size or file.size > limits.MAX_EXFAT_DIRECTORY:
            raise OSError(errno.EIO, "a directory whose clusters are not all there")
        return _names(self._entries_of(self._heap.pieces(chain)))

    def _root_chain(self) -> Chain:
        chain = self._table.follow(self._root_cluster, limits.MAX_EXFAT_DIRECTORY // self._heap.size)
        if not chain.ended:
            raise OSError(errno.EIO, "a root directory whose chain of clusters has no end")
        return chain

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
            for chain in (self._table.follow(cluster, need), self._table.contiguous(cluster, need)):
                found = entry + self._bytes(chain)[self._heap.size :][: count * ENTRY]
                if found[ENTRY : ENTRY + 1] == bytes([STREAM]) and _checksum(found) == entry[2:4]:
                    return found[ENTRY : 2 * ENTRY]
        raise OSError(errno.EIO, "a file whose directory entries do not fit together")

    def _bytes(self, chain: Chain) -> bytes:
        return b"".join(self._device.read(place, length) for place, length in self._heap.pieces(chain))


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


def _times(entry: bytes) -> tuple[int, int, int]:
    """Return seconds of the last access and of the last change, and nanoseconds of this."""
    time, date, accessed_time, accessed = struct.unpack_from("<HHHH", entry, 12)
    hundredths, zone, accessed_zone = entry[21], entry[23], entry[24]
    seconds, nanoseconds = from_dos(date, time, hundredths)
    return from_dos(accessed, accessed_time)[0] - _zone(accessed_zone), seconds - _zone(zone), nanoseconds


def _zone(stored: int) -> int:
    """Return how far before UTC a time is, in seconds: it is stored in quarters of an hour, in 7 bits with a sign."""
    if not stored & ZONE_VALID:
        return 0
    quarters = stored & 0x7F
    return (quarters - 0x80 if quarters & 0x40 else quarters) * 900

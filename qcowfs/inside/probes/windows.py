"""FAT, exFAT, NTFS and BitLocker: what has a boot sector. The rules are libblkid's.

Used by filesystems.py, and by partitions.py, for which such a sector is no partition table.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qcowfs import limits
from qcowfs.errors import QcowfsError
from qcowfs.inside.probes import Filesystem, Read, utf16

__all__ = ["FAT12_MAX", "FAT16_MAX", "FAT32_MAX", "PROBES", "FatGeometry", "bitlocker", "fat_geometry"]

FAT12_MAX, FAT16_MAX, FAT32_MAX = 0xFF4, 0xFFF4, 0x0FFFFFF6  # clusters
FAT32_NAMES = (b"MSWIN", b"FAT32   ")
FAT_NAMES = (b"MSDOS", b"FAT16   ", b"FAT12   ", b"FAT     ")
FAT32_MASK = 0x0FFFFFFF  # exFAT's entries have 32 bits, but a cluster of a root directory that high is none
DIRECTORY_ENTRY = 32  # bytes, of FAT and of exFAT
VOLUME_ID, DIRECTORY, LONG_NAME = 0x08, 0x10, 0x0F  # attributes
DELETED = 0xE5
HAVE_SERIAL = (0x28, 0x29)  # the extended boot signature of FAT12 and FAT16
DIRTY = 1  # what Linux and Windows set in the boot sector while it is mounted
EXFAT_LABEL = 0x83
EXFAT_DIRTY = 2
VOLUME_RECORD = 3  # of NTFS's master file table
VOLUME_NAME, VOLUME_INFORMATION, LAST_ATTRIBUTE = 0x60, 0x70, 0xFFFFFFFF


class FatGeometry(NamedTuple):
    """A boot sector of FAT that makes sense; sizes in sectors of `sector_size` bytes."""

    sector_size: int
    cluster_size: int
    reserved: int
    fats: int
    root_entries: int
    sectors: int
    fat_length: int
    is_fat32: bool
    root_cluster: int

    @property
    def root(self) -> int:
        """Where the root directory of FAT12 and FAT16 is, or the first cluster of FAT32."""
        return (self.reserved + self.fats * self.fat_length) * self.sector_size

    @property
    def clusters(self) -> int:
        directory = -(-self.root_entries * DIRECTORY_ENTRY // self.sector_size)
        return (self.sectors - (self.reserved + self.fats * self.fat_length + directory)) // self.cluster_size


def _is_power_of_2(number: int) -> bool:
    return number > 0 and not number & (number - 1)


def fat_geometry(sector: bytes) -> FatGeometry | None:
    """Return what the boot sector of a FAT file system says; None if it makes no sense."""
    sector_size, cluster_size, reserved, fats, root_entries, sectors, media, length = struct.unpack_from(
        "<HBHBHHBH", sector, 11
    )
    large_sectors, large_length, root_cluster = struct.unpack_from("<II4xI", sector, 32)
    fat = FatGeometry(
        sector_size=sector_size,
        cluster_size=cluster_size,
        reserved=reserved,
        fats=fats,
        root_entries=root_entries,
        sectors=sectors or large_sectors,
        fat_length=length or large_length,
        is_fat32=not length and large_length > 0,
        root_cluster=root_cluster,
    )
    possible = fats and reserved and (media >= 0xF8 or media == 0xF0) and _is_power_of_2(cluster_size)
    if not possible or not _is_power_of_2(sector_size) or not 512 <= sector_size <= 4096:
        return None
    limit = FAT32_MAX if fat.is_fat32 else FAT16_MAX
    return fat if 0 <= fat.clusters <= limit else None


def _has_fat_magic(sector: bytes) -> bool:
    if sector.startswith(FAT32_NAMES, 0x52) or sector.startswith(FAT_NAMES, 0x36):
        return True
    # OS/2 puts the likeness of a FAT before JFS and HPFS.
    return sector[510:512] == b"\x55\xaa" and sector[0x36:0x3E] not in (b"JFS     ", b"HPFS    ")


def vfat(read: Read, size: int) -> Filesystem | None:
    """Recognise FAT12, FAT16 and FAT32."""
    sector = read(0, 512)
    if not _has_fat_magic(sector) or sector[3:11] in (b"-FVE-FS-", b"NTFS    ", b"EXFAT   "):
        return None
    fat = fat_geometry(sector)
    if fat is None:
        return None
    extended = sector[0x40:] if fat.is_fat32 else sector[0x24:]  # from the drive number on
    return Filesystem(
        kind="vfat",
        label=_label(lambda: _fat_label(read, fat)),
        uuid=_serial(extended[3:7]) if fat.is_fat32 or extended[2] in HAVE_SERIAL else "",
        size=fat.sectors * fat.sector_size,
        clean=not extended[1] & DIRTY,
    )


def _serial(field: bytes) -> str:
    digits = field[::-1].hex().upper()
    return f"{digits[:4]}-{digits[4:]}" if any(field) else ""


def _label(search: Callable[[], str]) -> str:
    """Return what `search` finds; a directory that cannot be read costs the label alone."""
    try:
        return search()
    except QcowfsError:
        return ""


def _fat_label(read: Read, fat: FatGeometry) -> str:
    for entry in _fat_root(read, fat):
        attributes = entry[11]
        if entry[0] == 0:
            break
        if entry[0] == DELETED or attributes & LONG_NAME == LONG_NAME:
            continue
        if attributes & (VOLUME_ID | DIRECTORY) == VOLUME_ID:
            name = b"\xe5" + entry[1:11] if entry[0] == 0x05 else entry[:11]
            return name.decode("utf-8", errors="surrogateescape").rstrip()
    return ""


def _fat_root(read: Read, fat: FatGeometry) -> Iterator[bytes]:
    if not fat.is_fat32:
        yield from _entries(read(fat.root, min(fat.root_entries * DIRECTORY_ENTRY, limits.MAX_ROOT_BYTES)))
        return
    size = fat.cluster_size * fat.sector_size
    table = fat.reserved * fat.sector_size
    for cluster in _cluster_chain(read, table, fat.root_cluster, fat.clusters, size):
        yield from _entries(read(fat.root + (cluster - 2) * size, size))


def _entries(directory: bytes) -> Iterator[bytes]:
    for place in range(0, len(directory) - DIRECTORY_ENTRY + 1, DIRECTORY_ENTRY):
        yield directory[place : place + DIRECTORY_ENTRY]


def _cluster_chain(read: Read, table: int, cluster: int, clusters: int, size: int) -> Iterator[int]:
    """Yield the clusters, each of `size` bytes, of a chain in a table of 32-bit entries: the first ones, to the cap."""
    for _ in range(min(limits.MAX_ROOT_CLUSTERS, -(-limits.MAX_ROOT_BYTES // size))):
        if not 2 <= cluster < clusters + 2:
            return
        yield cluster
        cluster = int.from_bytes(read(table + cluster * 4, 4), "little") & FAT32_MASK


def exfat(read: Read, size: int) -> Filesystem | None:
    """Recognise exFAT."""
    sector = read(0, 512)
    if sector[3:11] != b"EXFAT   ":
        return None
    length, fat_offset, _, heap, clusters, root = struct.unpack_from("<QIIIII", sector, 72)
    sector_bits, cluster_bits = sector[108], sector[109]
    if not 9 <= sector_bits <= 12 or sector_bits + cluster_bits > 25:
        return None

    size_of_cluster = 1 << (sector_bits + cluster_bits)

    def label() -> str:
        for cluster in _cluster_chain(read, fat_offset << sector_bits, root, clusters, size_of_cluster):
            place = (heap << sector_bits) + (cluster - 2) * size_of_cluster
            for entry in _entries(read(place, min(size_of_cluster, limits.MAX_ROOT_BYTES))):
                if entry[0] == 0:
                    return ""
                if entry[0] == EXFAT_LABEL:
                    return utf16(entry[2 : 2 + 2 * min(entry[1], 11)])
        return ""

    return Filesystem(
        kind="exfat",
        label=_label(label),
        uuid=_serial(sector[100:104]),
        size=length << sector_bits,
        clean=not sector[106] & EXFAT_DIRTY,
    )


def ntfs(read: Read, size: int) -> Filesystem | None:
    """Recognise NTFS."""
    sector = read(0, 512)
    sector_size, per_cluster = struct.unpack_from("<HB", sector, 11)
    sectors, mft, _, per_record, serial = struct.unpack_from("<QQQbxxx4xQ", sector, 40)
    if sector[3:11] != b"NTFS    " or any(sector[14:21]) or any(sector[22:24]) or any(sector[32:36]):  # FAT's fields
        return None
    if not _is_power_of_2(sector_size) or not 256 <= sector_size <= 4096:
        return None
    cluster_size = sector_size * (per_cluster if per_cluster <= 0x80 else 1 << min(256 - per_cluster, 31))
    record_size = 1 << -per_record if per_record < 0 else per_record * cluster_size
    if not cluster_size or not 512 <= record_size <= 4096 or mft > sectors:
        return None
    name, dirty = _ntfs_volume(read, mft * cluster_size + VOLUME_RECORD * record_size, record_size)
    return Filesystem(
        kind="ntfs",
        label=name,
        uuid=f"{serial:016X}",
        size=sectors * sector_size,
        clean=None if dirty is None else not dirty,
    )


def _ntfs_volume(read: Read, place: int, record_size: int) -> tuple[str, bool | None]:
    """Return the label and whether the volume is dirty, from the record of $Volume."""
    name, dirty = "", None
    try:
        record = read(place, record_size)
    except QcowfsError:
        return name, dirty
    if not record.startswith(b"FILE"):
        return name, dirty
    for kind, value in _attributes(record):
        if kind == VOLUME_NAME:
            name = utf16(value)
        elif kind == VOLUME_INFORMATION and len(value) >= 12:
            dirty = bool(value[10] & 1)
    return name, dirty


def _attributes(record: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield type and value of each attribute that is stored in the record itself."""
    place = int.from_bytes(record[20:22], "little")
    while place + 24 <= len(record):
        kind, length, elsewhere = struct.unpack_from("<IIB", record, place)
        if kind == LAST_ATTRIBUTE or length < 24:
            return
        value_length, value_offset = struct.unpack_from("<IH", record, place + 16)
        if not elsewhere:
            yield kind, record[place : place + length][value_offset : value_offset + value_length]
        place += length


def bitlocker(read: Read, size: int) -> Filesystem | None:
    """Recognise a BitLocker volume."""
    return Filesystem(kind="BitLocker") if read(3, 8) == b"-FVE-FS-" else None


PROBES = (exfat, ntfs, vfat)

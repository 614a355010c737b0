"""GUID partition tables (UEFI specification, 5.3), judged as Linux's block/partitions/efi.c does.

Used by partitions.py. Here more is believed than Linux does without `gpt` on its command line: the backup where the
first table is damaged, as sfdisk believes it, and a table that was made for a larger disk.
"""

from __future__ import annotations

import struct
import uuid
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from qcowfs import limits
from qcowfs.errors import QcowfsError
from qcowfs.inside.partitionlist import PartitionList
from qcowfs.inside.volume import Disk

__all__ = ["MAGIC", "PROTECTIVE", "SECTOR_SIZES", "is_protective", "read"]

MAGIC = b"EFI PART"
SECTOR_SIZES = (512, 4096)  # an image does not tell what its disk had
HEADER = struct.Struct("<8s4sIIxxxxQQQQ16sQIII")
ENTRY = struct.Struct("<16s16sQQQ72s")
PRIMARY_LBA = 1
PROTECTIVE = 0xEE
UNUSED = bytes(16)


class Header(NamedTuple):
    """The fields of a header that has the magic; sectors are the table's own."""

    magic: bytes
    revision: bytes
    length: int
    crc: int
    lba: int
    alternate_lba: int
    first_usable_lba: int
    last_usable_lba: int
    guid: bytes
    array_lba: int
    entries: int
    entry_size: int
    array_crc: int


def is_protective(sector: bytes) -> bool:
    """Tell whether an MBR with 0x55AA says that this disk has a GPT: a hybrid one counts, as in Linux."""
    return any(
        sector[place + 4] == PROTECTIVE and sector[place + 8 : place + 12] == b"\1\0\0\0"
        for place in range(0x1BE, 0x1FE, 16)
    )


def read(disk: Disk, found: PartitionList) -> None:
    """Add the partitions of a disk with a protective MBR to `found`, from its first GPT or else the backup."""
    for sector_size in SECTOR_SIZES:
        if _read_at(disk, sector_size, PRIMARY_LBA, found):
            return
    for sector_size in SECTOR_SIZES:
        for lba in _backups(disk, sector_size):
            if _read_at(disk, sector_size, lba, found):
                found.note(f"the GPT at the disk's start is damaged; its backup at {lba * sector_size:#x} is used")
                return
    found.note("the GPT and its backup are damaged; no partition is shown")


def _backups(disk: Disk, sector_size: int) -> Iterator[int]:
    """Yield where the backup may be: in the last sector, or where a damaged first header says."""
    last = disk.virtual_size // sector_size - 1
    yield last
    try:
        primary = _header(disk, sector_size, PRIMARY_LBA)
    except QcowfsError:
        return
    if primary is not None and PRIMARY_LBA < primary.alternate_lba < last:
        yield primary.alternate_lba


def _read_at(disk: Disk, sector_size: int, lba: int, found: PartitionList) -> bool:
    """Add the partitions of the table whose header is at `lba`; return False if it is not right, or cannot be read."""
    try:
        header = _header(disk, sector_size, lba)
        if header is None or not _is_right(disk, header, sector_size, lba):
            return False
        array = disk.pread(header.array_lba * sector_size, header.entries * ENTRY.size)
    except QcowfsError:
        return False
    if zlib.crc32(array) != header.array_crc or len(array) < header.entries * ENTRY.size:
        return False
    if (header.last_usable_lba + 1) * sector_size > disk.virtual_size:
        found.note("the GPT was made for a larger disk")
    for number, entry in enumerate(ENTRY.iter_unpack(array), start=1):
        _add(number, entry, sector_size, found)
    return True


def _header(disk: Disk, sector_size: int, lba: int) -> Header | None:
    data = disk.pread(lba * sector_size, sector_size) if lba > 0 else b""
    if len(data) < sector_size or not data.startswith(MAGIC):
        return None
    return Header(*HEADER.unpack_from(data))


def _is_right(disk: Disk, header: Header, sector_size: int, lba: int) -> bool:
    if not HEADER.size <= header.length <= sector_size or header.lba != lba:
        return False
    data = disk.pread(lba * sector_size, header.length)
    return (
        zlib.crc32(data[:16] + bytes(4) + data[20:]) == header.crc
        and header.entry_size == ENTRY.size
        and 0 < header.entries * ENTRY.size <= limits.MAX_GPT_ARRAY
        and header.array_lba * sector_size < disk.virtual_size
    )


def _add(number: int, entry: tuple[bytes, bytes, int, int, int, bytes], sector_size: int, found: PartitionList) -> None:
    kind, identity, first, last, _attributes, name = entry
    if kind == UNUSED or last < first:
        return
    found.add(
        number,
        first * sector_size,
        (last - first + 1) * sector_size,
        type=str(uuid.UUID(bytes_le=kind)).upper(),
        uuid=str(uuid.UUID(bytes_le=identity)),
        label=name.decode("utf-16-le", errors="replace").partition("\0")[0],
    )

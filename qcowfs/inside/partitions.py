"""Which partitions a disk has.

Used by contents.py. What counts as a table is what counts for Linux: a GPT only behind a protective MBR, an MBR only
with boot flags of 0 or 0x80. Nothing is believed twice: a disk has the one table or the other, or none.
"""

from __future__ import annotations

from qcowfs.errors import QcowfsError
from qcowfs.inside import gpt, mbr
from qcowfs.inside.filesystems import probe
from qcowfs.inside.partitionlist import PartitionList
from qcowfs.inside.probes import padded, windows
from qcowfs.inside.volume import Disk

__all__ = ["find"]


def find(disk: Disk, number: int = 0) -> PartitionList:
    """Return the partitions of `disk`, named p1 and so on as Linux numbers them; none if there is no table.

    Args:
        number: the disk's number, for the segments.
    """
    found = PartitionList(number, disk.virtual_size)
    try:
        sector = disk.pread(0, mbr.RECORD_SIZE)
    except QcowfsError as error:
        found.note(f"partitions are not looked for: {error}")
        return found
    if not mbr.has_signature(sector):
        _note_unprotected(disk, found)
    elif gpt.is_protective(sector):
        gpt.read(disk, found)
    elif mbr.is_table(sector) and not _is_boot_sector(disk, sector):
        mbr.read(disk, sector, found, _sector_size(disk, sector))
    return found


def _is_boot_sector(disk: Disk, sector: bytes) -> bool:
    """Tell whether the first sector is that of a FAT, exFAT or NTFS rather than a table.

    A disk that was one file system once and is partitioned now may look like both; then its entries decide.
    """
    if mbr.is_sane(sector, disk.virtual_size):
        return False
    read = padded(disk.pread, disk.virtual_size)
    return any(known(read, disk.virtual_size) is not None for known in windows.PROBES)


def _sector_size(disk: Disk, sector: bytes) -> int:
    """Return the length of the sectors that the entries of a boot record count: that at which something is found.

    For Linux it is the drive's. An image does not know it, and it is 512 nearly always.
    """
    used = [entry for entry in mbr.entries(sector) if entry.length]
    for sector_size in gpt.SECTOR_SIZES:
        if any(_is_something(disk, entry.start * sector_size, entry.is_extended) for entry in used):
            return sector_size
    return mbr.RECORD_SIZE


def _is_something(disk: Disk, start: int, is_extended: bool) -> bool:
    size = disk.virtual_size - start
    if size <= 0:
        return False
    try:
        if is_extended:
            return mbr.has_signature(disk.pread(start, mbr.RECORD_SIZE))
        return probe(lambda offset, length: disk.pread(start + offset, length), size) is not None
    except QcowfsError:
        return False


def _note_unprotected(disk: Disk, found: PartitionList) -> None:
    for sector_size in gpt.SECTOR_SIZES:
        try:
            if disk.pread(sector_size, len(gpt.MAGIC)) == gpt.MAGIC:
                found.note("there is a GPT, but no protective MBR; as in Linux it is not believed")
        except QcowfsError:
            continue

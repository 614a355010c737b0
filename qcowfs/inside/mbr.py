"""DOS partition tables and their chains of extended boot records, read as Linux's block/partitions/msdos.c does.

Used by partitions.py, which knows how long the disk's sectors are: the table counts in them, and does not tell. A boot
record is 512 bytes, whatever they are.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from qcowfs import limits
from qcowfs.errors import QcowfsError
from qcowfs.inside import gpt
from qcowfs.inside.partitionlist import PartitionList
from qcowfs.inside.volume import Disk

__all__ = ["RECORD_SIZE", "Entry", "entries", "has_signature", "is_sane", "is_table", "read"]

RECORD_SIZE = 512
ENTRIES = 0x1BE
ENTRY = struct.Struct("<BxxxBxxxII")
EXTENDED = (0x05, 0x0F, 0x85)
FIRST_LOGICAL = 5


class Entry(NamedTuple):
    """One of four; in sectors."""

    boot: int
    type: int
    start: int
    length: int

    @property
    def is_extended(self) -> bool:
        return self.type in EXTENDED


def has_signature(sector: bytes) -> bool:
    """Tell whether a whole sector ends with 0x55AA, as boot sectors of file systems do too."""
    return len(sector) == RECORD_SIZE and sector[-2:] == b"\x55\xaa"


def entries(sector: bytes) -> Sequence[Entry]:
    """Return the four entries, empty ones (of length 0) too."""
    return [Entry(*fields) for fields in ENTRY.iter_unpack(sector[ENTRIES : ENTRIES + 4 * ENTRY.size])]


def is_table(sector: bytes) -> bool:
    """Tell whether Linux would read partitions from this: text or code where the entries are has other boot flags.

    It reads none beside an entry for a GPT that starts elsewhere than a protective one.
    """
    return all(entry.boot in (0, 0x80) and entry.type != gpt.PROTECTIVE for entry in entries(sector))


def is_sane(sector: bytes, size: int) -> bool:
    """Tell whether the entries could be meant: what decides where the sector looks like a file system's as well."""
    used = [entry for entry in entries(sector) if entry.length]
    return bool(used) and all(entry.type and 0 < entry.start < size // RECORD_SIZE for entry in used)


def read(disk: Disk, sector: bytes, found: PartitionList, sector_size: int) -> None:
    """Add the partitions of a disk whose boot record is `sector` to `found`.

    Logical ones get the numbers from 5 on. An extended partition itself, for which Linux has a device of two sectors,
    holds nothing and is not listed.
    """
    signature = f"{int.from_bytes(sector[0x1B8:0x1BC], 'little'):08x}"
    chain = _Chain(disk, signature, found, sector_size)
    for number, entry in enumerate(entries(sector), start=1):
        if not entry.length:
            continue
        if entry.is_extended:
            chain.follow(entry)
        else:
            _add(found, number, entry.start, entry, signature, sector_size)
    found.volumes.sort(key=lambda volume: int(volume.name[1:]))


def _add(found: PartitionList, number: int, start: int, entry: Entry, signature: str, sector_size: int) -> None:
    found.add(
        number,
        start * sector_size,
        entry.length * sector_size,
        type=f"{entry.type:#x}",
        uuid=f"{signature}-{number:02x}" if signature.strip("0") else "",
    )


class _Chain:
    """The logical partitions: boot records that each name one, and the next record."""

    def __init__(self, disk: Disk, signature: str, found: PartitionList, sector_size: int) -> None:
        self._sector_size = sector_size
        self._disk = disk
        self._signature = signature
        self._found = found
        self._next = FIRST_LOGICAL

    def follow(self, extended: Entry) -> None:
        """Add what is in the extended partition `extended`. A record seen before ends the chain."""
        place, length = extended.start, extended.length
        seen: set[int] = set()
        empty = 0
        while empty <= limits.MAX_EMPTY_EBRS and self._next <= limits.MAX_PARTITIONS:
            if place in seen:
                self._found.note(f"the chain of logical partitions leads back to sector {place}")
                return
            seen.add(place)
            table = self._record(place)
            added = [self._logical(place, length, entry, extended, slot) for slot, entry in enumerate(table)]
            empty = 0 if any(added) else empty + 1
            link = next((entry for entry in table if entry.length and entry.is_extended), None)
            if link is None:
                return
            place, length = extended.start + link.start, link.length
        self._found.note("the chain of logical partitions is longer than Linux follows it")

    def _record(self, place: int) -> Sequence[Entry]:
        try:
            sector = self._disk.pread(place * self._sector_size, RECORD_SIZE)
        except QcowfsError as error:
            self._found.note(f"the chain of logical partitions ends at sector {place}: {error}")
            return []
        return entries(sector) if has_signature(sector) else []

    def _logical(self, place: int, length: int, entry: Entry, extended: Entry, slot: int) -> bool:
        """Add the partition of one entry of the record at `place`, unless it is empty, a link, or garbage."""
        start = place + entry.start
        if not entry.length or entry.is_extended or self._next > limits.MAX_PARTITIONS:
            return False
        if slot >= 2 and (
            entry.start + entry.length > length or start + entry.length > extended.start + extended.length
        ):
            return False
        _add(self._found, self._next, start, entry, self._signature, self._sector_size)
        self._next += 1
        return True

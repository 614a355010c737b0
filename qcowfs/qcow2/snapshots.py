"""The snapshot table of a qcow2 image: one frozen entry for each internal snapshot.

Used by chain and snapshot. Names and ids are bytes as users made them; nothing is interpreted here. Source: the qcow2
specification, "Snapshots". Pure functions over a Source; any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from qcowfs import limits
from qcowfs.errors import CorruptImage, SourceError
from qcowfs.qcow2.header import Header

if TYPE_CHECKING:
    from qcowfs._source import Source

__all__ = ["SnapshotEntry", "is_same_table", "read_snapshots", "validate_l1"]

FIXED_LENGTH = 40
HEADER_FIELDS = 0x3C  # of the header: nb_snapshots and snapshots_offset
_FIELDS = struct.Struct(">IQ")
NO_ICOUNT = (1 << 64) - 1
CHUNK = 1 << 20  # the table is read in pieces: its length is known only after its last entry


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotEntry:
    """One entry, as stored.

    Attributes:
        ordinal: its place in the table, from 0.
        l1_offset, l1_entries: its L1 table; not checked yet, see `validate_l1`.
        disk_size: bytes of the disk when it was made; None where it was not recorded, which means the active size
            (version 2 allows it; of version 3 the specification wants it, and QEMU reads images without it).
        icount: the instruction count of a recorded guest, None if there is none.
        stored: all bytes of it. No two snapshots of an image have the same, were they even made one after the other
            with the same name: they hold the time, to the microsecond.
        place: its host offset. Both take no part in comparisons.
    """

    ordinal: int
    id: bytes
    name: bytes
    l1_offset: int
    l1_entries: int
    date_sec: int
    date_nsec: int
    vm_clock_ns: int
    vm_state_size: int
    disk_size: int | None
    icount: int | None
    stored: bytes = field(default=b"", compare=False, repr=False)
    place: int = field(default=0, compare=False)


def read_snapshots(source: Source, header: Header) -> tuple[SnapshotEntry, ...]:
    """Read and check the snapshot table of `source`.

    Raises:
        CorruptImage: an entry breaks its rule, or the table exceeds its cap or the file.
        SourceError: it cannot be read.
    """
    table = _Table(source, header.snapshots_offset)
    return tuple(_entry(table, ordinal, header) for ordinal in range(header.snapshots_count))


def is_same_table(source: Source, header: Header, entries: Sequence[SnapshotEntry]) -> bool:
    """Tell, by two small reads, whether the table that `entries` were read from is still there.

    The last entry stands for all: another table with as many has one that was made later, and the latest is the last.

    Raises:
        OSError: it cannot be read.
    """
    if source.read_at(HEADER_FIELDS, _FIELDS.size) != _FIELDS.pack(header.snapshots_count, header.snapshots_offset):
        return False
    return all(source.read_at(last.place, len(last.stored)) == last.stored for last in entries[-1:])


class _Table:
    """The table's bytes, taken in order."""

    def __init__(self, source: Source, offset: int) -> None:
        self._source = source
        self._offset = offset  # of the table
        self._taken = 0  # bytes of it that were taken
        self._chunk = b""  # what was read last
        self._chunk_start = 0  # where in the table it starts

    @property
    def place(self) -> int:
        """Host offset of the next byte."""
        return self._offset + self._taken

    def take(self, length: int) -> bytes:
        if self._taken + length > limits.MAX_SNAPSHOT_TABLE_SIZE:
            raise self.corrupt(f"the table is larger than {limits.MAX_SNAPSHOT_TABLE_SIZE} bytes")
        if self._taken + length > self._chunk_start + len(self._chunk):
            self._chunk, self._chunk_start = self._read(self.place, max(CHUNK, length)), self._taken
        start = self._taken - self._chunk_start
        data = self._chunk[start : start + length]
        if len(data) < length:
            raise self.corrupt("the table lies past the end of the file: the image is truncated")
        self._taken += length
        return data

    def align(self) -> None:
        """Each entry starts at a multiple of 8; the file may end before the padding of the last one."""
        self._taken += -self._taken % 8

    def corrupt(self, why: str) -> CorruptImage:
        return CorruptImage(self._source.name, f"bad snapshot table at {self.place:#x}", why)

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return self._source.read_at(offset, length)
        except OSError as error:
            raise SourceError.from_oserror(self._source.name, "cannot read the snapshot table", error) from error


def _entry(table: _Table, ordinal: int, header: Header) -> SnapshotEntry:
    table.align()
    place, fixed = table.place, table.take(FIXED_LENGTH)
    l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, clock, vm_state_size, extra_length = (
        struct.unpack(">QIHHIIQII", fixed)
    )
    if extra_length > limits.MAX_SNAPSHOT_EXTRA_SIZE:
        raise table.corrupt(f"{extra_length} bytes of extra data, at most {limits.MAX_SNAPSHOT_EXTRA_SIZE}")
    extra = table.take(extra_length)
    large_vm_state, disk_size, icount = (_word(extra, place) for place in (0, 8, 16))
    if disk_size is not None and disk_size > limits.MAX_VIRTUAL_SIZE:
        raise table.corrupt(f"a disk of {disk_size:#x} bytes, at most {limits.MAX_VIRTUAL_SIZE:#x}")
    entry_id, name = table.take(id_length), table.take(name_length)
    return SnapshotEntry(
        ordinal=ordinal,
        id=entry_id,
        name=name,
        l1_offset=l1_offset,
        l1_entries=l1_entries,
        date_sec=seconds,
        date_nsec=nanoseconds,
        vm_clock_ns=clock,
        vm_state_size=vm_state_size if large_vm_state is None else large_vm_state,
        disk_size=disk_size,
        icount=None if icount == NO_ICOUNT else icount,
        stored=fixed + extra + entry_id + name,
        place=place,
    )


def _word(extra: bytes, place: int) -> int | None:
    return int.from_bytes(extra[place : place + 8], "big") if len(extra) >= place + 8 else None


def validate_l1(source: Source, header: Header, entry: SnapshotEntry) -> None:
    """Check where the L1 table of `entry` is. Only when it is used: a bad one spoils this snapshot and no other.

    Raises:
        CorruptImage: it is not aligned to a cluster, or larger than an L1 table may be, or beyond any file's end.
    """
    what = f"bad L1 table of snapshot {entry.ordinal + 1}"
    if entry.l1_entries * 8 > limits.MAX_L1_SIZE:
        why = f"{entry.l1_entries} entries, at most {limits.MAX_L1_SIZE // 8} were expected"
        raise CorruptImage(source.name, what, why)
    if entry.l1_offset % header.cluster_size:
        why = f"it is at {entry.l1_offset:#x}, a multiple of the cluster size {header.cluster_size:#x} was expected"
        raise CorruptImage(source.name, what, why)
    if entry.l1_offset + entry.l1_entries * 8 > limits.MAX_HOST_OFFSET:
        raise CorruptImage(source.name, what, f"it is at {entry.l1_offset:#x}, beyond what a file can have")

"""NTFS's master file table: its records, their attributes, and where the bytes of those are.

Used by ntfs.py and ntfsindex.py. Sizes and places are in bytes, but for clusters where a name says so. What is torn,
does not fit together or repeats itself raises OSError (EIO).
"""

from __future__ import annotations

import errno
import struct
from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qcowfs import limits
from qcowfs.inside.reader import INLINE, Device, Extents, Unreadable
from qcowfs.inside.record import Extent

__all__ = ["COMPRESSED", "ENCRYPTED", "RECORD_BITS", "Attribute", "Geometry", "Mft", "Record", "geometry", "mended"]

STRIDE = 512  # bytes whose last two are replaced on the disk, to tell a torn write
RECORD_BITS = 48  # of a file reference; the rest is a sequence number, one more for each file that had the record
IN_USE, DIRECTORY = 1, 2  # flags of a record
COMPRESSED, ENCRYPTED, SPARSE = 0x00FF, 0x4000, 0x8000  # flags of an attribute
ATTRIBUTE_LIST, DATA, END = 0x20, 0x80, 0xFFFFFFFF
HOLE = -1
MAX_CLUSTER_BITS = 54  # a cluster of 512 bytes behind that would be further than a file can be long
HELD_RECORDS = 64


class Geometry(NamedTuple):
    """What the boot sector says: bytes of a cluster and of a record, and where the table begins."""

    cluster: int
    record: int
    table: int


def geometry(sector: bytes) -> Geometry:
    """Return what a boot sector says.

    Raises:
        Unreadable: it makes no sense.
    """
    sector_size, per_cluster = struct.unpack_from("<HB", sector, 11)
    table, per_record = struct.unpack_from("<Q8xb", sector, 48)
    sectors = per_cluster if per_cluster <= 0x80 else 1 << min(256 - per_cluster, 31)
    cluster = sector_size * sectors
    record = 1 << -per_record if per_record < 0 else per_record * cluster
    if sector[3:11] != b"NTFS    " or sector_size not in (256, 512, 1024, 2048, 4096):
        raise Unreadable("NTFS: a boot sector that makes no sense")
    if (
        not 256 <= cluster <= limits.MAX_NTFS_CLUSTER
        or cluster & (cluster - 1)
        or record not in (512, 1024, 2048, 4096)
    ):
        raise Unreadable("NTFS: clusters or records of an impossible size")
    return Geometry(cluster, record, table * cluster)


def damaged(what: str) -> OSError:
    """Return the error for what is wrong on the volume."""
    return OSError(errno.EIO, what)


def mended(stored: bytes, magic: bytes) -> bytes:
    """Return a record or an index block as it was before its strides were marked."""
    if stored[:4] != magic:
        raise damaged(f"a record without its mark {magic.decode()}")
    place, count = struct.unpack_from("<HH", stored, 4)
    if count != len(stored) // STRIDE + 1 or place + 2 * count > len(stored):
        raise damaged("a record whose marks are not where they can be")
    mark, mendings = stored[place : place + 2], stored[place + 2 : place + 2 * count]
    whole = bytearray(stored)
    for number in range(count - 1):
        end = (number + 1) * STRIDE
        if whole[end - 2 : end] != mark:
            raise damaged("a record that was written in part")
        whole[end - 2 : end] = mendings[2 * number : 2 * number + 2]
    return bytes(whole)


class Attribute:
    """An attribute of a file: bytes in its record (`value`), or in clusters."""

    def __init__(self, kind: int, name: bytes, stored: bytes) -> None:
        """Take an attribute apart; `name` is in UTF-16, `stored` the whole of it."""
        self.kind = kind
        self.name = name
        self.flags = int.from_bytes(stored[12:14], "little")
        self.value: bytes | None = None
        self.first = 0  # the first of its clusters that is told here; others are told in other records
        self.size = self.valid = self.allocated = 0  # `valid`: what was ever written of it; the rest is zeros
        self._mappings: list[tuple[int, bytes]] = []
        if not stored[8]:
            length, place = struct.unpack_from("<IH", stored, 16)
            if place + length > len(stored):
                raise damaged("an attribute that is longer than its record")
            self.value = stored[place : place + length]
            self.size = self.valid = length
            self.allocated = -(-length // 8) * 8
            return
        if len(stored) < 64:
            raise damaged("an attribute that is cut off")
        self.first, place = struct.unpack_from("<Q8xH", stored, 16)
        self._mappings.append((self.first, stored[place:]))
        if self.first:
            return  # only the first of several records tells sizes
        self.allocated, self.size, self.valid = struct.unpack_from("<QQQ", stored, 40)
        if self.flags & (COMPRESSED | SPARSE) and len(stored) >= 72:
            (self.allocated,) = struct.unpack_from("<Q", stored, 64)
        if max(self.allocated, self.size) >> 63:
            raise damaged("an attribute of an impossible size")
        self.valid = min(self.valid, self.size)

    def join(self, others: Sequence[Attribute]) -> None:
        """Add what other records tell of this attribute's clusters."""
        for other in others:
            self._mappings += other._mappings

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Yield first cluster of the attribute, count, and first cluster of the volume, or HOLE."""
        place, count = 0, 0
        for first, mapping in self._mappings:
            if first != place:
                raise damaged("an attribute whose pieces do not fit together")
            for length, cluster in _decode(mapping):
                yield place, length, cluster
                place += length
                count += 1
                if count > limits.MAX_NTFS_RUNS or place >> MAX_CLUSTER_BITS:
                    raise damaged("an attribute in too many pieces, or too long")


def _decode(mapping: bytes) -> Iterator[tuple[int, int]]:
    """Yield count and first cluster of each run. Each tells only how far it is from the one before."""
    at, cluster = 0, 0
    while at < len(mapping) and mapping[at]:
        length_size, offset_size = mapping[at] & 15, mapping[at] >> 4
        middle, end = at + 1 + length_size, at + 1 + length_size + offset_size
        length = int.from_bytes(mapping[at + 1 : middle], "little")
        if end > len(mapping) or not 0 < length < 1 << 48 or offset_size > 8:
            raise damaged("a run of clusters that cannot be")
        cluster += int.from_bytes(mapping[middle:end], "little", signed=True)
        if not 0 <= cluster < 1 << MAX_CLUSTER_BITS:
            raise damaged("a run of clusters outside the volume")
        yield length, cluster if offset_size else HOLE
        at = end


class Record(NamedTuple):
    """A record of the table, with the attributes that its other records hold."""

    sequence: int
    links: int
    is_directory: bool
    attributes: Sequence[Attribute]

    def find(self, kind: int, name: bytes = b"") -> Attribute | None:
        """Return the attribute of this kind and name (in UTF-16)."""
        return next((found for found in self.attributes if found.kind == kind and found.name == name), None)


class Mft:
    """The table, and the bytes of attributes."""

    def __init__(self, device: Device, shape: Geometry) -> None:
        self._device = device
        self._shape = shape
        self._held: OrderedDict[int, Record] = OrderedDict()
        self._mapped: tuple[Attribute | None, array[int], array[int], array[int]] = (None, *(array("q"),) * 3)
        stored = mended(device.read(shape.table, shape.record), b"FILE")
        self._table = _data(_attributes(stored))
        self._table = _data(self._gather(0, stored))  # may lie in more pieces, which it tells itself

    @property
    def count(self) -> int:
        """Records of the table."""
        return self._table.size // self._shape.record

    def record(self, number: int) -> Record:
        """Return a record.

        Raises:
            OSError: ENOENT, it is no file's, or not the first one of a file.
        """
        held = self._held.get(number)
        if held is None:
            stored = self._stored(number)
            sequence, links, flags = struct.unpack_from("<HH2xH", stored, 16)
            if not flags & IN_USE or int.from_bytes(stored[32:40], "little"):
                raise FileNotFoundError(errno.ENOENT, "a deleted file")
            held = Record(sequence, links, bool(flags & DIRECTORY), self._gather(number, stored))
            self._held[number] = held
            if len(self._held) > HELD_RECORDS:
                self._held.popitem(last=False)
        return held

    def read(self, attribute: Attribute, offset: int, length: int) -> bytes:
        """Return bytes of an attribute, fewer only at its end."""
        length = max(min(length, attribute.size - offset), 0)
        whole = bytearray(length)
        place = offset
        while place < offset + length:
            found = self.extents(attribute, place, 64)
            for start, size, at in found.extents:
                first, end = max(start, offset), min(start + size, offset + length)
                if first >= end:
                    continue
                at += first - start
                inline = at - INLINE
                piece = (
                    found.inline[inline : inline + end - first] if at >= INLINE else self._device.read(at, end - first)
                )
                whole[first - offset : end - offset] = piece
            place = found.end
        return bytes(whole)

    def extents(self, attribute: Attribute, offset: int, limit: int) -> Extents:
        """Return where the bytes of an attribute are stored, as reader.Reader.extents does."""
        if offset >= attribute.size:
            return Extents([], attribute.size)
        if attribute.value is not None:
            return Extents([Extent(0, attribute.size, INLINE)], attribute.size, attribute.value)
        starts, lengths, firsts = self._runs(attribute)
        unit, valid = self._shape.cluster, attribute.valid
        number = max(bisect_right(starts, offset // unit) - 1, 0)
        stored: list[Extent] = []
        for run in range(number, len(starts)):
            start = starts[run] * unit
            length = min(lengths[run] * unit, valid - start)
            if length <= 0:
                break
            if firsts[run] == HOLE:
                continue
            if len(stored) == limit:
                return Extents(stored, start)
            if firsts[run] * unit + length > self._device.size:
                raise damaged("a run of clusters behind the volume")
            stored.append(Extent(start, length, firsts[run] * unit))
        mapped = (starts[-1] + lengths[-1]) * unit if starts else 0
        if mapped < valid:
            if offset >= mapped:
                raise damaged("a file with fewer clusters than it needs")
            return Extents(stored, mapped)
        return Extents(stored, attribute.size)

    def _runs(self, attribute: Attribute) -> tuple[array[int], array[int], array[int]]:
        """Return the runs of an attribute: starts, counts, and clusters; those of the last one are held."""
        if self._mapped[0] is not attribute:
            starts, lengths, firsts = array("q"), array("q"), array("q")
            for start, length, first in attribute.runs():
                starts.append(start)
                lengths.append(length)
                firsts.append(first)
            self._mapped = attribute, starts, lengths, firsts
        return self._mapped[1:]

    def _stored(self, number: int) -> bytes:
        size = self._shape.record
        if not 0 <= number < self.count:
            raise FileNotFoundError(errno.ENOENT, "no such record")
        return mended(self.read(self._table, number * size, size), b"FILE")

    def _gather(self, number: int, stored: bytes) -> list[Attribute]:
        """Return the attributes of a file, those of its other records among them, each in one piece."""
        found = _attributes(stored)
        listed = next((attribute for attribute in found if attribute.kind == ATTRIBUTE_LIST), None)
        if listed is None:
            return found
        self._held.clear()  # of files with so many records, no more than one is held
        for other in self._others(number, listed):
            more = self._stored(other)
            if int.from_bytes(more[32:40], "little") & ((1 << RECORD_BITS) - 1) != number:
                raise damaged("a record that belongs to another file")
            found += _attributes(more)
        return _joined(found)

    def _others(self, number: int, listed: Attribute) -> Sequence[int]:
        """Return the numbers of a file's other records."""
        if listed.size > limits.MAX_NTFS_ATTRIBUTE_LIST:
            raise damaged("a list of attributes that is too long")
        stored, at = self.read(listed, 0, listed.size), 0
        numbers: dict[int, None] = {}
        while at + 26 <= len(stored):
            length, reference = struct.unpack_from("<4xH10xQ", stored, at)
            if length < 26:
                raise damaged("an entry of a list of attributes that is too short")
            numbers[reference & ((1 << RECORD_BITS) - 1)] = None
            at += length
        numbers.pop(number, None)
        if len(numbers) > limits.MAX_NTFS_RECORDS:
            raise damaged("a file of too many records")
        return list(numbers)


def _data(attributes: Sequence[Attribute]) -> Attribute:
    for attribute in attributes:
        if attribute.kind == DATA and not attribute.name:
            return attribute
    raise damaged("a master file table without data")


def _attributes(stored: bytes) -> list[Attribute]:
    """Return the attributes that one record holds."""
    found: list[Attribute] = []
    at = int.from_bytes(stored[20:22], "little")
    while at + 4 <= len(stored):
        kind = int.from_bytes(stored[at : at + 4], "little")
        if kind == END:
            return found
        length = int.from_bytes(stored[at + 4 : at + 8], "little")
        if length < 24 or at + length > len(stored):
            break
        whole = stored[at : at + length]
        name = int.from_bytes(whole[10:12], "little")
        found.append(Attribute(kind, whole[name : name + 2 * whole[9]], whole))
        at += length
    raise damaged("attributes that run over the end of their record")


def _joined(attributes: Sequence[Attribute]) -> list[Attribute]:
    """Return attributes, with those that are in several records in one piece."""
    pieces: dict[tuple[int, bytes, bool, int], list[Attribute]] = {}
    for number, attribute in enumerate(attributes):
        alone = number if attribute.value is not None else -1  # a file has several names, for one
        pieces.setdefault((attribute.kind, attribute.name, attribute.value is None, alone), []).append(attribute)
    for group in pieces.values():
        group.sort(key=lambda attribute: attribute.first)
        group[0].join(group[1:])
    return [group[0] for group in pieces.values()]

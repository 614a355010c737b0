"""The bitmap directory of a qcow2 image: one frozen entry for each persistent dirty bitmap.

Used by `info`. The bitmaps' own bits are not read here. Source: the qcow2 specification, "Bitmaps extension" and
"Bitmap directory". Pure functions over a Source; any thread.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcowfs import limits
from qcowfs.errors import CorruptImage, SourceError
from qcowfs.qcow2.header import Header

if TYPE_CHECKING:
    from qcowfs._source import Source

__all__ = ["Bitmap", "read_bitmaps"]

FIXED = struct.Struct(">QIIBBHI")
IN_USE, AUTO = range(2)  # flag bits
DIRTY_TRACKING = 1  # the only type there is


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitmap:
    """One entry of the directory, as stored.

    Attributes:
        granularity_bits: log2 of the bytes of disk that one bit stands for.
        consistent: the bits can be trusted: nobody who does not know bitmaps wrote the image, and it was closed.
    """

    name: bytes
    table_offset: int
    table_entries: int
    flags: int
    granularity_bits: int
    consistent: bool

    @property
    def granularity(self) -> int:
        """Bytes of disk that one bit stands for."""
        return 1 << self.granularity_bits

    @property
    def in_use(self) -> bool:
        """It was not saved when the image was last closed."""
        return bool(self.flags >> IN_USE & 1)

    @property
    def auto(self) -> bool:
        """It records writes by itself."""
        return bool(self.flags >> AUTO & 1)


def read_bitmaps(source: Source, header: Header) -> tuple[Bitmap, ...]:
    """Read and check the bitmap directory; () if there is none.

    Raises:
        CorruptImage: an entry breaks its rule, or the directory exceeds its cap or the file.
        SourceError: it cannot be read.
    """
    extension = header.bitmaps
    if extension is None:
        return ()
    if not 1 <= extension.count <= limits.MAX_BITMAPS:
        raise _corrupt(source, 0, f"{extension.count} bitmaps, 1 to {limits.MAX_BITMAPS} were expected")
    if extension.directory_size > limits.MAX_BITMAP_DIRECTORY_SIZE:
        raise _corrupt(source, extension.directory_offset, f"{extension.directory_size} bytes are too many")
    if extension.directory_offset % header.cluster_size or extension.directory_offset >= limits.MAX_VIRTUAL_SIZE:
        raise _corrupt(source, extension.directory_offset, "its offset is not aligned to a cluster")
    data = _read(source, extension.directory_offset, extension.directory_size)
    return _entries(source, header, extension.count, data)


def _entries(source: Source, header: Header, count: int, data: bytes) -> tuple[Bitmap, ...]:
    found: list[Bitmap] = []
    place = 0
    while place < len(data):  # every entry has a fixed part
        entry, length = _entry(source, header, data, place)
        found.append(entry)
        place += -(-length // 8) * 8
    if len(found) != count:
        raise _corrupt(source, place, f"{len(found)} entries, the header says {count}")
    return tuple(found)


def _entry(source: Source, header: Header, data: bytes, place: int) -> tuple[Bitmap, int]:
    if place + FIXED.size > len(data):
        raise _corrupt(source, place, "an entry is cut off")
    offset, entries, flags, kind, granularity_bits, name_length, extra_length = FIXED.unpack_from(data, place)
    length = FIXED.size + extra_length + name_length
    if place + length > len(data):
        raise _corrupt(source, place, f"an entry of {length} bytes does not fit")
    if kind != DIRTY_TRACKING:
        raise _corrupt(source, place, f"type {kind}, {DIRTY_TRACKING} was expected")
    if not limits.MIN_BITMAP_GRANULARITY_BITS <= granularity_bits <= limits.MAX_BITMAP_GRANULARITY_BITS:
        raise _corrupt(source, place, f"granularity_bits {granularity_bits}")
    if entries > limits.MAX_BITMAP_TABLE_ENTRIES or offset % header.cluster_size:
        raise _corrupt(source, place, f"a bitmap table of {entries} entries at {offset:#x}")
    end = place + length
    bitmap = Bitmap(
        name=data[end - name_length : end],
        table_offset=offset,
        table_entries=entries,
        flags=flags,
        granularity_bits=granularity_bits,
        consistent=header.bitmaps_valid and not flags >> IN_USE & 1,
    )
    return bitmap, length


def _read(source: Source, offset: int, length: int) -> bytes:
    try:
        data = source.read_at(offset, length)
    except OSError as error:
        raise SourceError.from_oserror(source.name, "cannot read the bitmap directory", error) from error
    if len(data) < length:
        raise _corrupt(source, offset, "it lies past the end of the file: the image is truncated")
    return data


def _corrupt(source: Source, place: int, why: str) -> CorruptImage:
    return CorruptImage(source.name, f"bad bitmap directory at {place:#x}", why)

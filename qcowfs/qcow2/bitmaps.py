"""The bitmap directory of a qcow2 image: one frozen entry for each persistent dirty bitmap.

Used by `info`. The bitmaps' own bits are not read here. Source: the qcow2 specification, "Bitmaps extension" and
"Bitmap directory". Pure functions over a Source; any thread.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcowfs import limits
from qcowfs.errors import CorruptImage, SourceError, printable
from qcowfs.qcow2.header import BitmapsExtension, Header

if TYPE_CHECKING:
    from qcowfs._source import Source

__all__ = ["Bitmap", "read_bitmaps"]

FIXED = struct.Struct(">QIIBBHI")
IN_USE, AUTO, EXTRA_DATA_COMPATIBLE = range(3)  # flag bits
KNOWN_FLAGS = 0b111
DIRTY_TRACKING = 1  # the only type there is


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitmap:
    """One entry of the directory, as stored.

    Attributes:
        table_offset, table_entries: where its table is, in bytes and in entries of 8 bytes.
        granularity_bits: log2 of the bytes of disk that one bit stands for.
        consistent: the bits can be trusted: nobody who does not know bitmaps wrote the image, it was closed, and the
            entry holds nothing that would have to be understood first.
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

    A directory that somebody left behind who does not know bitmaps is read too, as inconsistent, if it is whole still:
    its clusters may have got another use since, so its being broken is no fault of the image.

    Raises:
        CorruptImage: an entry breaks its rule, or the directory exceeds its cap or the file.
        SourceError: it cannot be read.
    """
    if header.bitmaps is None:
        return ()
    try:
        return _Directory(source, header, header.bitmaps).entries()
    except CorruptImage:
        if header.bitmaps_valid:
            raise
        return ()


class _Directory:
    """The directory's bytes, and the checks of its entries."""

    def __init__(self, source: Source, header: Header, extension: BitmapsExtension) -> None:
        self._source = source
        self._header = header
        self._start = extension.directory_offset
        self._count = extension.count
        self._check_extension(extension)
        self._data = self._read(extension.directory_size)

    def entries(self) -> tuple[Bitmap, ...]:
        found: dict[bytes, Bitmap] = {}
        place = 0
        while place < len(self._data):  # every entry has a fixed part
            bitmap, length = self._entry(place)
            if bitmap.name in found:
                raise self._corrupt(place, f"a second bitmap with the name {printable(bitmap.name)}")
            found[bitmap.name] = bitmap
            place += length
        if len(found) != self._count:
            raise self._corrupt(place, f"{len(found)} entries, the header extension says {self._count}")
        return tuple(found.values())

    def _corrupt(self, place: int, why: str) -> CorruptImage:
        return CorruptImage(self._source.name, f"bad bitmap directory at {self._start + place:#x}", why)

    def _check_extension(self, extension: BitmapsExtension) -> None:
        if not 1 <= extension.count <= limits.MAX_BITMAPS:
            raise self._corrupt(0, f"{extension.count} bitmaps, 1 to {limits.MAX_BITMAPS} were expected")
        if extension.reserved:
            raise self._corrupt(0, f"the reserved field is {extension.reserved:#x}, 0 was expected")
        if not 1 <= extension.directory_size <= limits.MAX_BITMAP_DIRECTORY_SIZE:
            why = f"{extension.directory_size} bytes, 1 to {limits.MAX_BITMAP_DIRECTORY_SIZE} were expected"
            raise self._corrupt(0, why)
        self._check_offset(0, "the directory", self._start, extension.directory_size)

    def _check_offset(self, place: int, what: str, offset: int, length: int) -> None:
        if not offset or offset % self._header.cluster_size:
            why = f"a multiple of the cluster size {self._header.cluster_size:#x} was expected"
            raise self._corrupt(place, f"{what} is at {offset:#x}, {why}")
        if offset + length > limits.MAX_HOST_OFFSET:
            raise self._corrupt(place, f"{what} is at {offset:#x}, beyond what a file can have")

    def _read(self, length: int) -> bytes:
        try:
            data = self._source.read_at(self._start, length)
        except OSError as error:
            raise SourceError.from_oserror(self._source.name, "cannot read the bitmap directory", error) from error
        if len(data) < length:
            raise self._corrupt(0, "it lies past the end of the file: the image is truncated")
        return data

    def _entry(self, place: int) -> tuple[Bitmap, int]:
        """Return the entry at `place`, and its length with the padding."""
        if place + FIXED.size > len(self._data):
            why = f"{len(self._data) - place} bytes are left, an entry of {FIXED.size} was expected"
            raise self._corrupt(place, why)
        offset, entries, flags, kind, granularity_bits, name_length, extra_length = FIXED.unpack_from(self._data, place)
        end = place + FIXED.size + extra_length + name_length
        padded = end + -end % 8
        if padded > len(self._data):
            raise self._corrupt(place, f"an entry of {padded - place} bytes does not fit")
        if kind != DIRTY_TRACKING:
            raise self._corrupt(place, f"type {kind}, {DIRTY_TRACKING} was expected")
        if flags & ~KNOWN_FLAGS:
            raise self._corrupt(place, f"flags {flags:#x}, at most {KNOWN_FLAGS:#x} was expected")
        if name_length > limits.MAX_BITMAP_NAME:
            raise self._corrupt(place, f"a name of {name_length} bytes, at most {limits.MAX_BITMAP_NAME} were expected")
        bitmap = Bitmap(
            name=self._data[end - name_length : end],
            table_offset=offset,
            table_entries=entries,
            flags=flags,
            granularity_bits=granularity_bits,
            consistent=self._header.bitmaps_valid and self._trustworthy(flags, extra_length),
        )
        self._check_table(place, bitmap)
        return bitmap, padded - place

    @staticmethod
    def _trustworthy(flags: int, extra_length: int) -> bool:
        """Extra data is not known here, as in QEMU; the specification has a flag that says whether it matters."""
        return not flags >> IN_USE & 1 and (not extra_length or bool(flags >> EXTRA_DATA_COMPATIBLE & 1))

    def _check_table(self, place: int, bitmap: Bitmap) -> None:
        bits, smallest, largest = (
            bitmap.granularity_bits,
            limits.MIN_BITMAP_GRANULARITY_BITS,
            limits.MAX_BITMAP_GRANULARITY_BITS,
        )
        if not smallest <= bits <= largest:
            raise self._corrupt(place, f"granularity_bits {bits}, {smallest} to {largest} was expected")
        most = limits.MAX_BITMAP_SIZE // self._header.cluster_size
        if not 1 <= bitmap.table_entries <= most:
            raise self._corrupt(place, f"a table of {bitmap.table_entries} entries, 1 to {most} were expected")
        self._check_offset(place, "a bitmap table", bitmap.table_offset, bitmap.table_entries * 8)
        needed = -(-self._header.virtual_size // (self._header.cluster_size * 8 << bits))
        if bitmap.consistent and bitmap.table_entries != needed:
            why = f"a table of {bitmap.table_entries} entries, {needed} were expected for the virtual size"
            raise self._corrupt(place, why)

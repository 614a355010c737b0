"""The header of a qcow2 image, versions 2 and 3, with its extensions: bytes on disk -> one frozen, checked object.

Used by chain and by the compiled rooms (as numbers). Every field is compared with its rule and its cap before it is
used; where QEMU refuses an image, so does this. Source: the qcow2 specification, "Header" and "Header extensions".
Pure functions over a Source; any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

from qcowfs import limits
from qcowfs.errors import CorruptImage, NotAnImage, SourceError, UnsupportedImage, printable

if TYPE_CHECKING:
    from qcowfs._source import Source

__all__ = ["MAGIC", "BitmapsExtension", "Header", "read_header"]

MAGIC = b"QFI\xfb"
VERSION_2_LENGTH = 72
VERSION_3_LENGTH = 104
COMPRESSION_TYPE_OFFSET = 104

DIRTY, CORRUPT, EXTERNAL_DATA, COMPRESSION_TYPE, EXTENDED_L2 = range(5)  # incompatible feature bits
KNOWN_INCOMPATIBLE = (1 << 5) - 1
LAZY_REFCOUNTS = 0  # compatible feature bit
BITMAPS_VALID, RAW_EXTERNAL_DATA = range(2)  # autoclear feature bits

END = 0x00000000
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
BITMAPS = 0x23852875
CRYPTO = 0x0537BE77
DATA_FILE = 0x44415441
INCOMPATIBLE, COMPATIBLE, AUTOCLEAR = range(3)  # kinds of the feature name table


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapsExtension:
    """Where the bitmap directory is; offsets and sizes in bytes."""

    count: int
    directory_size: int
    directory_offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header. Offsets and sizes are in bytes, in the words of the specification.

    Attributes:
        size: as stored; `virtual_size` is what QEMU makes of it.
        crypt_method: 0 none, 1 AES, 2 LUKS.
        l1_offset, l1_entries: the active L1 table, checked to be aligned, capped and long enough.
        zstd: the compression type is zstd, not deflate.
        backing_name, backing_format, data_file_name: as stored, any bytes; None where there is none.
        feature_names: (kind, bit) -> name; kind 0 incompatible, 1 compatible, 2 autoclear.
    """

    version: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_offset: int
    l1_entries: int
    refcount_table_offset: int
    refcount_table_clusters: int
    refcount_order: int
    snapshots_offset: int
    snapshots_count: int
    header_length: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    zstd: bool = False
    backing_name: bytes | None = None
    backing_format: bytes | None = None
    data_file_name: bytes | None = None
    bitmaps: BitmapsExtension | None = None
    feature_names: Mapping[tuple[int, int], str] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def virtual_size(self) -> int:
        """Bytes of the active disk: QEMU counts whole sectors of 512 bytes."""
        return self.size & ~511

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def encrypted(self) -> bool:
        return self.crypt_method != 0

    @property
    def dirty(self) -> bool:
        """Refcounts may be stale; the tables are right."""
        return bool(self.incompatible >> DIRTY & 1)

    @property
    def corrupt(self) -> bool:
        """QEMU found the metadata damaged and refuses to write."""
        return bool(self.incompatible >> CORRUPT & 1)

    @property
    def external_data(self) -> bool:
        return bool(self.incompatible >> EXTERNAL_DATA & 1)

    @property
    def data_file_raw(self) -> bool:
        """The external data file is the whole disk by itself."""
        return bool(self.autoclear >> RAW_EXTERNAL_DATA & 1) and self.external_data

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible >> EXTENDED_L2 & 1)

    @property
    def lazy_refcounts(self) -> bool:
        return bool(self.compatible >> LAZY_REFCOUNTS & 1)

    @property
    def bitmaps_valid(self) -> bool:
        """False: somebody who does not know bitmaps wrote the image, so they are out of date."""
        return bool(self.autoclear >> BITMAPS_VALID & 1)

    @property
    def l2_entry_size(self) -> int:
        return 16 if self.extended_l2 else 8

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table, which is always one cluster."""
        return self.cluster_size // self.l2_entry_size

    @property
    def refcount_bits(self) -> int:
        return 1 << self.refcount_order

    @property
    def compat(self) -> str:
        """QEMU's name of the version."""
        return "1.1" if self.version == 3 else "0.10"

    @property
    def compression_name(self) -> str:
        return "zstd" if self.zstd else "zlib"


def read_header(source: Source) -> Header:
    """Read and check the header of `source`.

    Raises:
        NotAnImage: it does not start with qcow2's magic.
        CorruptImage: a field breaks its rule or exceeds its cap.
        UnsupportedImage: a version or an incompatible feature that is not known.
        SourceError: it cannot be read.
    """
    return _Parser(source).header()


class _Parser:
    """The header's bytes, and the checks in the order in which fields depend on each other."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._data = self._read(0, VERSION_3_LENGTH + 8)

    def header(self) -> Header:
        version = self._version()
        fields = self._fields(version)
        fields |= self._version_3_fields(fields) if version == 3 else {}
        self._check_geometry(fields)
        self._check_tables(fields)
        room_end = self._backing_room(fields)
        extensions = dict(self._extensions(fields["header_length"], room_end))
        self._check_features(fields, _feature_names(extensions.get(FEATURE_NAMES, b"")))
        return Header(**self._without_backing(fields), **self._from_extensions(fields, extensions))

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return self._source.read_at(offset, length)
        except OSError as error:
            raise SourceError.from_oserror(self._source.name, "cannot read the header", error) from error

    def _corrupt(self, what: str, why: str) -> CorruptImage:
        return CorruptImage(self._source.name, what, why)

    def _version(self) -> int:
        if self._data[:4] != MAGIC:
            raise NotAnImage(self._source.name, "not a qcow2 image", "it does not start with QFI\\xfb")
        if len(self._data) < VERSION_2_LENGTH:
            raise self._corrupt("the header is cut off", f"{len(self._data)} bytes, a header has {VERSION_2_LENGTH}")
        version: int = struct.unpack_from(">I", self._data, 4)[0]
        if version not in (2, 3):
            raise UnsupportedImage(self._source.name, f"qcow2 version {version}", "versions 2 and 3 are supported")
        return version

    def _fields(self, version: int) -> dict[str, int]:
        names = (
            "backing_offset backing_length cluster_bits size crypt_method l1_entries l1_offset "
            "refcount_table_offset refcount_table_clusters snapshots_count snapshots_offset"
        ).split()
        values = struct.unpack_from(">QIIQIIQQIIQ", self._data, 8)
        defaults = {"version": version, "refcount_order": 4, "header_length": VERSION_2_LENGTH}
        return {**dict(zip(names, values, strict=True)), **defaults, "incompatible": 0, "compatible": 0, "autoclear": 0}

    def _version_3_fields(self, fields: dict[str, int]) -> dict[str, int]:
        if len(self._data) < VERSION_3_LENGTH:
            raise self._corrupt("the header is cut off", f"{len(self._data)} bytes, version 3 has {VERSION_3_LENGTH}")
        names = ("incompatible", "compatible", "autoclear", "refcount_order", "header_length")
        found = dict(zip(names, struct.unpack_from(">QQQII", self._data, VERSION_2_LENGTH), strict=True))
        length = found["header_length"]
        if length < VERSION_3_LENGTH:
            raise self._corrupt("bad header_length", f"{length} at 0x64, at least {VERSION_3_LENGTH} was expected")
        return found

    def _check_geometry(self, fields: dict[str, int]) -> None:
        bits, order = fields["cluster_bits"], fields["refcount_order"]
        if not limits.MIN_CLUSTER_BITS <= bits <= limits.MAX_CLUSTER_BITS:
            expected = f"{limits.MIN_CLUSTER_BITS} to {limits.MAX_CLUSTER_BITS}"
            raise self._corrupt("bad cluster_bits", f"{bits} at 0x14, {expected} was expected")
        if fields["incompatible"] >> EXTENDED_L2 & 1 and bits < limits.MIN_CLUSTER_BITS_EXTENDED_L2:
            expected = f"at least {limits.MIN_CLUSTER_BITS_EXTENDED_L2} with extended L2 entries"
            raise self._corrupt("bad cluster_bits", f"{bits} at 0x14, {expected} was expected")
        if fields["header_length"] > 1 << bits:
            raise self._corrupt("bad header_length", f"{fields['header_length']} is more than a cluster")
        if order > limits.MAX_REFCOUNT_ORDER:
            raise self._corrupt("bad refcount_order", f"{order} at 0x60, at most {limits.MAX_REFCOUNT_ORDER}")
        if fields["crypt_method"] > 2:
            raise UnsupportedImage(
                self._source.name, f"encryption method {fields['crypt_method']}", "0, 1 and 2 are known"
            )
        if fields["size"] > limits.MAX_VIRTUAL_SIZE:
            raise self._corrupt("bad size", f"{fields['size']:#x} at 0x18, at most {limits.MAX_VIRTUAL_SIZE:#x}")

    def _check_tables(self, fields: dict[str, int]) -> None:
        cluster_size = 1 << fields["cluster_bits"]
        entries, clusters = fields["l1_entries"], fields["refcount_table_clusters"]
        if entries * 8 > limits.MAX_L1_SIZE:
            raise self._corrupt("the L1 table is too large", f"{entries} entries, at most {limits.MAX_L1_SIZE // 8}")
        l2_entries = cluster_size // (16 if fields["incompatible"] >> EXTENDED_L2 & 1 else 8)
        needed = -(-fields["size"] // (cluster_size * l2_entries))
        if entries < needed:
            raise self._corrupt("the L1 table is too small", f"{entries} entries, its size needs {needed}")
        self._check_aligned("l1_table_offset", 0x28, fields["l1_offset"], cluster_size)
        if clusters * cluster_size > limits.MAX_REFCOUNT_TABLE_SIZE:
            raise self._corrupt("the refcount table is too large", f"{clusters} clusters")
        if clusters == 0:
            raise self._corrupt("no refcount table", "refcount_table_clusters at 0x38 is 0")
        self._check_aligned("refcount_table_offset", 0x30, fields["refcount_table_offset"], cluster_size)
        if fields["snapshots_count"] > limits.MAX_SNAPSHOTS:
            raise self._corrupt("too many snapshots", f"{fields['snapshots_count']}, at most {limits.MAX_SNAPSHOTS}")
        if fields["snapshots_count"]:
            self._check_aligned("snapshots_offset", 0x40, fields["snapshots_offset"], cluster_size)

    def _check_aligned(self, name: str, place: int, offset: int, cluster_size: int) -> None:
        if offset % cluster_size:
            raise self._corrupt(f"bad {name}", f"{offset:#x} at {place:#x} is not aligned to a cluster")
        if offset >= 1 << 62:
            raise self._corrupt(f"bad {name}", f"{offset:#x} at {place:#x} is beyond what a file can have")

    def _backing_room(self, fields: dict[str, int]) -> int:
        """Where extensions have to end: at the backing file name, or with the first cluster."""
        cluster_size = 1 << fields["cluster_bits"]
        offset, length = fields["backing_offset"], fields["backing_length"]
        if not offset:
            return cluster_size
        if offset > cluster_size:
            raise self._corrupt("bad backing_file_offset", f"{offset:#x} at 0x8 is beyond the first cluster")
        if length > min(limits.MAX_BACKING_NAME, cluster_size - offset):
            raise self._corrupt("bad backing_file_size", f"{length} at 0x10, more than the room there is for a name")
        return offset

    def _extensions(self, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Yield (type, data); each turn goes on by at least 8 bytes."""
        area = self._read(0, end)
        while offset + 8 <= end:
            kind, length = struct.unpack(">II", area[offset : offset + 8].ljust(8, b"\0"))
            if kind == END:
                return
            offset += 8
            if length > end - offset:
                raise self._corrupt("bad header extension", f"{kind:#010x} at {offset - 8:#x}: {length} bytes do not fit")
            yield kind, area[offset : offset + length]
            offset += -(-length // 8) * 8

    def _check_features(self, fields: dict[str, int], names: Mapping[tuple[int, int], str]) -> None:
        unknown = fields["incompatible"] & ~KNOWN_INCOMPATIBLE
        if unknown:
            bits = [bit for bit in range(64) if unknown >> bit & 1]
            told = ", ".join(printable(names.get((INCOMPATIBLE, bit), f"bit {bit}")) for bit in bits)
            raise UnsupportedImage(self._source.name, "incompatible features that are not known", told)

    def _without_backing(self, fields: dict[str, int]) -> dict[str, int]:
        return {name: value for name, value in fields.items() if not name.startswith("backing_")}

    def _from_extensions(self, fields: dict[str, int], extensions: dict[int, bytes]) -> dict[str, object]:
        return {
            "zstd": self._zstd(fields),
            "backing_name": self._backing_name(fields),
            "backing_format": extensions.get(BACKING_FORMAT) or None,
            "data_file_name": extensions.get(DATA_FILE) or None,
            "bitmaps": self._bitmaps(extensions.get(BITMAPS)),
            "feature_names": _feature_names(extensions.get(FEATURE_NAMES, b"")),
        }

    def _backing_name(self, fields: dict[str, int]) -> bytes | None:
        if not fields["backing_offset"] or not fields["backing_length"]:
            return None
        return self._read(fields["backing_offset"], fields["backing_length"])

    def _zstd(self, fields: dict[str, int]) -> bool:
        present = fields["header_length"] > COMPRESSION_TYPE_OFFSET and len(self._data) > COMPRESSION_TYPE_OFFSET
        kind = self._data[COMPRESSION_TYPE_OFFSET] if present else 0
        if kind > 1:
            raise UnsupportedImage(self._source.name, f"compression type {kind}", "0 (zlib) and 1 (zstd) are known")
        if bool(fields["incompatible"] >> COMPRESSION_TYPE & 1) != bool(kind):
            raise self._corrupt("bad compression type", f"{kind} at 0x68 does not agree with incompatible feature bit 3")
        return kind == 1

    def _bitmaps(self, data: bytes | None) -> BitmapsExtension | None:
        if data is None:
            return None
        if len(data) != 24:
            raise self._corrupt("bad bitmaps extension", f"{len(data)} bytes, 24 were expected")
        count, _, size, offset = struct.unpack(">IIQQ", data)
        return BitmapsExtension(count=count, directory_size=size, directory_offset=offset)


def _feature_names(data: bytes) -> Mapping[tuple[int, int], str]:
    names = {}
    for place in range(0, min(len(data) // 48, limits.MAX_FEATURE_NAMES) * 48, 48):
        kind, bit = data[place], data[place + 1]
        names[kind, bit] = data[place + 2 : place + 48].split(b"\0")[0].decode("utf-8", "replace")
    return MappingProxyType(names)

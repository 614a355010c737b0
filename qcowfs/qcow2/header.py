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
from typing import TYPE_CHECKING, NamedTuple

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
DATA_FILE = 0x44415441
INCOMPATIBLE = 0  # kind of feature in the feature name table; 1 compatible, 2 autoclear


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


class _Fixed(NamedTuple):
    """The fixed part of a header, as stored; version 2 has it up to and without `incompatible`."""

    version: int
    backing_offset: int
    backing_length: int
    cluster_bits: int
    size: int
    crypt_method: int
    l1_entries: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshots_count: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = VERSION_2_LENGTH

    def incompatible_bit(self, bit: int) -> bool:
        return bool(self.incompatible >> bit & 1)


class _Parser:
    """The header's bytes, and the checks in the order in which fields depend on each other."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._data = self._read(0, COMPRESSION_TYPE_OFFSET + 8)

    def header(self) -> Header:
        fixed = self._fixed(self._version())
        self._check_geometry(fixed)
        extensions = dict(self._extensions(fixed.header_length, self._extensions_end(fixed)))
        names = _feature_names(extensions.get(FEATURE_NAMES, b""))
        self._check_features(fixed, names)
        self._check_tables(fixed)
        stored = {name: getattr(fixed, name) for name in _Fixed._fields if not name.startswith("backing_")}
        return Header(
            **stored,
            zstd=self._zstd(fixed),
            backing_name=self._backing_name(fixed),
            backing_format=extensions.get(BACKING_FORMAT) or None,
            data_file_name=extensions.get(DATA_FILE) or None,
            bitmaps=self._bitmaps(extensions.get(BITMAPS)),
            feature_names=names,
        )

    def _read(self, offset: int, length: int) -> bytes:
        try:
            return self._source.read_at(offset, length)
        except OSError as error:
            raise SourceError.from_oserror(self._source.name, "cannot read the header", error) from error

    def _corrupt(self, what: str, why: str) -> CorruptImage:
        return CorruptImage(self._source.name, what, why)

    def _require_length(self, length: int) -> None:
        if len(self._data) < length:
            raise self._corrupt("the header is cut off", f"{len(self._data)} bytes, {length} were expected")

    def _version(self) -> int:
        if self._data[:4] != MAGIC:
            raise NotAnImage(self._source.name, "not a qcow2 image", "it does not start with QFI\\xfb")
        self._require_length(VERSION_2_LENGTH)
        version: int = struct.unpack_from(">I", self._data, 4)[0]
        if version not in (2, 3):
            raise UnsupportedImage(self._source.name, f"qcow2 version {version}", "versions 2 and 3 are supported")
        return version

    def _fixed(self, version: int) -> _Fixed:
        common = struct.unpack_from(">QIIQIIQQIIQ", self._data, 8)
        if version == 2:
            return _Fixed(version, *common)
        self._require_length(VERSION_3_LENGTH)
        fixed = _Fixed(version, *common, *struct.unpack_from(">QQQII", self._data, VERSION_2_LENGTH))
        if fixed.header_length < VERSION_3_LENGTH:
            raise self._corrupt("bad header_length", f"{fixed.header_length} at 0x64, at least {VERSION_3_LENGTH}")
        return fixed

    def _check_geometry(self, fixed: _Fixed) -> None:
        extended = fixed.incompatible_bit(EXTENDED_L2)
        smallest = limits.MIN_CLUSTER_BITS_EXTENDED_L2 if extended else limits.MIN_CLUSTER_BITS
        self._check_range("cluster_bits", 0x14, fixed.cluster_bits, smallest, limits.MAX_CLUSTER_BITS)
        self._check_range("refcount_order", 0x60, fixed.refcount_order, 0, limits.MAX_REFCOUNT_ORDER)
        self._check_range("size", 0x18, fixed.size, 0, limits.MAX_VIRTUAL_SIZE)
        self._check_range("header_length", 0x64, fixed.header_length, 0, 1 << fixed.cluster_bits)
        if fixed.crypt_method > 2:
            why = "0 (none), 1 (AES) and 2 (LUKS) are known"
            raise UnsupportedImage(self._source.name, f"encryption method {fixed.crypt_method}", why)

    def _check_range(self, name: str, place: int, value: int, smallest: int, largest: int) -> None:
        if not smallest <= value <= largest:
            raise self._corrupt(f"bad {name}", f"{value} at {place:#x}, {smallest} to {largest} was expected")

    def _check_tables(self, fixed: _Fixed) -> None:
        cluster_size = 1 << fixed.cluster_bits
        reach = cluster_size * (cluster_size // (16 if fixed.incompatible_bit(EXTENDED_L2) else 8))
        needed = -(-fixed.size // reach)
        most_clusters = limits.MAX_REFCOUNT_TABLE_SIZE // cluster_size
        self._check_range("l1_size", 0x24, fixed.l1_entries, needed, limits.MAX_L1_SIZE // 8)
        self._check_aligned("l1_table_offset", 0x28, fixed.l1_offset, cluster_size)
        self._check_range("refcount_table_clusters", 0x38, fixed.refcount_table_clusters, 1, most_clusters)
        self._check_aligned("refcount_table_offset", 0x30, fixed.refcount_table_offset, cluster_size)
        self._check_range("nb_snapshots", 0x3C, fixed.snapshots_count, 0, limits.MAX_SNAPSHOTS)
        if fixed.snapshots_count:
            self._check_aligned("snapshots_offset", 0x40, fixed.snapshots_offset, cluster_size)

    def _check_aligned(self, name: str, place: int, offset: int, cluster_size: int) -> None:
        if offset % cluster_size:
            raise self._corrupt(f"bad {name}", f"{offset:#x} at {place:#x} is not aligned to a cluster")
        if offset >= limits.MAX_VIRTUAL_SIZE:
            raise self._corrupt(f"bad {name}", f"{offset:#x} at {place:#x} is beyond what a file can have")

    def _extensions_end(self, fixed: _Fixed) -> int:
        """Extensions end at the backing file name, or with the first cluster."""
        cluster_size = 1 << fixed.cluster_bits
        if not fixed.backing_offset:
            return cluster_size
        self._check_range("backing_file_offset", 0x8, fixed.backing_offset, 0, cluster_size)
        most = min(limits.MAX_BACKING_NAME, cluster_size - fixed.backing_offset)
        self._check_range("backing_file_size", 0x10, fixed.backing_length, 0, most)
        return fixed.backing_offset

    def _extensions(self, offset: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Yield (type, data); each turn goes on by at least 8 bytes."""
        area = self._read(0, end)
        while offset + 8 <= end:
            kind, length = struct.unpack(">II", area[offset : offset + 8].ljust(8, b"\0"))
            if kind == END:
                return
            offset += 8
            if length > end - offset:
                why = f"type {kind:#010x} at {offset - 8:#x}: {length} bytes do not fit"
                raise self._corrupt("bad header extension", why)
            yield kind, area[offset : offset + length]
            offset += -(-length // 8) * 8

    def _check_features(self, fixed: _Fixed, names: Mapping[tuple[int, int], str]) -> None:
        unknown = [bit for bit in range(64) if (fixed.incompatible & ~KNOWN_INCOMPATIBLE) >> bit & 1]
        if unknown:
            told = ", ".join(printable(names.get((INCOMPATIBLE, bit), f"bit {bit}")) for bit in unknown)
            raise UnsupportedImage(self._source.name, "incompatible features that are not known", told)

    def _backing_name(self, fixed: _Fixed) -> bytes | None:
        if not fixed.backing_offset or not fixed.backing_length:
            return None
        name = self._read(fixed.backing_offset, fixed.backing_length)
        if len(name) < fixed.backing_length:
            raise self._corrupt("bad backing file name", "it lies past the end of the file")
        return name

    def _zstd(self, fixed: _Fixed) -> bool:
        present = fixed.header_length > COMPRESSION_TYPE_OFFSET and len(self._data) > COMPRESSION_TYPE_OFFSET
        kind = self._data[COMPRESSION_TYPE_OFFSET] if present else 0
        if kind > 1:
            raise UnsupportedImage(self._source.name, f"compression type {kind}", "0 (zlib) and 1 (zstd) are known")
        if fixed.incompatible_bit(COMPRESSION_TYPE) != bool(kind):
            raise self._corrupt("bad compression type", f"{kind} at 0x68 and incompatible feature bit 3 disagree")
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

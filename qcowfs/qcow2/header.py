"""The header of a qcow2 image, versions 2 and 3, with its extensions: bytes on disk -> one frozen, checked object.

Used by chain and by the compiled rooms (as numbers). Every field is compared with its rule and its cap before it is
used; where QEMU refuses an image, so does this. Source: the qcow2 specification, "Header" and "Header extensions".
Pure functions over a Source; any thread.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from qcowfs import limits
from qcowfs.errors import CorruptImage, NotAnImage, SourceError, UnsupportedImage, printable
from qcowfs.frozen import dataclass, field

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
CRYPTO = 0x0537BE77
BITMAPS = 0x23852875
DATA_FILE = 0x44415441
KNOWN_EXTENSIONS = frozenset({BACKING_FORMAT, FEATURE_NAMES, CRYPTO, BITMAPS, DATA_FILE})
LUKS = 2  # encryption method
INCOMPATIBLE = 0  # kind of feature in the feature name table; 1 compatible, 2 autoclear
FIRST_READ = 4096  # bytes: a header and its extensions seldom have more


@dataclass(frozen=True, slots=True, kw_only=True)
class BitmapsExtension:
    """Where the bitmap directory is, as stored and not checked yet; offsets and sizes in bytes."""

    count: int
    reserved: int
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
        return bool(self.autoclear >> RAW_EXTERNAL_DATA & 1)

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
        UnsupportedImage: a version, an incompatible feature, an encryption or a compression that is not known.
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
    """The bytes from the start of the image, and the checks in the order in which fields depend on each other."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._data = self._read(FIRST_READ)

    def header(self) -> Header:
        fixed = self._fixed(self._version())
        self._check_geometry(fixed)
        end = self._extensions_end(fixed)
        self._check_features(fixed, end)
        self._check_tables(fixed)
        extensions = dict(self._extensions(fixed.header_length, end))
        self._check_crypto(fixed, extensions.get(CRYPTO))
        stored = {name: getattr(fixed, name) for name in _Fixed._fields if not name.startswith("backing_")}
        return Header(
            **stored,
            zstd=self._zstd(fixed),
            backing_name=self._backing_name(fixed),
            backing_format=self._text(extensions, BACKING_FORMAT, "backing format", limits.MAX_BACKING_FORMAT),
            data_file_name=self._text(extensions, DATA_FILE, "data file name", limits.MAX_DATA_FILE_NAME),
            bitmaps=self._bitmaps(extensions.get(BITMAPS)),
            feature_names=_feature_names(extensions.get(FEATURE_NAMES, b"")),
        )

    def _read(self, length: int) -> bytes:
        try:
            return self._source.read_at(0, length)
        except OSError as error:
            raise SourceError.from_oserror(self._source.name, "cannot read the header", error) from error

    def _corrupt(self, what: str, why: str) -> CorruptImage:
        return CorruptImage(self._source.name, what, why)

    def _take(self, offset: int, length: int) -> bytes:
        """Return bytes of the first cluster. QEMU reads zeros past the end of a file; here that is an error."""
        if offset + length > len(self._data):
            self._data = self._read(max(offset + length, 2 * len(self._data)))
        self._require_length(offset + length)
        return self._data[offset : offset + length]

    def _require_length(self, length: int) -> None:
        if len(self._data) < length:
            why = f"it ends at {len(self._data):#x}, {length:#x} bytes were expected: the image is truncated"
            raise self._corrupt("the header is cut off", why)

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
        if fixed.crypt_method > LUKS:
            why = f"{fixed.crypt_method} at 0x20; 0 (none), 1 (AES) and 2 (LUKS) are known"
            raise UnsupportedImage(self._source.name, "encryption method", why)

    def _check_range(self, name: str, place: int, value: int, smallest: int, largest: int) -> None:
        if not smallest <= value <= largest:
            raise self._corrupt(f"bad {name}", f"{value} at {place:#x}, {smallest} to {largest} was expected")

    def _check_tables(self, fixed: _Fixed) -> None:
        cluster_size = 1 << fixed.cluster_bits
        reach = cluster_size * (cluster_size // (16 if fixed.incompatible_bit(EXTENDED_L2) else 8))
        needed = -(-fixed.size // reach)
        most_clusters = limits.MAX_REFCOUNT_TABLE_SIZE // cluster_size
        self._check_range("l1_size", 0x24, fixed.l1_entries, needed, limits.MAX_L1_SIZE // 8)
        self._check_offset("l1_table_offset", 0x28, fixed.l1_offset, cluster_size, fixed.l1_entries * 8)
        self._check_range("refcount_table_clusters", 0x38, fixed.refcount_table_clusters, 1, most_clusters)
        length = fixed.refcount_table_clusters * cluster_size
        self._check_offset("refcount_table_offset", 0x30, fixed.refcount_table_offset, cluster_size, length)
        self._check_range("nb_snapshots", 0x3C, fixed.snapshots_count, 0, limits.MAX_SNAPSHOTS)
        self._check_offset("snapshots_offset", 0x40, fixed.snapshots_offset, cluster_size, fixed.snapshots_count * 40)

    def _check_offset(self, name: str, place: int, offset: int, cluster_size: int, length: int) -> None:
        """Check where a table of `length` bytes is; QEMU does so for empty ones too."""
        if offset % cluster_size:
            why = f"{offset:#x} at {place:#x}, a multiple of the cluster size {cluster_size:#x} was expected"
            raise self._corrupt(f"bad {name}", why)
        if offset + length > limits.MAX_HOST_OFFSET:
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
        """Yield (type, data) of the known ones; each turn goes on by at least 8 bytes."""
        while offset < end:
            if end - offset < 8:
                why = f"{end - offset} bytes are left at {offset:#x}, 8 were expected"
                raise self._corrupt("bad header extension", why)
            kind, length = struct.unpack(">II", self._take(offset, 8))
            offset += 8
            if length > end - offset:
                why = f"type {kind:#010x} at {offset - 8:#x} has {length} bytes, at most {end - offset} were expected"
                raise self._corrupt("bad header extension", why)
            if kind == END:
                return
            if kind in KNOWN_EXTENSIONS:
                yield kind, self._take(offset, length)
            offset += -(-length // 8) * 8

    def _check_features(self, fixed: _Fixed, end: int) -> None:
        unknown = [bit for bit in range(64) if (fixed.incompatible & ~KNOWN_INCOMPATIBLE) >> bit & 1]
        if unknown:
            names = self._names_in_spite_of_errors(fixed.header_length, end)
            told = ", ".join(printable(names.get((INCOMPATIBLE, bit)) or f"bit {bit}") for bit in unknown)
            why = f"{told} ({fixed.incompatible:#x} at 0x48)"
            raise UnsupportedImage(self._source.name, "incompatible features that are not known", why)
        if fixed.autoclear >> RAW_EXTERNAL_DATA & 1 and not fixed.incompatible_bit(EXTERNAL_DATA):
            why = f"{fixed.autoclear:#x} at 0x58 says that the data file is raw, but there is no data file"
            raise self._corrupt("bad autoclear_features", why)

    def _names_in_spite_of_errors(self, offset: int, end: int) -> Mapping[tuple[int, int], str]:
        """Return the names of features: the unknown one may be what makes other extensions look wrong."""
        names: Mapping[tuple[int, int], str] = {}
        with suppress(CorruptImage):
            for kind, data in self._extensions(offset, end):
                names = _feature_names(data) if kind == FEATURE_NAMES else names
        return names

    def _check_crypto(self, fixed: _Fixed, data: bytes | None) -> None:
        if data is None:
            return
        what = "bad encryption header extension"
        if fixed.crypt_method != LUKS:
            raise self._corrupt(what, f"crypt_method is {fixed.crypt_method} at 0x20, 2 was expected with it")
        if len(data) != 16:
            raise self._corrupt(what, f"{len(data)} bytes, 16 were expected")
        offset, length = struct.unpack(">QQ", data)
        if offset % (1 << fixed.cluster_bits) or offset + length > limits.MAX_HOST_OFFSET:
            raise self._corrupt(what, f"it says {length:#x} bytes at {offset:#x}, which cannot be")

    def _backing_name(self, fixed: _Fixed) -> bytes | None:
        if not fixed.backing_offset:
            return None
        return _c_string(self._take(fixed.backing_offset, fixed.backing_length))

    def _text(self, extensions: Mapping[int, bytes], kind: int, name: str, most: int) -> bytes | None:
        data = extensions.get(kind, b"")
        if len(data) > most:
            raise self._corrupt(f"bad {name} extension", f"{len(data)} bytes, at most {most} were expected")
        return _c_string(data)

    def _zstd(self, fixed: _Fixed) -> bool:
        kind = self._take(COMPRESSION_TYPE_OFFSET, 1)[0] if fixed.header_length > COMPRESSION_TYPE_OFFSET else 0
        if kind > 1:
            why = f"{kind} at 0x68; 0 (zlib) and 1 (zstd) are known"
            raise UnsupportedImage(self._source.name, "compression type", why)
        if fixed.incompatible_bit(COMPRESSION_TYPE) != bool(kind):
            raise self._corrupt("bad compression type", f"{kind} at 0x68 and incompatible feature bit 3 disagree")
        return kind == 1

    def _bitmaps(self, data: bytes | None) -> BitmapsExtension | None:
        if data is None:
            return None
        if len(data) != 24:
            raise self._corrupt("bad bitmaps extension", f"{len(data)} bytes, 24 were expected")
        count, reserved, size, offset = struct.unpack(">IIQQ", data)
        return BitmapsExtension(count=count, reserved=reserved, directory_size=size, directory_offset=offset)


def _c_string(data: bytes) -> bytes | None:
    """QEMU reads names as C strings: a NUL ends one, and an empty one is none."""
    return data.partition(b"\0")[0] or None


def _feature_names(data: bytes) -> Mapping[tuple[int, int], str]:
    """Return the names in the table; the first of a bit counts, as in QEMU."""
    names: dict[tuple[int, int], str] = {}
    for place in range(0, min(len(data) // 48, limits.MAX_FEATURE_NAMES) * 48, 48):
        name = data[place + 2 : place + 48].partition(b"\0")[0]
        names.setdefault((data[place], data[place + 1]), name.decode("utf-8", "surrogateescape"))
    return MappingProxyType(names)

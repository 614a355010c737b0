"""Forging images byte by byte: what QEMU never writes, and what it writes, with any field changed.

    image = forge.qcow2(data={0: 0x11}, l1_size=0)                     the header's fields by the specification's names
    image = forge.qcow2(snapshots=[forge.Snapshot(name=b"one", data={0: 0x22}, disk_size=1 << 20)])
    image = forge.qcow2(extensions=[(forge.BACKING_FORMAT, b"raw")], backing_name=b"base.raw")
    image = forge.qcow2(bitmaps=[forge.Bitmap(name=b"b0")])
    image = forge.qcow1(data={0: 0x11}, l2_bits=6)

Each returns the bytes of a whole image that is right but for what was asked to be wrong: what is not given follows
from what is given. Refcounts are all zero, which no reader minds. `path.write_bytes(image)` makes a file of it and
`BytesSource(image)` a source in memory. Every field of every structure can be overridden, its neighbours stay.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from qcowfs._source import Source

__all__ = [
    "BACKING_FORMAT",
    "BITMAPS",
    "CRYPTO",
    "DATA_FILE",
    "FEATURE_NAMES",
    "FIELDS",
    "QCOW1_FIELDS",
    "Bitmap",
    "BytesSource",
    "Snapshot",
    "bitmaps_extension",
    "extension",
    "feature_name",
    "qcow1",
    "qcow2",
]

END = 0
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857
CRYPTO = 0x0537BE77
BITMAPS = 0x23852875
DATA_FILE = 0x44415441
COPIED = 1 << 63

# Field -> where it is and how it is packed. Version 2 ends before `incompatible_features`.
FIELDS = {
    "magic": (0, ">4s"),
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "size": (24, ">Q"),
    "crypt_method": (32, ">I"),
    "l1_size": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
    "refcount_table_offset": (48, ">Q"),
    "refcount_table_clusters": (56, ">I"),
    "nb_snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible_features": (72, ">Q"),
    "compatible_features": (80, ">Q"),
    "autoclear_features": (88, ">Q"),
    "refcount_order": (96, ">I"),
    "header_length": (100, ">I"),
    "compression_type": (104, ">B"),
}
QCOW1_FIELDS = {
    "magic": (0, ">4s"),
    "version": (4, ">I"),
    "backing_file_offset": (8, ">Q"),
    "backing_file_size": (16, ">I"),
    "mtime": (20, ">I"),
    "size": (24, ">Q"),
    "cluster_bits": (32, ">B"),
    "l2_bits": (33, ">B"),
    "padding": (34, ">H"),
    "crypt_method": (36, ">I"),
    "l1_table_offset": (40, ">Q"),
}
Value = int | bytes


class BytesSource(Source):
    """A source in memory, for what is written in Python; the compiled rooms read files only."""

    name = "forged.qcow2"

    def __init__(self, data: bytes) -> None:
        self._data = data

    @property
    def size(self) -> int:
        return len(self._data)

    def read_at(self, offset: int, length: int) -> bytes:
        return self._data[offset : offset + length]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """An entry of the snapshot table, and the state that it stands for.

    Attributes:
        data: guest cluster -> the byte that fills it.
        extra: the extra data as bytes, instead of what the three fields after it make.
        fields: any field of the fixed part by the specification's name, such as l1_size or name_size.
    """

    id: bytes = b"1"
    name: bytes = b"one"
    data: Mapping[int, int] = field(default_factory=dict)
    extra: bytes | None = None
    vm_state_size_large: int = 0
    disk_size: int | None = None
    icount: int | None = None
    fields: Mapping[str, int] = field(default_factory=dict)

    def packed(self, l1: tuple[int, int], size: int) -> bytes:
        """Return the entry, padded; `l1` is its table's (offset, entries), `size` that of the active disk."""
        extra = self._extra(size) if self.extra is None else self.extra
        fixed = {
            "l1_table_offset": l1[0],
            "l1_size": l1[1],
            "id_str_size": len(self.id),
            "name_size": len(self.name),
            "date_sec": 1_700_000_000,
            "date_nsec": 123_456_789,
            "vm_clock_nsec": 5_000_000_006,
            "vm_state_size": 0,
            "extra_data_size": len(extra),
        }
        fixed = _overridden(fixed, self.fields)
        return _padded(struct.pack(">QIHHIIQII", *fixed.values()) + extra + self.id + self.name, 8)

    def _extra(self, size: int) -> bytes:
        extra = struct.pack(">QQ", self.vm_state_size_large, size if self.disk_size is None else self.disk_size)
        return extra if self.icount is None else extra + struct.pack(">Q", self.icount)


@dataclass(frozen=True, kw_only=True)
class Bitmap:
    """An entry of the bitmap directory; `fields` as in Snapshot."""

    name: bytes = b"b0"
    extra: bytes = b""
    flags: int = 0
    granularity_bits: int = 16
    fields: Mapping[str, int] = field(default_factory=dict)

    def packed(self, table_offset: int) -> bytes:
        """Return the entry, padded; one entry of table is enough for the small disks that are forged here."""
        fixed = {
            "bitmap_table_offset": table_offset,
            "bitmap_table_size": 1,
            "flags": self.flags,
            "type": 1,
            "granularity_bits": self.granularity_bits,
            "name_size": len(self.name),
            "extra_data_size": len(self.extra),
        }
        fixed = _overridden(fixed, self.fields)
        return _padded(struct.pack(">QIIBBHI", *fixed.values()) + self.extra + self.name, 8)


def extension(kind: int, data: bytes, *, length: int | None = None) -> bytes:
    """Return a header extension, padded; `length` is what it says of its length, if that is not the truth."""
    return struct.pack(">II", kind, len(data) if length is None else length) + _padded(data, 8)


def feature_name(kind: int, bit: int, name: bytes) -> bytes:
    """Return an entry of the feature name table; kind 0 is incompatible, 1 compatible, 2 autoclear."""
    return struct.pack(">BB46s", kind, bit, name)


def bitmaps_extension(count: int, size: int, offset: int, *, reserved: int = 0) -> bytes:
    """Return the data of a bitmaps extension."""
    return struct.pack(">IIQQ", count, reserved, size, offset)


def qcow2(
    *,
    version: int = 3,
    cluster_bits: int = 16,
    data: Mapping[int, int] | None = None,
    snapshots: Sequence[Snapshot] | bytes = (),
    bitmaps: Sequence[Bitmap] | bytes = (),
    extensions: Iterable[tuple[int, bytes]] | bytes = (),
    backing_name: bytes = b"",
    padding: int = 0,
    **fields: Value,
) -> bytes:
    """Return a qcow2 image.

    Args:
        cluster_bits: what the image is laid out by, and what the header says unless `header_cluster_bits` is given.
        data: guest cluster -> the byte that fills it in the active state.
        snapshots, bitmaps: their entries, or the whole table as bytes (then `nb_snapshots` is needed).
        extensions: (type, data) of each header extension, or all of them as bytes without the end of the list.
        backing_name: what the image is based on; it is put after the extensions.
        padding: zero bytes after the last cluster.
        fields: any field of the header by the specification's name (FIELDS), as a number.
    """
    layout = _Layout(cluster_bits, fields)
    size = int(fields.get("size", 8 << cluster_bits))
    values: dict[str, Value] = {"magic": b"QFI\xfb", "version": version, "cluster_bits": cluster_bits, "size": size}
    values |= {"refcount_table_offset": layout.add(b"\0"), "refcount_table_clusters": 1, "refcount_order": 4}
    values["l1_table_offset"], values["l1_size"] = layout.state(data or {}, size)
    values["header_length"] = 112
    values |= layout.snapshots(snapshots, size)
    extra, autoclear = layout.bitmaps(bitmaps)
    values["autoclear_features"] = autoclear
    if "header_cluster_bits" in fields:
        fields["cluster_bits"] = fields.pop("header_cluster_bits")
    values |= fields
    start = 72 if version == 2 else int(values["header_length"])
    tail = extensions if isinstance(extensions, bytes) else b"".join(extension(*item) for item in extensions)
    tail += extra + extension(END, b"")
    if backing_name:
        values.setdefault("backing_file_offset", start + len(tail))
        values.setdefault("backing_file_size", len(backing_name))
    layout.put(0, _header(values, FIELDS, 72 if version == 2 else 112))
    layout.put(start, tail)
    layout.put(int(values.get("backing_file_offset", 0)) if backing_name else 0, backing_name)
    return bytes(layout.image) + bytes(padding)


def qcow1(
    *,
    cluster_bits: int = 12,
    l2_bits: int = 9,
    data: Mapping[int, int] | None = None,
    backing_name: bytes = b"",
    **fields: Value,
) -> bytes:
    """Return a qcow version 1 image; the arguments are those of `qcow2`, the fields those of QCOW1_FIELDS."""
    layout = _Layout(cluster_bits, {})
    values: dict[str, Value] = {"magic": b"QFI\xfb", "version": 1, "size": 8 << cluster_bits}
    values |= {"cluster_bits": cluster_bits, "l2_bits": l2_bits}
    entries = {cluster: layout.add(bytes([byte]) * layout.cluster_size) for cluster, byte in (data or {}).items()}
    l2_table = layout.add(_table(entries, 1 << l2_bits)) if entries else 0
    values["l1_table_offset"] = layout.add(_table({0: l2_table}, 1))
    if backing_name:
        values |= {"backing_file_offset": 48, "backing_file_size": len(backing_name)}
        layout.put(48, backing_name)
    layout.put(0, _header(values | fields, QCOW1_FIELDS, 48))
    return bytes(layout.image)


class _Layout:
    """The image as it grows, cluster after cluster; cluster 0 is for the header."""

    def __init__(self, cluster_bits: int, fields: Mapping[str, Value]) -> None:
        self.cluster_size = 1 << cluster_bits
        self.image = bytearray(self.cluster_size)
        features = int(fields.get("incompatible_features", 0))
        self._entry_size = 16 if features & 16 and fields.get("version", 3) == 3 else 8

    def add(self, data: bytes) -> int:
        """Put `data` into clusters of its own; returns its offset."""
        offset = len(self.image)
        self.image += _padded(data, self.cluster_size)
        return offset

    def put(self, offset: int, data: bytes) -> None:
        """Overwrite what is at `offset`, and grow where it goes beyond the end."""
        self.image[offset : offset + len(data)] = data

    def state(self, data: Mapping[int, int], size: int) -> tuple[int, int]:
        """Write the tables and the clusters of one state; returns its L1 table's offset and entries."""
        per_table = self.cluster_size // self._entry_size
        entries = max(1, -(-size // (self.cluster_size * per_table)))
        tables: dict[int, dict[int, int]] = {}
        for cluster, byte in data.items():
            index, place = divmod(cluster, per_table)
            host_offset = self.add(bytes([byte]) * self.cluster_size)
            tables.setdefault(index, {})[place * self._entry_size // 8] = host_offset | COPIED
            if self._entry_size == 16:
                tables[index][place * 2 + 1] = (1 << 32) - 1  # all subclusters are allocated
        l1 = {index: self.add(_table(table, self.cluster_size // 8)) | COPIED for index, table in tables.items()}
        return self.add(_table(l1, min(entries, 1 << 16))), entries

    def snapshots(self, snapshots: Sequence[Snapshot] | bytes, size: int) -> dict[str, Value]:
        if not snapshots:
            return {}
        if isinstance(snapshots, bytes):
            return {"snapshots_offset": self.add(snapshots)}
        states = [self.state(entry.data, size if entry.disk_size is None else entry.disk_size) for entry in snapshots]
        table = b"".join(entry.packed(state, size) for entry, state in zip(snapshots, states, strict=True))
        return {"snapshots_offset": self.add(table), "nb_snapshots": len(snapshots)}

    def bitmaps(self, bitmaps: Sequence[Bitmap] | bytes) -> tuple[bytes, int]:
        """Return the header extension and the autoclear bit that the directory needs."""
        if not bitmaps:
            return b"", 0
        if isinstance(bitmaps, bytes):
            count, directory = 1, bitmaps
        else:
            count, directory = len(bitmaps), b"".join(bitmap.packed(self.add(b"\0")) for bitmap in bitmaps)
        return extension(BITMAPS, bitmaps_extension(count, len(directory), self.add(directory))), 1


def _header(values: Mapping[str, Value], fields: Mapping[str, tuple[int, str]], length: int) -> bytes:
    unknown = set(values) - set(fields)
    assert not unknown, f"no fields of the header: {unknown}"
    header = bytearray(112)
    for name, value in values.items():
        offset, form = fields[name]
        struct.pack_into(form, header, offset, value)
    return bytes(header[:length])


def _overridden(fixed: dict[str, int], fields: Mapping[str, int]) -> dict[str, int]:
    assert set(fields) <= set(fixed), f"no fields of the entry: {set(fields) - set(fixed)}"
    return {**fixed, **fields}


def _table(entries: Mapping[int, int], count: int) -> bytes:
    table = bytearray(count * 8)
    for index, entry in entries.items():
        struct.pack_into(">Q", table, index * 8, entry)
    return bytes(table)


def _padded(data: bytes, alignment: int) -> bytes:
    return data + bytes(-len(data) % alignment)

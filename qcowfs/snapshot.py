"""Points in time of a chain: active states, internal snapshots, layers; and a disk for each.

Used by the tree of a mount and by the commands. Defined here and only here: which points there are, in which order,
and which of them stay as they are. Sizes that need a walk of tables are in `sizes`. Any thread.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from qcowfs import qcow1
from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs._guard import Guard
from qcowfs._source import Source, descriptor_of
from qcowfs._tables import LayerMap
from qcowfs.chain import Chain, Layer, read_tables
from qcowfs.errors import QcowfsError, UnsupportedImage, printable
from qcowfs.qcow2 import header as qcow2
from qcowfs.qcow2.snapshots import SnapshotEntry, is_same_table, validate_l1

NANOSECONDS = 1_000_000_000
LIVE_CACHE_SIZE = 1 << 20  # of one read of a LiveDisk, and forgotten after it

Kind = Literal["active", "snapshot", "layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One readable state of a chain.

    Attributes:
        kind: the active state of the image itself, an internal snapshot, or the active state of a backing layer.
        layer: the layer that holds it; it reads through all layers below in their active states.
        entry: the snapshot table's entry, None unless `kind` is "snapshot".
        virtual_size: bytes, of its own time.
        date_ns: nanoseconds since the epoch: when the snapshot was made, or its file last written.
        frozen: False where it reads through a state that another process may be writing.
    """

    kind: Kind
    layer: Layer
    entry: SnapshotEntry | None
    virtual_size: int
    date_ns: int
    frozen: bool

    @property
    def depth(self) -> int:
        """The layer's place in the chain; 0 is the image on the command line."""
        return self.layer.depth

    @property
    def snapshot_id(self) -> bytes | None:
        """The id as the table holds it: text by custom only."""
        return self.entry.id if self.entry else None

    @property
    def snapshot_name(self) -> bytes | None:
        """The name as the table holds it, any bytes."""
        return self.entry.name if self.entry else None

    @property
    def vm_state_size(self) -> int:
        """Bytes of VM state stored with it; 0 for a disk-only snapshot."""
        return self.entry.vm_state_size if self.entry else 0

    @property
    def vm_clock_ns(self) -> int:
        """How long the guest had run, in nanoseconds."""
        return self.entry.vm_clock_ns if self.entry else 0


def points(chain: Chain) -> tuple[Point, ...]:
    """Return the points of `chain` from the top: each layer's active state, then its snapshots in the table's order."""
    found: list[Point] = []
    for layer in chain.layers:
        base_is_frozen = not any(below.written_by_other for below in chain.layers[layer.depth + 1 :])
        found.append(_active_point(layer, frozen=base_is_frozen and not layer.written_by_other))
        found += [_snapshot_point(layer, entry, frozen=base_is_frozen) for entry in layer.snapshots]
    return tuple(found)


def newness(point: Point) -> tuple[int, int, bool, int]:
    """Return what sorts points by age, the newest last.

    At the same date the one nearest to the active state is the newer: the upper layer; in one layer its active state
    before its snapshots, and of those the one added to the table last.
    """
    return point.date_ns, -point.depth, point.entry is None, point.entry.ordinal if point.entry else 0


def _active_point(layer: Layer, *, frozen: bool) -> Point:
    return Point(
        kind="layer" if layer.depth else "active",
        layer=layer,
        entry=None,
        virtual_size=layer.virtual_size,
        date_ns=layer.modified_ns,
        frozen=frozen,
    )


def _snapshot_point(layer: Layer, entry: SnapshotEntry, *, frozen: bool) -> Point:
    # QEMU keeps a snapshot's clusters as they are while it writes the active state, so a writer does not matter here.
    return Point(
        kind="snapshot",
        layer=layer,
        entry=entry,
        virtual_size=layer.virtual_size if entry.disk_size is None else entry.disk_size,
        date_ns=entry.date_sec * NANOSECONDS + entry.date_nsec,
        frozen=frozen,
    )


def by_age(found: Iterable[Point]) -> list[Point]:
    """Return points from the oldest to the newest; the image's own active state is the newest, whatever its date."""
    return sorted(found, key=lambda point: (point.kind == "active", newness(point)))


def open_disk(chain: Chain, point: Point, cache: Cache, identity: int = 0) -> Disk:
    """Return the disk of `point`. Reads nothing: tables are read when data is.

    Args:
        identity: a number that stands for `point` as long as `cache` lives; 0: this disk is the only one of it.

    Raises:
        UnsupportedImage: a layer that it reads through is encrypted.
        CorruptImage: the snapshot's L1 table cannot be where its entry says.
    """
    below = chain.layers[point.depth + 1 :]
    for layer in (point.layer, *below):
        require_plain(layer)
    maps = [layer_map(point.layer, point.entry), *(layer_map(layer) for layer in below)]
    guards = [*_guards(point.layer, point.entry), *(guard for layer in below for guard in _guards(layer))]
    return Disk(maps, point.virtual_size, cache, identity, guards)


def require_plain(layer: Layer) -> None:
    """Raise UnsupportedImage if the data of `layer` is encrypted."""
    if layer.header is not None and layer.header.encrypted:
        raise UnsupportedImage(layer.path, "cannot read its data", "encrypted images are not supported yet")


def layer_map(layer: Layer, entry: SnapshotEntry | None = None) -> LayerMap:
    """Return `layer` for the compiled rooms, in its active state or in that of the snapshot `entry`."""
    header = layer.header
    if header is None:
        return LayerMap.raw(layer.source, depth=layer.depth, virtual_size=layer.virtual_size)
    if isinstance(header, qcow1.Header):
        return LayerMap.qcow1(
            layer.source,
            depth=layer.depth,
            virtual_size=layer.virtual_size,
            cluster_bits=header.cluster_bits,
            l2_bits=header.l2_bits,
            l1_offset=header.l1_offset,
        )
    if entry is not None:
        validate_l1(layer.source, header, entry)
    return _qcow2_map(layer, header, entry)


def _qcow2_map(layer: Layer, header: qcow2.Header, entry: SnapshotEntry | None) -> LayerMap:
    state = entry or header
    size = header.virtual_size if entry is None or entry.disk_size is None else entry.disk_size
    return LayerMap.qcow2(
        layer.source,
        layer.data,
        depth=layer.depth,
        virtual_size=size,
        version=header.version,
        cluster_bits=header.cluster_bits,
        extended_l2=header.extended_l2,
        external_data=header.external_data,
        zstd=header.zstd,
        l1_offset=state.l1_offset,
        l1_entries=state.l1_entries,
    )


class LiveDisk:
    """A point that reads through states which another process writes, as it is on disk at each read.

    Nothing is remembered between two reads: the header and every table are read again. What one read sees may still be
    in the middle of the writer's update; only a frozen point is consistent.
    """

    def __init__(self, chain: Chain, point: Point) -> None:
        self._point = point
        self._below = chain.layers[point.depth + 1 :]
        for layer in (point.layer, *self._below):
            require_plain(layer)

    @property
    def virtual_size(self) -> int:
        """Bytes of the disk at this moment; the writer may resize it."""
        header = self._point.layer.header
        if self._point.entry is None and isinstance(header, qcow2.Header):
            return qcow2.read_header(self._point.layer.source).virtual_size
        return self._point.virtual_size

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`, fewer only where the disk ends now.

        Raises:
            ReadFault: some of the range cannot be read right.
            ImageError: the header cannot be read right now.
        """
        maps = [self._map(self._point.layer, self._point.entry), *(self._map(layer) for layer in self._below)]
        # What lies below may change; the snapshot itself must not be gone.
        guards = _guards(self._point.layer, self._point.entry) if self._point.entry else ()
        return Disk(maps, self.virtual_size, Cache(LIVE_CACHE_SIZE), guards=guards).pread(offset, length)

    @staticmethod
    def _map(layer: Layer, entry: SnapshotEntry | None = None) -> LayerMap:
        if entry is None and layer.written_by_other and isinstance(layer.header, qcow2.Header):
            return _qcow2_map(layer, qcow2.read_header(layer.source), None)
        return layer_map(layer, entry)  # a snapshot's own tables do not move, whoever writes below it


def require_unchanged(points: Iterable[Point]) -> None:
    """See that snapshots are still there, if a machine is running that may have deleted them.

    Raises:
        QcowfsError: one is not; what was read of it may be other data.
    """
    for point in points:
        if point.entry is not None and not point.layer.held and _find(point.layer, point.entry) is None:
            path = printable(point.layer.path)
            raise QcowfsError(f"{path}: the snapshot was deleted or changed while it was being read")


def has_moved(layer: Layer) -> bool:
    """Tell, by a few small reads, whether a layer's header or snapshots, or a file that nobody wrote, has changed.

    Raises:
        OSError, ImageError: it cannot be read.
    """
    header, source = layer.header, layer.source.uncached()
    if isinstance(header, qcow2.Header) and not is_same_table(source, header, layer.snapshots):
        return True
    if layer.written_by_other:  # a job may have given it another backing file; of others the time tells that
        return isinstance(header, qcow2.Header) and qcow2.read_header(source) != header
    return any(guard.check() for guard in _guards(layer))


def _guards(layer: Layer, entry: SnapshotEntry | None = None) -> list[Guard]:
    """Return what to check after a read of `layer`, in its active state or in that of a snapshot.

    docs/decisions/0011-following.md says what this proves. A source that is no file of this machine has no guard of
    its active state.
    """
    if layer.held:
        return []
    if entry is not None:
        assert isinstance(layer.header, qcow2.Header)
        header = layer.header
        return [
            Guard.snapshot(
                layer.source.uncached(),
                entry.stored,
                partial(_find, layer, entry),
                depth=layer.depth,
                table=header.snapshots_offset,
                count=header.snapshots_count,
                place=entry.place,
            )
        ]
    if layer.written_by_other:  # it changes, and whoever reads it knows
        return []
    found = [_file_guard(layer, layer.source, layer.modified_ns)]
    if layer.data is not layer.source:
        found.append(_file_guard(layer, layer.data, layer.data_modified_ns))
    return [guard for guard in found if guard is not None]


def _file_guard(layer: Layer, source: Source, modified_ns: int) -> Guard | None:
    descriptor = descriptor_of(source)
    if descriptor is None:
        return None
    if stat.S_ISBLK(os.fstat(descriptor).st_mode):
        return Guard.device(source, depth=layer.depth)
    return Guard.file(source, depth=layer.depth, modified_ns=modified_ns)


def _find(layer: Layer, entry: SnapshotEntry) -> tuple[int, int, int] | None:
    """Return where the snapshot table of `layer` is now, its number of entries, and where in it `entry` is.

    None: the snapshot is not there any more. Nothing of it comes from a cache.

    Raises:
        QcowfsError: the table cannot be read right now.
    """
    header, snapshots = read_tables(layer.source.uncached(), "qcow2", moving=True)
    assert isinstance(header, qcow2.Header)
    place = next((other.place for other in snapshots if other.stored == entry.stored), None)
    return None if place is None else (header.snapshots_offset, header.snapshots_count, place)

"""Points and disks without images, for tests of names and trees; the functional suite runs on real ones."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from qcowfs._mapped import Mapped
from qcowfs.errors import CorruptImage, ReadFault
from qcowfs.inside.contents import Contents
from qcowfs.snapshot import Point

SECOND = 1_000_000_000


def layer(depth: int = 0, path: str = "/images/top.qcow2", file_format: str = "qcow2") -> Any:
    """Return what names and trees look at of a Layer."""
    return SimpleNamespace(depth=depth, path=path, name=path.rpartition("/")[2], format=file_format, source=None)


def entry(name: bytes, identity: bytes, ordinal: int = 0, **facts: int) -> Any:
    """Return what they look at of a SnapshotEntry."""
    known = {"vm_clock_ns": 0, "vm_state_size": 0, **facts}
    return SimpleNamespace(name=name, id=identity, ordinal=ordinal, **known)


def active(*, date: int = 0, size: int = 4096, frozen: bool = True) -> Point:
    """Return the active state of the image itself. `date` in seconds, `size` in bytes."""
    return _point("active", layer(), None, date, size, frozen)


def snapshot(
    name: bytes,
    identity: bytes = b"1",
    *,
    of: Any = None,
    ordinal: int = 0,
    date: int = 0,
    size: int = 4096,
    frozen: bool = True,
    **facts: int,
) -> Point:
    """Return an internal snapshot, of the image itself or of the layer `of`."""
    return _point("snapshot", of or layer(), entry(name, identity, ordinal, **facts), date, size, frozen)


def backing(depth: int, path: str, *, date: int = 0, size: int = 4096, frozen: bool = True) -> Point:
    """Return the active state of a backing layer."""
    return _point("layer", layer(depth, path), None, date, size, frozen)


def _point(kind: Any, of: Any, made_from: Any, date: int, size: int, frozen: bool) -> Point:
    return Point(kind=kind, layer=of, entry=made_from, virtual_size=size, date_ns=date * SECOND, frozen=frozen)


class FakeDisk:
    """Bytes that count 0, 1, .. 250, 0, ..; `broken` is a byte offset that cannot be read."""

    def __init__(self, virtual_size: int, broken: int | None = None) -> None:
        self.virtual_size = virtual_size
        self._broken = broken

    def pread(self, offset: int, length: int) -> bytes:
        end = min(offset + length, self.virtual_size)
        if self._broken is not None and offset <= self._broken < end:
            raise ReadFault("fake.qcow2", 0, self._broken, "broken on purpose", 5)
        return bytes(place % 251 for place in range(offset, end))


@dataclass
class FakeDisks:
    """What a Tree asks of a chain. Points are told apart by identity.

    Attributes:
        broken: virtual offset that cannot be read, by the name of the snapshot.
        unreadable: names of snapshots whose disk cannot be made.
        size_now: virtual size of live points.
        made: how many disks were made.
        counted: how often somebody asked what a point allocates.
        looked: how often somebody asked what is inside a point.
        compared: points whose changes were asked for, with those before them.
    """

    broken: dict[bytes, int] = field(default_factory=dict)
    unreadable: set[bytes] = field(default_factory=set)
    size_now: int = 4096
    made: int = 0
    counted: int = 0
    looked: int = 0
    compared: list[tuple[Point, Point]] = field(default_factory=list)

    def frozen(self, point: Point, identity: int) -> FakeDisk:
        self.made += 1
        name = point.snapshot_name or b""
        if name in self.unreadable:
            raise CorruptImage("fake.qcow2", f"snapshot {name!r}", "its L1 table is not aligned to a cluster")
        return FakeDisk(point.virtual_size, self.broken.get(name))

    def live(self, point: Point) -> FakeDisk:
        self.made += 1
        return FakeDisk(self.size_now)

    def allocated(self, point: Point) -> int:
        self.counted += 1
        return point.virtual_size // 2

    def changed(self, point: Point, before: Point) -> int | None:
        self.compared.append((point, before))
        return 512

    def inside(self, point: Point, name: str) -> tuple[Contents, list[Mapped | None]]:
        self.looked += 1
        return Contents([], []), []

    def file_status(self, point: Point) -> os.stat_result:
        return os.stat_result((0o100644, 1, 1, 1, 0, 0, 8192, 0, 0, 0), {"st_mtime_ns": 7, "st_blocks": 16})

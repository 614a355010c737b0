"""qcowfs as the oracle's tests read it: whole points, and extents that compare with `qemu-img map`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from qcowfs._cache import Cache
from qcowfs._core import Disk, Extent
from qcowfs.chain import Chain
from qcowfs.cli.map import extents
from qcowfs.snapshot import Point, open_disk

__all__ = ["Run", "clipped", "open_point", "read_all", "runs_of_disk", "runs_of_extents", "runs_of_qemu"]

PIECE = 1_000_003  # bytes of one read; so that reads begin and end within clusters, layers and extents


class Run(NamedTuple):
    """A range with one answer. `offset` is known only where data is stored as it is."""

    start: int
    length: int
    depth: int
    zero: bool
    data: bool
    offset: int | None


def open_point(chain: Chain, point: Point) -> Disk:
    """Return the disk of `point` with a small cache, so that entries are thrown out and read again."""
    return open_disk(chain, point, Cache(256 << 10))


def read_all(disk: Disk) -> bytes:
    """Return all bytes of `disk`."""
    return b"".join(disk.pread(offset, PIECE) for offset in range(0, disk.virtual_size, PIECE))


def runs_of_disk(disk: Disk) -> list[Run]:
    """Return all extents of `disk` in the common form."""
    return runs_of_extents(extents(disk))


def runs_of_extents(found: Iterable[Extent]) -> list[Run]:
    """Return extents of qcowfs in the common form."""
    return _merged(
        Run(extent.start, extent.length, extent.depth, extent.zero, extent.data, extent.offset if extent.data else None)
        for extent in found
    )


def runs_of_qemu(found: Iterable[dict[str, Any]]) -> list[Run]:
    """Return what qemu-img map said in the common form.

    Offsets of zero and unallocated ranges are left out: QEMU gives that of the host cluster even where nothing may be
    read from it. So is `present`, which QEMU 7.2 gives for subclusters by their cluster, and `zero` of data: where QEMU
    thinks that an image is preallocated, it looks through to the holes of the host's file.
    """
    return _merged(
        Run(
            extent["start"],
            extent["length"],
            extent["depth"],
            extent["zero"] and not extent["data"],
            extent["data"],
            extent.get("offset") if extent["data"] else None,
        )
        for extent in found
    )


def clipped(runs: Iterable[Run], start: int, end: int) -> list[Run]:
    """Return what of `runs` is between two guest offsets."""
    found = []
    for run in runs:
        first, last = max(run.start, start), min(run.start + run.length, end)
        if first < last:
            offset = None if run.offset is None else run.offset + first - run.start
            found.append(run._replace(start=first, length=last - first, offset=offset))
    return found


def _merged(runs: Iterable[Run]) -> list[Run]:
    merged: list[Run] = []
    for run in runs:
        if merged and _continues(merged[-1], run):
            merged[-1] = merged[-1]._replace(length=merged[-1].length + run.length)
        else:
            merged.append(run)
    return merged


def _continues(first: Run, second: Run) -> bool:
    if first[2:5] != second[2:5] or (first.offset is None) != (second.offset is None):
        return False
    return first.offset is None or second.offset is None or first.offset + first.length == second.offset

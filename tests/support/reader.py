"""qcowfs as the oracle's tests read it: whole points, and extents that compare with `qemu-img map`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs.chain import Chain
from qcowfs.cli.map import extents
from qcowfs.snapshot import Point, open_disk

__all__ = ["Run", "open_point", "read_all", "runs_of_disk", "runs_of_qemu"]

PIECE = 1 << 20


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
    """Return the extents of `disk` in the common form."""
    return _merged(
        Run(found.start, found.length, found.depth, found.zero, found.data, found.offset if found.data else None)
        for found in extents(disk)
    )


def runs_of_qemu(found: Iterable[dict[str, Any]]) -> list[Run]:
    """Return what qemu-img map said in the common form.

    Offsets of zero and unallocated ranges are left out: QEMU gives that of the host cluster even where nothing may be
    read from it. So is `present`, which QEMU 7.2 gives for subclusters by their cluster.
    """
    return _merged(
        Run(
            extent["start"],
            extent["length"],
            extent["depth"],
            extent["zero"],
            extent["data"],
            extent.get("offset") if extent["data"] else None,
        )
        for extent in found
    )


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

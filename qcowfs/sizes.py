"""What points allocate: bytes in their file, and bytes that only one of them uses.

Used by the tree (st_blocks) and by `list` and `info`. Both walk L2 tables, so nothing is counted before it is asked
for, and each mount or command has a budget. One thread at a time.
"""

from __future__ import annotations

from qcowfs import limits
from qcowfs._cache import Cache
from qcowfs._usage import Allocation, Budget, Exclusive
from qcowfs.chain import Chain, Layer
from qcowfs.errors import CorruptImage
from qcowfs.qcow2 import header as qcow2
from qcowfs.snapshot import Point, layer_map

REFCOUNT_CACHE_SIZE = 4 << 20
SECTOR = 512  # the unit of st_blocks


class Sizes:
    """Sizes of the points of one chain, remembered.

    Args:
        budget: bytes of tables that may be read for it altogether.
    """

    def __init__(self, chain: Chain, budget: int = limits.MAX_COUNTED_TABLES) -> None:
        self._budget = Budget(budget)
        self._allocations: dict[int, Allocation] = {layer.depth: Allocation(self._budget) for layer in chain.layers}
        self._exclusives: dict[int, Exclusive] = {}

    def allocated(self, point: Point) -> int:
        """Return the bytes that `point` allocates in its own layer; an upper bound once the budget is used up.

        A sector at least: GNU tar (-S) never reads a file without blocks, it archives one hole. What this layer does
        not allocate may be data of the layers below, and what is damaged has to fail when it is read.
        """
        return max(self._counted(point), min(SECTOR, point.virtual_size))

    def _counted(self, point: Point) -> int:
        """Return what was found; 0 where the L1 table is damaged or cannot be read."""
        if point.layer.header is None:
            return min(point.layer.disk_size, point.virtual_size)
        try:
            return self._allocations[point.depth].count(layer_map(point.layer, point.entry))
        except (CorruptImage, OSError):
            return 0

    def own(self, point: Point) -> int | None:
        """Return the bytes in clusters of its file that only `point` uses: what deleting it would free.

        None where nobody can tell: refcounts that are stale (dirty bit), tables that are damaged or cannot be read, or
        the budget used up.
        """
        header = point.layer.header
        if header is None:
            return point.layer.disk_size
        if not isinstance(header, qcow2.Header) or header.external_data:
            return self._counted(point)  # it has no internal snapshots: all is its own
        # The budget: 65,536 snapshots may each name an L1 table of 32 MiB, and reading all those takes hours.
        if header.dirty or header.corrupt or self._budget.left <= 0:
            return None
        try:
            return self._exclusive(point.layer, header).count(layer_map(point.layer, point.entry))
        except (CorruptImage, OSError):
            return None

    def _exclusive(self, layer: Layer, header: qcow2.Header) -> Exclusive:
        if layer.depth not in self._exclusives:
            self._exclusives[layer.depth] = Exclusive(
                Cache(REFCOUNT_CACHE_SIZE),
                self._budget,
                refcount_table_offset=header.refcount_table_offset,
                refcount_table_clusters=header.refcount_table_clusters,
                refcount_order=header.refcount_order,
            )
        return self._exclusives[layer.depth]

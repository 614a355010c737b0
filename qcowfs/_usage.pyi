from collections.abc import Iterator

from qcowfs._cache import Cache
from qcowfs._tables import LayerMap

class Budget:
    left: int
    def __init__(self, size: int) -> None: ...

class Allocation:
    def __init__(self, budget: Budget) -> None: ...
    def count(self, layer: LayerMap) -> int: ...

class Exclusive:
    def __init__(
        self,
        cache: Cache,
        budget: Budget,
        *,
        refcount_table_offset: int,
        refcount_table_clusters: int,
        refcount_order: int,
    ) -> None: ...
    def count(self, layer: LayerMap) -> int | None: ...

def l2_tables(layer: LayerMap, entries: int) -> Iterator[int]: ...

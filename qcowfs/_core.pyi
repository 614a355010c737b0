from collections.abc import Sequence
from typing import NamedTuple

from qcowfs._cache import Cache
from qcowfs._guard import Guard
from qcowfs._tables import LayerMap

class Extent(NamedTuple):
    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None

class Disk:
    def __init__(
        self,
        layers: Sequence[LayerMap],
        virtual_size: int,
        cache: Cache | None,
        identity: int = 0,
        guards: Sequence[Guard] = (),
    ) -> None: ...
    @property
    def virtual_size(self) -> int: ...
    def pread(self, offset: int, length: int) -> bytes: ...
    def extents(self, offset: int, length: int, limit: int) -> list[Extent]: ...
    def seek(self, offset: int, whence: int) -> int | None: ...

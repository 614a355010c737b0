from collections.abc import Hashable
from typing import Protocol

from qcowfs._blockfile import BlockFile
from qcowfs._source import Source

class _Directory(Protocol):
    def open_blocks(self, identity: Hashable, size: int) -> BlockFile | None: ...
    def tidy(self) -> None: ...
    def give_up(self, failure: int) -> None: ...

class BlockCache:
    def __init__(self, budget: int) -> None: ...
    @property
    def budget(self) -> int: ...
    @property
    def used(self) -> int: ...
    def statistics(self) -> dict[str, int]: ...

class BlockSource(Source):
    def __init__(
        self,
        cache: BlockCache,
        base: Source,
        *,
        directory: _Directory | None = None,
        version: str | None = None,
        near: bool = False,
        patience: float = 0.0,
    ) -> None: ...
    def forget(self) -> None: ...

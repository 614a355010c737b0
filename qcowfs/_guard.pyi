from collections.abc import Callable

from qcowfs._source import Source

class Guard:
    @staticmethod
    def snapshot(
        source: Source,
        entry: bytes,
        find: Callable[[], tuple[int, int, int] | None],
        *,
        depth: int,
        table: int,
        count: int,
        place: int,
    ) -> Guard: ...
    @staticmethod
    def file(source: Source, *, depth: int, modified_ns: int) -> Guard: ...
    @staticmethod
    def device(source: Source, *, depth: int) -> Guard: ...
    def check(self) -> int: ...

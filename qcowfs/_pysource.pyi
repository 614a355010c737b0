from collections.abc import Callable, Hashable

from qcowfs._source import Source

class PythonSource(Source):
    def __init__(self, name: str, size: int, read: Callable[[int, memoryview], int], place: Hashable) -> None: ...

from collections.abc import Callable

from qcowfs._requests import QueuedSource
from qcowfs._source import Source

class LanesSource(Source):
    def __init__(self, first: QueuedSource, another: Callable[[], QueuedSource]) -> None: ...
    @property
    def connections(self) -> int: ...
    def open_others(self) -> None: ...

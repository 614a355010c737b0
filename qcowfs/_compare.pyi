from typing import NamedTuple

from qcowfs._core import Disk
from qcowfs.errors import ReadFault

class Batch(NamedTuple):
    ranges: bytes
    faults: list[tuple[int, int, ReadFault]]
    end: int

class Comparison:
    def __init__(self, old: Disk, new: Disk) -> None: ...
    @property
    def end(self) -> int: ...
    def candidates(self, offset: int, most_bytes: int, end: int = ...) -> Batch: ...
    def compare(self, ranges: bytes, block: int) -> Batch: ...

"""A raw disk as a sparse file.

Used by job.py. `write` may be called by any number of threads, each for ranges of its own.
"""

from __future__ import annotations

import os
from itertools import groupby

from qcowfs.export.kinds import DATA
from qcowfs.export.sharing import Run, share

__all__ = ["RawWriter"]


class RawWriter:
    """Writes what is not zero into an empty file.

    Args:
        descriptor: the file.
        virtual_size: bytes.
    """

    unit = 4096  # the blocks of most file systems: a smaller hole saves nothing

    def __init__(self, descriptor: int, virtual_size: int) -> None:
        self._descriptor = descriptor
        self._virtual_size = virtual_size

    def write(self, offset: int, data: memoryview, kinds: bytes | bytearray) -> None:
        """Write the units of `data` that hold something.

        Args:
            offset: of `data` in the disk.
            kinds: one byte for each unit.
        """
        start = 0
        for kind, group in groupby(kinds):
            end = start + len(list(group)) * self.unit
            if kind == DATA:
                write_all(self._descriptor, data[start:end], offset + start)
            start = end

    def share(self, offset: int, length: int, runs: list[Run]) -> bool:
        """Share `runs` instead of writing what is in them; False: it is to be written."""
        return share(runs, self._descriptor, offset)

    def finish(self) -> None:
        """Give the file its length; what the last unit has beyond the disk is cut off."""
        os.ftruncate(self._descriptor, self._virtual_size)


def write_all(descriptor: int, data: memoryview | bytes, offset: int) -> None:
    """Write all of `data` at `offset`: one call may write less, where room ends or a signal comes."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view = view[done:]
        offset += done

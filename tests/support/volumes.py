"""Bytes of a volume as compiled rooms read them, from a file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs._mapped import Mapped
from qcowfs._source import FileSource
from qcowfs._tables import LayerMap

__all__ = ["mapped_file"]


@contextmanager
def mapped_file(path: Path, start: int = 0) -> Iterator[Mapped]:
    """Yield the bytes of a file, from `start` on, as a volume of a raw disk."""
    size = path.stat().st_size
    source = FileSource(os.open(path, os.O_RDONLY), str(path))
    try:
        disk = Disk([LayerMap.raw(source, depth=0, virtual_size=size)], size, Cache(1 << 20))
        yield Mapped(size - start, [disk], [(0, size - start, 0, start)])
    finally:
        source.close()

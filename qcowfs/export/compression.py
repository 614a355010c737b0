"""Compression of one cluster as QEMU reads it, by the name of the compression type.

Used by qcow2file.py and the command line. Any number of threads; all of the work is done without the GIL.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

from qcowfs._codec import compress_zstd

__all__ = ["COMPRESSIONS", "Compress"]

Compress = Callable[[memoryview], bytes | None]  # None: not shorter than the cluster

WINDOW_BITS = -12  # raw deflate with a window of 4 KiB: QEMU decompresses with no more
MEMORY_LEVEL = 9


def _deflate(cluster: memoryview) -> bytes | None:
    stream = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, WINDOW_BITS, MEMORY_LEVEL)
    made = stream.compress(cluster) + stream.flush()
    return made if len(made) < len(cluster) else None


COMPRESSIONS: dict[str, Compress] = {"zlib": _deflate, "zstd": compress_zstd}

"""Blocks that the image and its export have in common, where their file system can do that (XFS, Btrfs, ...).

Used by copying.py and the writers. Nothing is read or written, and nothing taken on the disk. Any number of threads.
What cannot be shared is copied, so that no reason for it is an error.
"""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterable

from qcowfs._copy import descriptors_of, still_holds, stored_runs
from qcowfs._core import Disk

__all__ = ["Run", "can_share", "share", "still_holds", "stored_runs"]

FICLONERANGE = 0x4020940D  # linux/fs.h; where the kernel has another number, it knows no such call
RANGE = struct.Struct("=qQQQ")  # the source's descriptor, its offset, the length, the offset in the target
BLOCK = 4096

Run = tuple[int, int, int]  # descriptor, host offset, length


def can_share(disk: Disk, target: int) -> bool:
    """Try the first block of every file that `disk` is in; `target` is an empty file, and is so again."""
    files = descriptors_of(disk)
    try:
        return bool(files) and all(share([(file, 0, BLOCK)], target, 0) for file in files)
    finally:
        os.ftruncate(target, 0)


def share(runs: Iterable[Run], target: int, offset: int) -> bool:
    """Put `runs` one after the other at `offset` of `target`; False: some are not there, and any may be."""
    for file, host_offset, length in runs:
        try:
            fcntl.ioctl(target, FICLONERANGE, RANGE.pack(file, host_offset, length, offset))
        except OSError:  # not to multiples of a block, past the end of the file, no room for its tables
            return False
        offset += length
    return True

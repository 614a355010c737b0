"""The bytes of a volume, read through its segments.

Used by contents.py, which looks what a volume holds, and by commands. What the mount serves is read by compiled code
instead. One thread at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from qcowfs.errors import QcowfsError, TreeFault
from qcowfs.inside.volume import Disk, Volume

__all__ = ["Blocks", "VolumeBytes"]

BLOCK = 1 << 16  # what QEMU's clusters are by default: of a compressed one less costs as much
KEPT = 64  # blocks; 4 MiB


class VolumeBytes:
    """Reads `volume` from `disks`, whose numbers are those of the volume's segments."""

    def __init__(self, volume: Volume, disks: Sequence[Disk]) -> None:
        self.volume = volume
        self.size = volume.size
        self._disks = disks
        self._starts = [segment.start for segment in volume.segments]

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`, fewer only where the volume ends.

        Raises:
            QcowfsError: a disk cannot be read there, or the volume not at all (its `trouble`).
        """
        if self.volume.trouble:
            raise TreeFault(self.volume.name, self.volume.trouble)
        end = min(offset + length, self.size)
        parts = []
        while offset < end:
            part = self._part(offset, end)
            parts.append(part)
            offset += len(part)
        return b"".join(parts)

    def _part(self, offset: int, end: int) -> bytes:
        segment = self.volume.segments[bisect_right(self._starts, offset) - 1]
        inner = offset - segment.start
        wanted = min(end - offset, segment.length - inner)
        part = self._disks[segment.disk].pread(segment.offset + inner, wanted)
        if len(part) < wanted:
            raise TreeFault(self.volume.name, f"its bytes at {offset:#x} lie past the end of the disk")
        return part


class Blocks:
    """A disk whose small reads go by blocks, of which the last few are kept: a look at a disk is many small reads."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._blocks: dict[int, bytes] = {}
        self.virtual_size = disk.virtual_size

    def pread(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`, fewer only where the disk ends.

        Raises:
            QcowfsError: the range itself cannot be read; what lies around it in its blocks may be damaged.
        """
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if length <= 0 or last > first + 1:
            return self._disk.pread(offset, length)
        try:
            data = b"".join(self._block(number) for number in range(first, last + 1))
        except QcowfsError:
            return self._disk.pread(offset, length)
        return data[offset - first * BLOCK :][:length]

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            if len(self._blocks) == KEPT:
                self._blocks.pop(next(iter(self._blocks)))
            block = self._blocks[number] = self._disk.pread(number * BLOCK, BLOCK)
        return block

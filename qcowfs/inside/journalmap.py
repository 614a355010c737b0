"""Where the blocks of the journal's file are: the map of one ext3/ext4 inode, by extents or by indirect blocks.

Used by jbd2, before any other reader of the volume: what those read may still lie in the journal. As the kernel does,
it reads the volume as it is. A journal has no holes.
"""

from __future__ import annotations

import struct
from bisect import bisect_right

from qcowfs.inside.reader import Device, Unreadable
from qcowfs.limits import MAX_JOURNAL_BLOCKS, MAX_JOURNAL_MAP_DEPTH, MAX_JOURNAL_RUNS

__all__ = ["JournalMap"]

EXTENTS_FLAG = 0x80000
EXTENT_MAGIC = 0xF30A
EXTENT_HEADER = struct.Struct("<HHHH")  # magic, entries, max, depth; the generation follows
MAX_INITIALISED = 32768  # an extent that is longer is unwritten
DIRECT = 12


class JournalMap:
    """Runs of blocks that follow each other in the file and in the volume, in the order of the file.

    Attributes:
        blocks: blocks of the file, at most MAX_JOURNAL_BLOCKS.
    """

    def __init__(self, device: Device, block_size: int, flags: int, block: bytes, size: int) -> None:
        """Read the map of an inode.

        Args:
            block: its i_block, 60 bytes.
            size: bytes of the file.

        Raises:
            Unreadable: the map is broken, or longer than any journal's.
            OSError: a block of it cannot be read.
        """
        self.blocks = min(size // block_size, MAX_JOURNAL_BLOCKS)
        self._device = device
        self._block_size = block_size
        self._starts: list[int] = []
        self._runs: list[tuple[int, int]] = []  # blocks, first block in the volume
        self._end = 0
        if flags & EXTENTS_FLAG:
            self._read_extents(block, None)
        else:
            self._read_pointers(block)

    def run(self, number: int) -> tuple[int, int]:
        """Return the block of the volume where block `number` of the file is, and how many follow it there, and it.

        Raises:
            Unreadable: it is nowhere.
        """
        index = bisect_right(self._starts, number) - 1
        if index >= 0:
            length, first = self._runs[index]
            within = number - self._starts[index]
            if within < length:
                return first + within, length - within
        raise Unreadable(f"jbd2: block {number} of the journal is not on the volume")

    def _add(self, start: int, length: int, first: int) -> None:
        if start < self._end:
            raise Unreadable("jbd2: the map of the journal's inode is not in order")
        length = min(length, self.blocks - start)
        if length <= 0:
            return
        if (first + length) * self._block_size > self._device.size:
            raise Unreadable("jbd2: the journal's inode points outside the volume")
        if self._runs and start == self._end and sum(self._runs[-1]) == first:
            self._runs[-1] = (self._runs[-1][0] + length, self._runs[-1][1])
        elif len(self._runs) == MAX_JOURNAL_RUNS:
            raise Unreadable("jbd2: the journal is in too many pieces")
        else:
            self._starts.append(start)
            self._runs.append((length, first))
        self._end = start + length

    def _read_extents(self, node: bytes, depth: int | None) -> None:
        magic, entries, _, its_depth = EXTENT_HEADER.unpack_from(node)
        wrong = its_depth > MAX_JOURNAL_MAP_DEPTH if depth is None else its_depth != depth or not entries
        if magic != EXTENT_MAGIC or wrong or 12 + entries * 12 > len(node):
            raise Unreadable("jbd2: a block of the journal's extent tree is broken")
        for place in range(12, 12 + entries * 12, 12):
            if its_depth:
                low, high = struct.unpack_from("<IH", node, place + 4)
                self._read_extents(self._read_block(high << 32 | low), its_depth - 1)
            else:
                start, length, high, low = struct.unpack_from("<IHHI", node, place)
                if not length or length > MAX_INITIALISED:
                    raise Unreadable("jbd2: an extent of the journal is empty or unwritten")
                self._add(start, length, high << 32 | low)
            if self._end >= self.blocks:
                return

    def _read_pointers(self, block: bytes) -> None:
        pointers = struct.unpack("<15I", block)
        span = self._block_size // 4
        self._add_pointers(pointers[:DIRECT], 0)
        start = DIRECT
        for level, pointer in enumerate(pointers[DIRECT:]):
            if start < self.blocks:
                self._read_indirect(pointer, level, start)
            start += span ** (level + 1)

    def _read_indirect(self, pointer: int, level: int, start: int) -> None:
        pointers = struct.unpack(f"<{self._block_size // 4}I", self._read_block(pointer))
        if level == 0:
            self._add_pointers(pointers, start)
            return
        span = (self._block_size // 4) ** level
        for place, below in enumerate(pointers):
            if start + place * span >= self.blocks:
                return
            self._read_indirect(below, level - 1, start + place * span)

    def _add_pointers(self, pointers: tuple[int, ...], start: int) -> None:
        """Add the blocks that `pointers` name, joined: adding each alone took a second for a journal of 1 GiB."""
        place = 0
        count = min(len(pointers), self.blocks - start)
        while place < count:
            first, length = pointers[place], 1
            while place + length < count and pointers[place + length] == first + length:
                length += 1
            if not first:
                raise Unreadable("jbd2: the journal has a hole")
            self._add(start + place, length, first)
            place += length

    def _read_block(self, number: int) -> bytes:
        if not 0 < number < self._device.size // self._block_size:
            raise Unreadable("jbd2: the journal's inode points outside the volume")
        return self._device.read(number * self._block_size, self._block_size)

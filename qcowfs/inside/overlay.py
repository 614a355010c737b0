"""A volume as it is once its journal is recovered: most of it in place, the rest in the journal or in memory.

Made by jbd2, used by the reader of ext3/ext4 as its Device. Nothing is copied and nothing is written: a recovered block
is read from where the journal has it.
"""

from __future__ import annotations

import errno
import heapq
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from qcowfs.inside.reader import INLINE, Device, Extents
from qcowfs.inside.record import Extent

__all__ = ["Overlay"]

ESCAPED_BYTES = bytes.fromhex("c03b3998")  # the magic number, which the journal does not store at a block's start


class Overlay:
    """A Device that reads some blocks from other places.

    Attributes:
        size: bytes of the volume.
        block_size: bytes of a block.
    """

    def __init__(self, device: Device, block_size: int, blocks: array[int], places: array[int]) -> None:
        """Lay blocks over `device`.

        Args:
            blocks: numbers of blocks of the volume, in rising order.
            places: for each of them twice the block of the volume where it is really stored, and 1 more if its first
                four bytes are the magic number of jbd2 instead of what is stored there.
        """
        self.size = device.size
        self.block_size = block_size
        self._device = device
        self._blocks = blocks
        self._places = places
        self._made: dict[int, bytes] = {}
        self._made_blocks: list[int] = []

    def put(self, block: int, content: bytes) -> None:
        """Let `block` read as `content` from now on, whatever is laid over it: bytes that are stored nowhere."""
        if block not in self._made:
            insort(self._made_blocks, block)
        self._made[block] = content

    def covered(self) -> array[int]:
        """Return the blocks that are stored elsewhere, in rising order."""
        return array("Q", heapq.merge(self._blocks, self._made_blocks))

    def covered_ranges(self) -> list[tuple[int, int]]:
        """Return start and end of them in bytes, as few ranges as that can be."""
        found: list[tuple[int, int]] = []
        for block in self.covered():
            start, end = block * self.block_size, min((block + 1) * self.block_size, self.size)
            if found and start <= found[-1][1]:
                found[-1] = found[-1][0], end
            elif start < end:
                found.append((start, end))
        return found

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`.

        Raises:
            OSError: EIO, they cannot be read, or lie (partly) past the end.
        """
        return b"".join(
            place if isinstance(place, bytes) else self._device.read(place, count)
            for count, place in self.locate(offset, length)
        )

    def locate(self, offset: int, length: int) -> Iterable[tuple[int, int | bytes]]:
        """Return where a range of the recovered volume is: (bytes, offset in the volume, or the bytes themselves).

        Raises:
            OSError: EIO, it lies (partly) past the end.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(errno.EIO, "a read past the end of the volume")
        return _joined(self._pieces(offset, offset + length))

    def extents(self, extents: Iterable[Extent], limit: int, end: int) -> Extents:
        """Return where the bytes of a file are really stored: a Reader's answer.

        Args:
            extents: those of the file, in the recovered volume.
            limit: of the answer's.
            end: of the file.
        """
        found: list[Extent] = []
        inline = bytearray()
        for extent in extents:
            start = extent.start
            for length, place in self.locate(extent.offset, extent.length):
                if len(found) == limit:
                    return Extents(found, start, bytes(inline))
                if isinstance(place, bytes):
                    found.append(Extent(start, length, INLINE + len(inline)))
                    inline += place
                else:
                    found.append(Extent(start, length, place))
                start += length
        return Extents(found, end, bytes(inline))

    def _pieces(self, offset: int, end: int) -> Iterator[tuple[int, int | bytes]]:
        while offset < end:
            block, within = divmod(offset, self.block_size)
            length = min(self.block_size - within, end - offset)
            index = bisect_left(self._blocks, block)
            if block in self._made:
                yield length, self._made[block][within : within + length]
            elif index < len(self._blocks) and self._blocks[index] == block:
                place, escaped = divmod(self._places[index], 2)
                if escaped and within < len(ESCAPED_BYTES):
                    length = min(length, len(ESCAPED_BYTES) - within)
                    yield length, ESCAPED_BYTES[within : within + length]
                else:
                    yield length, place * self.block_size + within
            else:
                length = min(self._next(block, index) * self.block_size, end) - offset
                yield length, offset
            offset += length

    def _next(self, block: int, index: int) -> int:
        """Return the first block after `block` that is laid over; `index` is that of the first mapped one."""
        made = bisect_left(self._made_blocks, block)
        last = self.size // self.block_size + 1
        return min(
            self._blocks[index] if index < len(self._blocks) else last,
            self._made_blocks[made] if made < len(self._made_blocks) else last,
        )


def _joined(pieces: Iterable[tuple[int, int | bytes]]) -> Iterator[tuple[int, int | bytes]]:
    """Join pieces that follow each other on the volume."""
    start, total = 0, 0
    for length, place in pieces:
        if total and place == start + total:
            total += length
            continue
        if total:
            yield total, start
            total = 0
        if isinstance(place, bytes):
            yield length, place
        else:
            start, total = place, length
    if total:
        yield total, start

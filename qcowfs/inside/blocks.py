"""A volume as a worker reads it: every byte is asked of the mount process, in blocks that are kept for a while.

Used by worker.py. One thread. A run of blocks that follows the last one is asked for with more after it: the next
are likely wanted too, and a question costs more than its bytes.
"""

from __future__ import annotations

import errno
from collections import OrderedDict
from collections.abc import Callable

from qcowfs import limits

__all__ = ["Blocks"]

BLOCK = limits.INSIDE_BLOCK
AHEAD = 4  # blocks that are asked for at once in a sequential read


class Blocks:
    """A reader's Device."""

    def __init__(self, size: int, ask: Callable[[int, int], bytes]) -> None:
        """Make the device.

        Args:
            size: bytes of the volume.
            ask: returns exactly so many bytes at an offset, INSIDE_WANT at most, or raises OSError.
        """
        self._size = size
        self._ask = ask
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._next = -1  # the block after those that were asked for last

    @property
    def size(self) -> int:
        """Bytes of the volume."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes at `offset`; OSError (EIO) if they cannot be read or are not there."""
        if offset < 0 or length < 0 or offset + length > self._size:
            raise OSError(errno.EIO, f"{length} bytes at {offset} are not within {self._size}")
        if length == 0:
            return b""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        if last - first >= limits.INSIDE_BLOCKS // 2:  # it would push everything else out
            return self._uncached(offset, length)
        try:
            return self._cached(offset, length, first, last)
        except OSError:  # perhaps for a byte of a block that nobody has asked for
            return self._uncached(offset, length)

    def _cached(self, offset: int, length: int, first: int, last: int) -> bytes:
        if first == last:
            block = self._block(first, last)
            return block[offset - first * BLOCK : offset - first * BLOCK + length]
        whole = b"".join([self._block(number, last) for number in range(first, last + 1)])
        return whole[offset - first * BLOCK : offset - first * BLOCK + length]

    def _block(self, number: int, last: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            return self._fetch(number, last)
        self._blocks.move_to_end(number)
        return block

    def _fetch(self, number: int, last: int) -> bytes:
        count = min(last - number + 1, limits.INSIDE_WANT // BLOCK)
        if number == self._next:
            count = max(count, AHEAD)
        count = min(count, -(-self._size // BLOCK) - number)
        try:
            found = self._ask(number * BLOCK, min(count * BLOCK, self._size - number * BLOCK))
        except OSError:
            if count == 1:
                raise
            count = 1  # what lies behind may be what cannot be read
            found = self._ask(number * BLOCK, min(BLOCK, self._size - number * BLOCK))
        for place in range(count):
            self._keep(number + place, found[place * BLOCK : (place + 1) * BLOCK])
        self._next = number + count
        return found[:BLOCK]

    def _keep(self, number: int, block: bytes) -> None:
        self._blocks[number] = block
        self._blocks.move_to_end(number)
        while len(self._blocks) > limits.INSIDE_BLOCKS:
            self._blocks.popitem(last=False)

    def _uncached(self, offset: int, length: int) -> bytes:
        step = limits.INSIDE_WANT
        end = offset + length
        return b"".join([self._ask(place, min(step, end - place)) for place in range(offset, end, step)])

"""Chains of clusters in a file allocation table: where the bytes of a file of FAT or exFAT are.

Used by fat.py and exfat.py. A chain is followed only as far as its file needs it, and never further than the volume
has clusters, so that one that returns to itself ends.
"""

from __future__ import annotations

import errno
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from typing import NamedTuple

from qcowfs import limits
from qcowfs.inside.reader import Device, Extents
from qcowfs.inside.record import Extent

__all__ = ["FIRST", "Chain", "Heap", "Table"]

FIRST = 2  # the number of the first cluster: two entries of the table stand for none
CHUNK = 4096  # entries of the table that are decoded at once, a multiple of 2 for those of 12 bits
CHUNKS = 128  # of them kept: 2 MiB
PIECE = 64 << 10  # bytes of a directory that are read at once


class Chain(NamedTuple):
    """The clusters of a file, as runs of such as lie one behind the other.

    Run n begins with cluster `starts[n]` of the file (from 0), which is cluster `firsts[n]` of the volume; all of them
    are `length` clusters. `ended` is whether the table says that there is none after the last.
    """

    starts: array[int]
    firsts: array[int]
    length: int
    ended: bool


class Table:
    """The entries of a file allocation table: what comes after each cluster."""

    def __init__(self, device: Device, place: int, bits: int, count: int) -> None:
        """Read nothing yet.

        Args:
            place: byte of the volume at which the table begins.
            bits: of an entry that count: 12, 16, 28 (of the 32 of FAT32) or 32 (exFAT).
            count: clusters that the volume has, from FIRST on.
        """
        self._device = device
        self._place = place
        self._width = 32 if bits == 28 else bits
        self._mask = (1 << bits) - 1
        self._end = count + FIRST
        self._last = self._mask - 8  # a bad cluster; Linux takes it for an end, as it does what is above
        self._chunks: dict[int, array[int]] = {}

    def follow(self, first: int, most: int) -> Chain:
        """Return the chain that begins with the cluster `first`, `most` clusters of it at most.

        Raises:
            OSError: the table cannot be read, or the chain is in too many pieces.
        """
        starts, firsts, entries = array("Q"), array("Q"), array("I")
        most = min(most, self._end)  # a chain of more clusters than there are visits one of them twice
        length, cluster, expected, base = 0, first, -1, -CHUNK
        while length < most and FIRST <= cluster < self._end:
            if cluster != expected:
                starts.append(length)
                firsts.append(cluster)
                if len(starts) > limits.MAX_FAT_RUNS:
                    raise OSError(errno.EIO, "a chain of clusters in too many pieces")
            length += 1
            expected = cluster + 1
            if not 0 <= cluster - base < CHUNK:
                base = cluster - cluster % CHUNK
                entries = self._chunk(base)
            cluster = entries[cluster - base] & self._mask
        return Chain(starts, firsts, length, length > 0 and cluster >= self._last)

    def contiguous(self, first: int, length: int) -> Chain:
        """Return `length` clusters from `first` on, those of them that there are, whatever the table says."""
        length = max(min(length, self._end - first), 0) if first >= FIRST else 0
        return Chain(array("Q", [0] if length else []), array("Q", [first] if length else []), length, ended=True)

    def _chunk(self, base: int) -> array[int]:
        """Return the entries from `base` on, CHUNK of them where there are so many."""
        entries = self._chunks.get(base)
        if entries is None:
            count = min(CHUNK, self._end - base)
            found = self._device.read(self._place + base * self._width // 8, -(-count * self._width // 8))
            entries = _twelve(found) if self._width == 12 else _whole(found, self._width)
            if len(self._chunks) >= CHUNKS:
                self._chunks.clear()
            self._chunks[base] = entries
        return entries


def _whole(stored: bytes, bits: int) -> array[int]:
    entries = array("I" if bits == 32 else "H")
    entries.frombytes(stored)
    if sys.byteorder == "big":
        entries.byteswap()
    return entries


def _twelve(stored: bytes) -> array[int]:
    """Return entries of 12 bits, of which three bytes hold two."""
    entries = array("H")
    stored += bytes(-len(stored) % 3)
    for low, middle, high in zip(stored[::3], stored[1::3], stored[2::3], strict=True):
        entries.extend((low | (middle & 15) << 8, middle >> 4 | high << 4))
    return entries


class Heap:
    """The clusters themselves."""

    def __init__(self, device: Device, place: int, size: int) -> None:
        """Read nothing yet; cluster FIRST begins at byte `place`, and each has `size` bytes."""
        self._device = device
        self._place = place
        self.size = size

    def place(self, cluster: int) -> int:
        """Return the byte of the volume at which `cluster` begins."""
        return self._place + (cluster - FIRST) * self.size

    def cluster(self, place: int) -> int:
        """Return the cluster in which the byte `place` of the volume is."""
        return (place - self._place) // self.size + FIRST

    def pieces(self, chain: Chain) -> Iterator[tuple[int, int]]:
        """Yield place and length of what can be read at once, in bytes, PIECE at most."""
        for number, (start, first) in enumerate(zip(chain.starts, chain.firsts, strict=True), 1):
            end = chain.starts[number] if number < len(chain.starts) else chain.length
            place = self.place(first)
            for offset in range(0, (end - start) * self.size, PIECE):
                yield place + offset, min(PIECE, (end - start) * self.size - offset)

    def extents(self, chain: Chain, offset: int, limit: int, stored: int, size: int) -> Extents:
        """Return where the bytes of a file are, as reader.Reader.extents does.

        Args:
            stored: bytes of the file that are in its clusters; the rest up to `size` is zeros.

        Raises:
            OSError: EIO, the chain has no cluster for `offset`.
        """
        if offset >= stored:
            return Extents([], size)
        if offset >= chain.length * self.size:
            raise OSError(errno.EIO, f"its chain of clusters ends after {chain.length}, before the file does")
        found: list[Extent] = []
        number = max(bisect_right(chain.starts, offset // self.size) - 1, 0)
        count = len(chain.starts)
        for run in range(number, min(count, number + limit)):
            start = chain.starts[run] * self.size
            end = min((chain.starts[run + 1] if run + 1 < count else chain.length) * self.size, stored)
            if start < end:
                found.append(Extent(start, end - start, self.place(chain.firsts[run])))
        reached = found[-1].start + found[-1].length
        return Extents(found, size if reached == stored else reached)

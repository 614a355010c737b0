"""A qcow2 image, written once from the start to the end: version 3, clusters of 64 KiB, refcounts of 16 bits.

Used by job.py. `write` may be called by any number of threads, each for ranges of its own. Source: the qcow2
specification. The file grows: header, L1 table, then data and L2 tables as they come, and the refcounts last, when it
is known what they count. L2 tables are not held in memory: the entries of each range are written with its data.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from array import array
from itertools import groupby
from typing import NamedTuple

from qcowfs import limits
from qcowfs.errors import QcowfsError
from qcowfs.export.compression import Compress
from qcowfs.export.kinds import DATA, ZEROS
from qcowfs.export.rawfile import write_all
from qcowfs.export.sharing import Run, share
from qcowfs.qcow2 import header

__all__ = ["Backing", "Qcow2Writer"]

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS
L2_ENTRIES = CLUSTER // 8
REACH = CLUSTER * L2_ENTRIES  # bytes of the disk under one L2 table
SECTOR_BITS = 9
REFCOUNT_ORDER = 4
BLOCK_ENTRIES = CLUSTER // 2  # refcounts of one block
COPIED = 1 << 63  # the refcount is exactly one
COMPRESSED = 1 << 62
READS_AS_ZEROS = 1
SECTORS_SHIFT = 62 - (CLUSTER_BITS - 8)  # of a compressed cluster descriptor: the offset below, the sectors above
HEADER = ">4sIQIIQIIQQIIQQQQII"
HEADER_LENGTH = 112  # with the compression type, and padding to a multiple of 8
VERSION = 3


class Backing(NamedTuple):
    """What an overlay says of its backing file."""

    name: bytes
    format: str


class Qcow2Writer:
    """Writes an image into an empty file.

    Args:
        descriptor: the file.
        virtual_size: bytes.
        backing: None for an image that stands alone.
        compress: compresses one cluster; None: clusters are stored as they are.
        zstd: what `compress` makes is zstd, not deflate.

    Raises:
        QcowfsError: QEMU would not open an image of that size.
    """

    unit = CLUSTER

    def __init__(
        self,
        descriptor: int,
        virtual_size: int,
        *,
        backing: Backing | None = None,
        compress: Compress | None = None,
        zstd: bool = False,
    ) -> None:
        self._descriptor = descriptor
        self._virtual_size = virtual_size
        self._backing = backing
        self._compress = compress
        self._zstd = zstd
        self._lock = threading.Lock()  # for all below
        l1_entries = -(-virtual_size // REACH)
        if l1_entries * 8 > limits.MAX_L1_SIZE:
            raise QcowfsError(
                f"a disk of {virtual_size:#x} bytes is too large for a qcow2 image with clusters of 64 KiB"
            )
        self._l1 = array("Q", bytes(8 * l1_entries))
        self._refcounts = array("H")  # of every host cluster so far
        self._loose = 0  # host offset where the next compressed cluster may go: within a cluster that has room
        self._allocate(1)
        self._l1_offset = self._allocate(-(-len(self._l1) * 8 // CLUSTER)) if self._l1 else CLUSTER

    def write(self, offset: int, data: memoryview, kinds: bytes | bytearray) -> None:
        """Write the clusters of `data` that the image needs.

        Args:
            offset: of `data` in the disk: a multiple of a cluster, all of it under one L2 table.
            kinds: one byte for each cluster.
        """
        if not any(kinds):
            return
        entries = array("Q", bytes(8 * len(kinds)))
        place = 0
        for kind, group in groupby(kinds):
            count = len(list(group))
            if kind == ZEROS:
                entries[place : place + count] = array("Q", [READS_AS_ZEROS] * count)
            elif kind == DATA:
                clusters = data[place * CLUSTER : (place + count) * CLUSTER]
                entries[place : place + count] = self._write_data(clusters, count)
            place += count
        self._write_entries(offset, entries)

    def share(self, offset: int, length: int, runs: list[Run]) -> bool:
        """Share `runs` instead of writing the clusters that are in them; False: they are to be written."""
        count = length // CLUSTER
        with self._lock:
            host_offset = self._allocate(count)
        if not share(runs, self._descriptor, host_offset):
            self._give_up(host_offset, count)
            return False
        self._write_entries(offset, _standard(host_offset, count))
        return True

    def finish(self) -> None:
        """Write the tables and the header; the file is an image only now."""
        table_offset, table_clusters = self._write_refcounts()
        write_all(self._descriptor, _big_endian(self._l1), self._l1_offset)
        os.ftruncate(self._descriptor, len(self._refcounts) * CLUSTER)
        write_all(self._descriptor, self._header(table_offset, table_clusters), 0)

    def _write_data(self, clusters: memoryview, count: int) -> array[int]:
        if self._compress is not None:
            pieces = (clusters[start : start + CLUSTER] for start in range(0, count * CLUSTER, CLUSTER))
            return array("Q", map(self._write_compressed, pieces))
        with self._lock:
            host_offset = self._allocate(count)
        write_all(self._descriptor, clusters, host_offset)
        return _standard(host_offset, count)

    def _write_compressed(self, cluster: memoryview) -> int:
        stream = self._compress(cluster) if self._compress else None
        if stream is None:
            with self._lock:
                host_offset = self._allocate(1)
            write_all(self._descriptor, cluster, host_offset)
            return host_offset | COPIED
        with self._lock:
            host_offset = self._allocate_bytes(len(stream))
        write_all(self._descriptor, stream, host_offset)
        further_sectors = (host_offset + len(stream) - 1 >> SECTOR_BITS) - (host_offset >> SECTOR_BITS)
        return COMPRESSED | further_sectors << SECTORS_SHIFT | host_offset

    def _write_entries(self, offset: int, entries: array[int]) -> None:
        table = self._l2_table(offset // REACH)
        write_all(self._descriptor, _big_endian(entries), table + offset % REACH // CLUSTER * 8)

    def _l2_table(self, index: int) -> int:
        """Return the host offset of the L2 table under L1 entry `index`; it is a hole of the file at first."""
        with self._lock:
            if not self._l1[index]:
                self._l1[index] = self._allocate(1) | COPIED
            return self._l1[index] & ~COPIED

    def _allocate(self, count: int) -> int:
        """Return the host offset of `count` new clusters. The lock is held."""
        host_offset = len(self._refcounts) * CLUSTER
        self._refcounts.extend([1] * count)
        return host_offset

    def _give_up(self, host_offset: int, count: int) -> None:
        """Leave clusters unused: a hole of the file, as nothing was written there."""
        with self._lock:
            first = host_offset // CLUSTER
            self._refcounts[first : first + count] = array("H", bytes(2 * count))

    def _allocate_bytes(self, length: int) -> int:
        """Return the host offset of room for compressed data, less than a cluster of it. The lock is held.

        It goes after the last such data: within that one's cluster, and over into a new one if that follows at once.
        Each cluster counts the streams that touch it.
        """
        room = -self._loose % CLUSTER
        if length > room:
            fresh = self._allocate(1)
            self._refcounts[-1] = 0
            if room == 0 or fresh != self._loose + room:
                self._loose = fresh
        host_offset = self._loose
        self._loose += length
        for number in range(host_offset // CLUSTER, (self._loose - 1) // CLUSTER + 1):
            self._refcounts[number] += 1
        return host_offset

    def _write_refcounts(self) -> tuple[int, int]:
        """Write the refcounts of all clusters, these tables' own too; return the table's offset and clusters."""
        blocks = table = 0
        while True:
            counted = len(self._refcounts) + blocks + table
            needed = -(-counted // BLOCK_ENTRIES)
            if needed == blocks and -(-blocks * 8 // CLUSTER) == table:
                break
            blocks, table = needed, -(-needed * 8 // CLUSTER)
        table_offset = self._allocate(table)
        first = self._allocate(blocks)
        write_all(self._descriptor, _big_endian(self._refcounts), first)
        offsets = array("Q", range(first, first + blocks * CLUSTER, CLUSTER))
        write_all(self._descriptor, _big_endian(offsets), table_offset)
        return table_offset, table

    def _header(self, table_offset: int, table_clusters: int) -> bytes:
        extensions = b""
        name = b""
        if self._backing is not None:
            format_name = self._backing.format.encode()
            padding = bytes(-len(format_name) % 8)
            extensions = struct.pack(">II", header.BACKING_FORMAT, len(format_name)) + format_name + padding
            name = self._backing.name
        extensions += bytes(8)  # the end of the extensions
        return (
            struct.pack(
                HEADER,
                header.MAGIC,
                VERSION,
                HEADER_LENGTH + len(extensions) if name else 0,
                len(name),
                CLUSTER_BITS,
                self._virtual_size,
                0,  # no encryption
                len(self._l1),
                self._l1_offset,
                table_offset,
                table_clusters,
                0,  # no snapshots
                0,
                1 << header.COMPRESSION_TYPE if self._zstd else 0,
                0,
                0,
                REFCOUNT_ORDER,
                HEADER_LENGTH,
            )
            + struct.pack(">B7x", self._zstd)
            + extensions
            + name
        )


def _standard(host_offset: int, count: int) -> array[int]:
    """Return the L2 entries of clusters that lie one after the other."""
    return array("Q", (host_offset + number * CLUSTER | COPIED for number in range(count)))


def _big_endian(numbers: array[int]) -> memoryview:
    """Return the bytes of `numbers` as qcow2 has them; turns them round in place."""
    if sys.byteorder == "little":
        numbers.byteswap()
    return memoryview(numbers).cast("B")

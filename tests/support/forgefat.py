"""FAT and exFAT file systems made byte by byte, so that a test can have what no driver would write.

A tree is a mapping of names to bytes, to another tree, or to a File that says how it is stored. Clusters are given out
in a seeded disorder, so that nearly every chain is in pieces.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias, Union

__all__ = ["Exfat", "Fat", "File", "Memory", "Tree"]

ENTRY = 32
SECTOR = 512
DATE, TIME = (45 << 9) | (2 << 5) | 3, (4 << 11) | (5 << 5) | 3  # 2025-02-03 04:05:06


@dataclass(frozen=True)
class File:
    """How a file is stored. `valid`: its valid length, of exFAT; `chained`: in the table; `zone`: exFAT's zone byte."""

    content: bytes = b""
    attributes: int = 0x20
    valid: int | None = None
    chained: bool = True
    zone: int = 0


Tree: TypeAlias = Mapping[str, Union[bytes, File, "Tree"]]


class Memory:
    """A Device that is bytes. It remembers what was read of it."""

    def __init__(self, data: bytes | bytearray) -> None:
        self.data = bytearray(data)
        self.size = len(data)
        self.reads: dict[tuple[int, int], None] = {}

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(5, "a read past the end of the volume")
        self.reads[offset, length] = None
        return bytes(self.data[offset : offset + length])


class _Image:
    """What both have: clusters, and a table of what comes after each."""

    def __init__(self, rng: random.Random, heap: int, cluster_size: int, clusters: int) -> None:
        self.rng = rng
        self.heap = heap
        self.cluster_size = cluster_size
        self.clusters = clusters
        self.data = bytearray(heap + clusters * cluster_size)
        self.table: dict[int, int] = {}
        self.entries: dict[str, int] = {}  # the path of each file, and the place of its own entry
        self._free = list(range(2, clusters + 2))
        rng.shuffle(self._free)

    def place(self, cluster: int) -> int:
        return self.heap + (cluster - 2) * self.cluster_size

    def take(self, size: int, *, together: bool = False) -> list[int]:
        """Return clusters for `size` bytes, one behind the other if `together`."""
        count = -(-size // self.cluster_size)
        if together:
            free = set(self._free)
            first = next(n for n in sorted(free) if all(n + more in free for more in range(count)))
            taken = list(range(first, first + count))
            self._free = [cluster for cluster in self._free if cluster not in taken]
            return taken
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def chain(self, clusters: list[int]) -> None:
        for cluster, after in zip(clusters, [*clusters[1:], self.end_of_chain], strict=False):
            self.table[cluster] = after

    def write(self, clusters: list[int], content: bytes) -> None:
        for number, cluster in enumerate(clusters):
            piece = content[number * self.cluster_size :][: self.cluster_size]
            self.data[self.place(cluster) : self.place(cluster) + len(piece)] = piece

    end_of_chain = 0


class Fat(_Image):
    """FAT12, FAT16 or FAT32 with clusters of one sector."""

    def __init__(self, bits: int, tree: Tree, seed: int = 1, clusters: int = 600) -> None:
        self.bits = bits
        clusters = {12: clusters, 16: 4200, 32: clusters}[bits]
        self.reserved = 32 if bits == 32 else 1
        self.fat_length = -(-(clusters + 2) * bits // 8 // SECTOR) + 1
        self.root = (self.reserved + self.fat_length) * SECTOR
        self.root_entries = 0 if bits == 32 else 512
        super().__init__(random.Random(seed), self.root + self.root_entries * ENTRY, SECTOR, clusters)
        self.end_of_chain = (1 << min(bits, 28)) - 1
        self.root_clusters = self.take(16 * SECTOR) if bits == 32 else []
        stored = self._directory(tree, "", self.root_clusters, self.root_clusters[0] if bits == 32 else 0)
        if bits == 32:
            self.chain(self.root_clusters)
            self.write(self.root_clusters, stored)
        else:
            self.data[self.root : self.root + len(stored)] = stored
        self.finish()

    def finish(self) -> bytearray:
        """Write the boot sector and the table, and return the image."""
        total = len(self.data) // SECTOR
        boot = bytearray(SECTOR)
        struct.pack_into("<HBHBHHBH", boot, 11, SECTOR, 1, self.reserved, 1, self.root_entries, 0, 0xF8, 0)
        struct.pack_into("<I", boot, 32, total)
        if self.bits == 32:
            struct.pack_into("<IHHI", boot, 36, self.fat_length, 0, 0, self.root_clusters[0])
            boot[0x52:0x5A] = b"FAT32   "
        else:
            struct.pack_into("<H", boot, 22, self.fat_length)
            boot[0x36:0x3E] = b"FAT12   " if self.bits == 12 else b"FAT16   "
        boot[510:] = b"\x55\xaa"
        self.data[:SECTOR] = boot
        whole = sum(after << cluster * self.bits for cluster, after in self.table.items())
        table = whole.to_bytes(self.fat_length * SECTOR, "little")
        self.data[self.reserved * SECTOR : (self.reserved + self.fat_length) * SECTOR] = table
        return self.data

    def _directory(self, tree: Tree, path: str, clusters: list[int], parent: int) -> bytes:
        """Return the entries of a directory, whose clusters are taken already, and write what is in it."""
        stored: list[bytes] = []
        if path:
            stored += [_fat_entry(b".".ljust(11), 0x10, clusters[0], 0), _fat_entry(b"..".ljust(11), 0x10, parent, 0)]
        for number, (name, content) in enumerate(tree.items(), 1):
            long = list(long_entries(name, short := b"FILE%04dTXT" % number))
            at = sum(map(len, stored)) + sum(map(len, long))
            full = f"{path}/{name}" if path else name
            base = self.place(clusters[at // SECTOR]) + at % SECTOR if clusters else self.root + at
            self.entries[full] = base
            stored += [*long, self._file(short, content, full, clusters[0] if path and clusters else 0)]
        return b"".join(stored)

    def _file(self, short: bytes, content: bytes | File | Tree, path: str, parent: int) -> bytes:
        if isinstance(content, Mapping):
            clusters = self.take(max(len(content) * 640, SECTOR))
            self.chain(clusters)
            self.write(clusters, self._directory(content, path, clusters, parent))
            return _fat_entry(short, 0x10, clusters[0], 0)
        file = content if isinstance(content, File) else File(content)
        clusters = self.take(len(file.content))
        self.chain(clusters)
        self.write(clusters, file.content)
        return _fat_entry(short, file.attributes, clusters[0] if clusters else 0, len(file.content))


def checksum(short: bytes) -> int:
    total = 0
    for byte in short:
        total = (((total & 1) << 7) + (total >> 1) + byte) & 255
    return total


def long_entries(name: str, short: bytes) -> list[bytes]:
    """Return the entries of a long name, the last part first."""
    stored = name.encode("utf-16-le", "surrogatepass")
    count = -(-len(stored) // 26)
    stored = (stored + (b"\0\0" if len(stored) % 26 else b"")).ljust(count * 26, b"\xff")
    made = []
    for number in range(count, 0, -1):
        part = stored[(number - 1) * 26 :][:26]
        head = bytes([number | (0x40 if number == count else 0)])
        made.append(head + part[:10] + bytes([0x0F, 0, checksum(short)]) + part[10:22] + b"\0\0" + part[22:])
    return made


def _fat_entry(short: bytes, attributes: int, first: int, size: int) -> bytes:
    return short + struct.pack(
        "<BBBHHHHHHHI", attributes, 0, 0, TIME, DATE, DATE, first >> 16, TIME, DATE, first & 0xFFFF, size
    )  # fmt: skip


class Exfat(_Image):
    """exFAT with clusters of one sector."""

    TABLE = 24  # its sector
    end_of_chain = 0xFFFFFFFF

    def __init__(self, tree: Tree, seed: int = 1, clusters: int = 600) -> None:
        self.table_length = -(-(clusters + 2) * 4 // SECTOR)
        super().__init__(random.Random(seed), (self.TABLE + self.table_length) * SECTOR, SECTOR, clusters)
        self.root_clusters = self.take(16 * SECTOR)
        self.chain(self.root_clusters)
        self.write(self.root_clusters, self._directory(tree, "", self.root_clusters))
        self.finish()

    def finish(self) -> bytearray:
        """Write the boot region and the table, and return the image."""
        boot = bytearray(11 * SECTOR)
        boot[:11] = b"\xeb\x76\x90EXFAT   "
        total = len(self.data) // SECTOR
        heap = self.heap // SECTOR
        struct.pack_into(
            "<QIIIII", boot, 72, total, self.TABLE, self.table_length, heap, self.clusters, self.root_clusters[0]
        )
        struct.pack_into("<IHHBBB", boot, 100, 1, 0x100, 0, 9, 0, 1)
        for number in range(9):
            boot[(number + 1) * SECTOR - 2 : (number + 1) * SECTOR] = b"\x55\xaa"
        total = 0
        for at, byte in enumerate(boot):
            if at not in (106, 107, 112):
                total = ((total << 31 | total >> 1) + byte) & 0xFFFFFFFF
        self.data[: len(boot) + SECTOR] = boot + struct.pack("<I", total) * (SECTOR // 4)
        for cluster, after in self.table.items():
            struct.pack_into("<I", self.data, self.TABLE * SECTOR + cluster * 4, after)
        return self.data

    def _directory(self, tree: Tree, path: str, clusters: list[int]) -> bytes:
        stored = [b"\x83".ljust(ENTRY, b"\0")]  # an empty label, so that the entries of files lie across clusters
        for name, content in tree.items():
            at = sum(map(len, stored))
            full = f"{path}/{name}" if path else name
            self.entries[full] = self.place(clusters[at // SECTOR]) + at % SECTOR
            stored.append(self._file(name, content, full))
        return b"".join(stored)

    def _file(self, name: str, content: bytes | File | Tree, path: str) -> bytes:
        if isinstance(content, Mapping):
            clusters = self.take(max(len(content) * 640, SECTOR))
            self.chain(clusters)
            self.write(clusters, self._directory(content, path, clusters))
            return _exfat_entries(name, File(bytes(len(clusters) * SECTOR), 0x10), clusters[0])
        file = content if isinstance(content, File) else File(content)
        clusters = self.take(len(file.content), together=not file.chained)
        if file.chained:
            self.chain(clusters)
        self.write(clusters, file.content)
        return _exfat_entries(name, file, clusters[0] if clusters else 0)


def _exfat_entries(name: str, file: File, first: int) -> bytes:
    stored = name.encode("utf-16-le", "surrogatepass")
    parts = [stored[at : at + 30].ljust(30, b"\0") for at in range(0, len(stored), 30)]
    head = bytearray(ENTRY)
    stamp = DATE << 16 | TIME
    zone = file.zone
    struct.pack_into("<BBHHHIIIBBBBB", head, 0, 0x85, 1 + len(parts), 0, file.attributes, 0, stamp, stamp, stamp,
                     0, 50, zone, zone, zone)  # fmt: skip
    size = len(file.content)
    stream = struct.pack("<BBBBHHQIIQ", 0xC0, 1 if file.chained else 3, 0, len(stored) // 2, 0, 0,
                         size if file.valid is None else file.valid, 0, first, size)  # fmt: skip
    whole = head + stream + b"".join(b"\xc1\0" + part for part in parts)
    total = 0
    for at, byte in enumerate(whole):
        if at not in (2, 3):
            total = ((total << 15 | total >> 1) + byte) & 0xFFFF
    whole[2:4] = total.to_bytes(2, "little")
    return bytes(whole)

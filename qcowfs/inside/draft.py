"""A recovered ext4 volume that is still being changed: inodes, extent maps and blocks, with their checksums.

Used by fastreplay. Changes are kept apart until `apply`, so that a replay that cannot go on leaves nothing behind.
Names are those of struct ext4_inode and struct ext4_extent; all little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from qcowfs._crc32c import crc32c
from qcowfs.inside.extsuper import Super
from qcowfs.inside.overlay import Overlay
from qcowfs.limits import MAX_FAST_COMMIT_BLOCKS, MAX_FAST_COMMIT_WORK

__all__ = ["EXTENTS", "HUGE_FILE", "INLINE_DATA", "Draft", "NotReplayed", "Run"]

EXTENTS, HUGE_FILE, INLINE_DATA = 0x80000, 0x40000, 0x10000000
INCOMPAT_FILETYPE, INCOMPAT_CSUM_SEED = 0x2, 0x2000
# meta_bg, mmp, casefold, encrypt, large_dir: other places for descriptors, or other names.
INCOMPAT_OTHER = 0x10 | 0x100 | 0x20000 | 0x10000 | 0x4000
RO_COMPAT_BIGALLOC = 0x200

EXTENT_HEADER = struct.Struct("<HHHHI")
EXTENT_MAGIC = 0xF30A
ROOT_ENTRIES = 4
MAX_LENGTH = 32768  # blocks of an extent; one that is unwritten is stored with 32768 more, and is one shorter


class NotReplayed(Exception):
    """This cannot be replayed as the kernel would; the text says why."""


class Run(NamedTuple):
    """An extent: `length` blocks of a file, from `start` on, are at `block` of the volume."""

    start: int
    length: int
    block: int
    unwritten: bool


class Draft:
    """The volume, and what changed in it.

    Attributes:
        block_size: bytes.
        has_csums: whether metadata carries checksums.
        has_types: whether directory entries have types.
    """

    def __init__(self, overlay: Overlay, spare: list[int]) -> None:
        """Begin without changes.

        Args:
            spare: blocks that no file has, for new blocks of directories and maps.
        """
        raw = overlay.read(1024, 1024)
        incompat, ro_compat = struct.unpack_from("<II", raw, 0x60)
        if incompat & INCOMPAT_OTHER or ro_compat & RO_COMPAT_BIGALLOC or overlay.block_size > 32768:
            raise NotReplayed("the file system has features with which it is not known how")
        self.block_size = overlay.block_size
        self.has_csums = bool(ro_compat & 0x400)
        self.has_types = bool(incompat & INCOMPAT_FILETYPE)
        self._overlay = overlay
        self._blocks: dict[int, bytearray] = {}
        self._spare = spare
        self._work = MAX_FAST_COMMIT_WORK
        self._inodes: int = struct.unpack_from("<I", raw)[0]
        self._seed = crc32c(0xFFFFFFFF, raw[0x68:0x78])
        if incompat & INCOMPAT_CSUM_SEED:
            self._seed = struct.unpack_from("<I", raw, 0x270)[0]

    def apply(self) -> None:
        """Lay all changes over the volume."""
        for number, content in self._blocks.items():
            self._overlay.put(number, bytes(content))

    def block(self, number: int) -> bytearray:
        """Return a block; what is changed in it stays changed."""
        if number not in self._blocks:
            if not 0 < number < self._overlay.size // self.block_size or len(self._blocks) >= MAX_FAST_COMMIT_BLOCKS:
                raise NotReplayed("a block is outside the volume, or there are too many")
            self._blocks[number] = bytearray(self._overlay.read(number * self.block_size, self.block_size))
        return self._blocks[number]

    def spend(self, work: int = 1) -> None:
        """Count directory entries or extents that are looked at."""
        self._work -= work
        if self._work < 0:
            raise NotReplayed("it is more work than any commit was")

    def new_block(self) -> int:
        """Return the number of a block of zeros that nobody has."""
        if not self._spare:
            raise NotReplayed("there is no room for new blocks")
        number = self._spare.pop()
        self._blocks[number] = bytearray(self.block_size)
        return number

    def inode(self, superblock: Super, number: int) -> memoryview:
        """Return the bytes of an inode, to be changed; `seal` makes its checksum right."""
        if not 0 < number <= self._inodes:
            raise NotReplayed(f"there is no inode {number}")
        group, index = divmod(number - 1, superblock.inodes_per_group)
        place = (1024 // self.block_size + 1) * self.block_size + group * superblock.descriptor_size
        block, within = divmod(place, self.block_size)
        descriptor = self._overlay.read(block * self.block_size + within, superblock.descriptor_size)
        table = int.from_bytes(descriptor[8:12], "little")
        if superblock.descriptor_size >= 64:
            table |= int.from_bytes(descriptor[0x28:0x2C], "little") << 32
        block, within = divmod(index * superblock.inode_size, self.block_size)
        return memoryview(self.block(table + block))[within : within + superblock.inode_size]

    def seed(self, number: int, inode: memoryview) -> int:
        """Return what the checksums of an inode and of its blocks begin with."""
        return crc32c(crc32c(self._seed, struct.pack("<I", number)), inode[0x64:0x68])

    def seal(self, number: int, inode: memoryview) -> None:
        """Write the checksum of an inode."""
        if not self.has_csums:
            return
        has_high = len(inode) > 128 and int.from_bytes(inode[0x80:0x82], "little") >= 4
        inode[0x7C:0x7E] = bytes(2)
        if has_high:
            inode[0x82:0x84] = bytes(2)
        checksum = crc32c(self.seed(number, inode), inode)
        inode[0x7C:0x7E] = struct.pack("<H", checksum & 0xFFFF)
        if has_high:
            inode[0x82:0x84] = struct.pack("<H", checksum >> 16)

    def runs(self, inode: memoryview) -> tuple[list[Run], int]:
        """Return the extents of an inode, and how many blocks their tree takes."""
        if not int.from_bytes(inode[0x20:0x24], "little") & EXTENTS:
            raise NotReplayed("a file has no extents")
        nodes: list[int] = []
        runs = list(self._leaves(bytes(inode[0x28:0x64]), None, nodes))
        if any(after.start < run.start + run.length for run, after in pairwise(runs)):
            raise NotReplayed("a file's extents are not in order")
        return runs, len(nodes)

    def _leaves(self, node: bytes, depth: int | None, nodes: list[int]) -> Iterator[Run]:
        magic, entries, _, its_depth, _ = EXTENT_HEADER.unpack_from(node)
        if magic != EXTENT_MAGIC or 12 + entries * 12 > len(node) or its_depth > 5 or depth not in (None, its_depth):
            raise NotReplayed("a file's extents are broken")
        self.spend(entries + 1)
        for place in range(12, 12 + entries * 12, 12):
            start, low, high = struct.unpack_from("<IIH", node, place)
            if its_depth:
                nodes.append(high << 32 | low)
                if len(nodes) > MAX_FAST_COMMIT_BLOCKS:
                    raise NotReplayed("a file has too many extents")
                yield from self._leaves(bytes(self.block(nodes[-1])), its_depth - 1, nodes)
                continue
            start, length, high, low = struct.unpack_from("<IHHI", node, place)
            unwritten = length > MAX_LENGTH
            yield Run(start, length - MAX_LENGTH if unwritten else length, high << 32 | low, unwritten)

    def set_runs(self, number: int, inode: memoryview, runs: list[Run]) -> None:
        """Give an inode these extents; they are joined where they can be."""
        packed = [_pack(run) for run in _joined(runs)]
        if len(packed) <= ROOT_ENTRIES:
            inode[0x28:0x64] = _node(packed, ROOT_ENTRIES, 0).ljust(60, b"\0")
            return
        room = (self.block_size - 12) // 12
        index = []
        for first in range(0, len(packed), room):
            leaf = packed[first : first + room]
            block = self.new_block()
            content = self.block(block)
            content[:-4] = _node(leaf, room, 0).ljust(self.block_size - 4, b"\0")
            if self.has_csums:
                content[-4:] = struct.pack("<I", crc32c(self.seed(number, inode), content[:-4]))
            index.append(struct.pack("<4sIHH", leaf[0][:4], block & 0xFFFFFFFF, block >> 32, 0))
        if len(index) > ROOT_ENTRIES:
            raise NotReplayed("a file has too many extents")
        inode[0x28:0x64] = _node(index, ROOT_ENTRIES, 1).ljust(60, b"\0")


def _node(entries: list[bytes], room: int, depth: int) -> bytes:
    return EXTENT_HEADER.pack(EXTENT_MAGIC, len(entries), room, depth, 0) + b"".join(entries)


def _pack(run: Run) -> bytes:
    length = run.length + MAX_LENGTH if run.unwritten else run.length
    return struct.pack("<IHHI", run.start, length, run.block >> 32, run.block & 0xFFFFFFFF)


def _joined(runs: list[Run]) -> list[Run]:
    found: list[Run] = []
    for run in sorted(runs):
        last = found[-1] if found else None
        if (
            last
            and (last.start + last.length, last.block + last.length) == (run.start, run.block)
            and last.unwritten == run.unwritten
            and last.length + run.length <= MAX_LENGTH - run.unwritten
        ):
            found[-1] = last._replace(length=last.length + run.length)
        else:
            found.append(run)
    return found

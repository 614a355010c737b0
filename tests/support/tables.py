"""Editing the tables of a small qcow2 image in place, to make what QEMU never writes."""

from __future__ import annotations

import struct
from pathlib import Path

from qcowfs._core import Disk
from qcowfs.chain import Chain
from qcowfs.errors import ReadFault
from qcowfs.snapshot import points
from tests.support.content import EIO, Content
from tests.support.reader import open_point

__all__ = ["COMPRESSED", "COPIED", "Tables", "active_disk", "qcowfs_says"]

COPIED = 1 << 63
COMPRESSED = 1 << 62


class Tables:
    """The tables of the active state of `path`, entry by entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        data = path.read_bytes()
        self.version: int = struct.unpack_from(">I", data, 4)[0]
        self.cluster_bits: int = struct.unpack_from(">I", data, 20)[0]
        self.cluster_size: int = 1 << self.cluster_bits
        self.l1_offset: int = struct.unpack_from(">Q", data, 40)[0]
        self.extended = self.version == 3 and bool(struct.unpack_from(">Q", data, 72)[0] & 16)

    def word(self, offset: int, value: int | None = None) -> int:
        """Return the big-endian u64 at `offset`, after writing `value` if there is one."""
        with self.path.open("r+b") as file:
            if value is not None:
                file.seek(offset)
                file.write(struct.pack(">Q", value))
            file.seek(offset)
            return int.from_bytes(file.read(8), "big")

    def l1(self, index: int, value: int | None = None) -> int:
        """Return, or write, an L1 entry."""
        return self.word(self.l1_offset + index * 8, value)

    def l2(self, cluster: int, value: int | None = None, *, bits: int | None = None) -> int:
        """Return, or write, the L2 entry of a guest cluster; `bits` is the second word of an extended one."""
        size = 16 if self.extended else 8
        index, place = divmod(cluster, self.cluster_size // size)
        offset = (self.l1(index) & 0x00FFFFFFFFFFFE00) + place * size
        if bits is not None:
            self.word(offset + 8, bits)
        return self.word(offset, value)

    def append(self, data: bytes, alignment: int = 512) -> int:
        """Write `data` after the end of the file; returns its host offset."""
        with self.path.open("r+b") as file:
            offset = -(-file.seek(0, 2) // alignment) * alignment
            file.seek(offset)
            file.write(data)
        return offset

    def compressed(self, offset: int, length: int) -> int:
        """Return the L2 entry of a compressed cluster whose stream is at `offset`."""
        sectors = (offset % 512 + length + 511) // 512
        return COMPRESSED | (sectors - 1) << (62 - (self.cluster_bits - 8)) | offset


def active_disk(chain: Chain) -> Disk:
    """Return the disk of the active state of `chain`."""
    return open_point(chain, points(chain)[0])


def qcowfs_says(disk: Disk, offset: int, length: int) -> Content:
    """Return what `disk` holds."""
    try:
        return Content(disk.pread(offset, length))
    except ReadFault:
        return Content(EIO)

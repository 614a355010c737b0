"""Journals of ext3/ext4 written block by block: logs that no kernel writes any more, or never would.

The log is put into the journal of a real, small file system, so that the kernel and e2fsck can judge it.
"""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qcowfs._crc32c import crc32c
from qcowfs.inside.extsuper import read_inode, read_super
from qcowfs.inside.journalmap import JournalMap
from tests.support.crash import MAGIC, FileDevice

__all__ = [
    "ASYNC_COMMIT",
    "BLOCK",
    "CSUM_V2",
    "CSUM_V3",
    "FEATURE_64BIT",
    "JOURNAL_BLOCKS",
    "Journal",
    "make_file_system",
    "target",
]

BLOCK = 1024
JOURNAL_BLOCKS = 1024
FEATURE_64BIT, ASYNC_COMMIT, CSUM_V2, CSUM_V3 = 2, 4, 8, 16
SAME_UUID, LAST_TAG = 2, 8
UUID = bytes(range(16))
TARGETS = 3000  # blocks from here on belong to nobody


def make_file_system(path: Path, *options: str) -> Path:
    """Make the file system that journals are put into."""
    with path.open("wb") as file:
        file.truncate(4 << 20)
    command = ["mkfs.ext4", "-q", "-F", "-b", str(BLOCK), "-J", "size=1", "-O", "^metadata_csum,^64bit"]
    subprocess.run([*command, *options, str(path)], check=True, capture_output=True)
    return path


def target(number: int) -> int:
    """Return a block of the volume that a log may write to without any harm."""
    return TARGETS + number


@dataclass
class Journal:
    """A log that is being written. The times of commits rise by a second; blocks may be changed before `write`."""

    incompat: int = 1
    compat: int = 0
    sequence: int = 7
    start: int = 1
    kind: int = 4
    length: int = JOURNAL_BLOCKS
    first: int = 1
    blocks: dict[int, bytearray] = field(default_factory=dict)
    time: int = 1_700_000_000

    def __post_init__(self) -> None:
        self.next = self.start
        self.seed = crc32c(0xFFFFFFFF, UUID)
        self.crc_parts: list[int] = []
        self.transactions = 0

    @property
    def has_csums(self) -> bool:
        return bool(self.incompat & (CSUM_V2 | CSUM_V3))

    def add(self, content: bytes | bytearray) -> int:
        """Write the next block of the ring."""
        number = self.next
        self.blocks[number] = bytearray(content.ljust(BLOCK, b"\0"))
        self.next = number + 1 if number + 1 < self.length else self.first
        return number

    def descriptor(self, images: Sequence[tuple[int, bytes]], *, flags: int = 0) -> int:
        """Write a descriptor and the images (block of the volume, content) that it announces."""
        content = bytearray(self._header(1))
        for index, (block, image) in enumerate(images):
            last = LAST_TAG if index == len(images) - 1 else 0
            content += self._tag(block, image, flags | last | (SAME_UUID if index else 0))
            content += b"" if index else UUID
        number = self.add(self._with_tail(content))
        self.crc_parts.append(number)
        for _, image in images:
            self.crc_parts.append(self.add(_stored(image)))
        return number

    def revoke(self, blocks: Sequence[int], *, used: int | None = None) -> int:
        """Write a revoke record."""
        letter = "Q" if self.incompat & FEATURE_64BIT else "I"
        records = struct.pack(f">{len(blocks)}{letter}", *blocks)
        length = 16 + len(records) if used is None else used
        return self.add(self._with_tail(self._header(5) + struct.pack(">I", length) + records))

    def commit(self, *, wrong: bool = False, time: int | None = None) -> int:
        """Write the commit record, and begin the next transaction."""
        self.time += 1
        content = bytearray(self._header(2).ljust(BLOCK, b"\0"))
        struct.pack_into(">Q", content, 48, self.time if time is None else time)
        if self.compat & 1:
            content[12:14] = bytes((1, 4))
            struct.pack_into(">I", content, 16, self._crc_of_transaction() ^ wrong)
        if self.has_csums:
            struct.pack_into(">I", content, 16, crc32c(self.seed, content) ^ wrong)
        self.crc_parts = []
        self.transactions += 1
        return self.add(content)

    def write(self, path: Path) -> None:
        """Put the log into the file system `path`, which then needs recovery."""
        device = FileDevice(path)
        superblock = read_super(device)
        assert superblock is not None
        inode = read_inode(device, superblock, 8)
        place = JournalMap(device, BLOCK, inode.flags, inode.block, inode.size).run
        with path.open("r+b") as file:
            for number, content in {0: self._super(), **self.blocks}.items():
                if number < JOURNAL_BLOCKS:
                    file.seek(place(number)[0] * BLOCK)
                    file.write(content)
            file.seek(1024 + 0x60)
            file.write(struct.pack("<I", struct.unpack_from("<I", superblock.raw, 0x60)[0] | 4))

    def _super(self) -> bytes:
        fields = struct.pack(">9I", BLOCK, self.length, self.first, self.sequence, self.start, 0, self.compat, 0, 0)
        content = bytearray((MAGIC + struct.pack(">II", self.kind, 0) + fields).ljust(BLOCK, b"\0"))
        struct.pack_into(">I", content, 40, self.incompat)
        content[0x30:0x40] = UUID
        if self.has_csums:
            content[0x50] = 4
            struct.pack_into(">I", content, 0xFC, crc32c(0xFFFFFFFF, content))
        return bytes(content)

    def _header(self, kind: int) -> bytes:
        return MAGIC + struct.pack(">II", kind, self._sequence())

    def _sequence(self) -> int:
        return (self.sequence + self.transactions) & 0xFFFFFFFF

    def _tag(self, block: int, image: bytes, flags: int) -> bytes:
        flags |= 1 if image.startswith(MAGIC) else 0
        crc = crc32c(crc32c(self.seed, struct.pack(">I", self._sequence())), _stored(image))
        if self.incompat & CSUM_V3:
            return struct.pack(">IIII", block & 0xFFFFFFFF, flags, block >> 32, crc)
        csum = crc & 0xFFFF if self.incompat & CSUM_V2 else 0
        tag = struct.pack(">IHH", block & 0xFFFFFFFF, csum, flags)
        tag += struct.pack(">I", block >> 32) if self.incompat & FEATURE_64BIT else b""
        return tag + (b"\0\0" if self.incompat & CSUM_V2 else b"")

    def _with_tail(self, content: bytes) -> bytes:
        if not self.has_csums:
            return content
        body = content.ljust(BLOCK - 4, b"\0")
        return body + struct.pack(">I", crc32c(self.seed, body + bytes(4)))

    def _crc_of_transaction(self) -> int:
        crc = 0xFFFFFFFF
        for number in self.crc_parts:
            for byte in self.blocks[number]:
                crc ^= byte << 24
                for _ in range(8):
                    crc = (crc << 1 ^ (0x04C11DB7 if crc & 0x80000000 else 0)) & 0xFFFFFFFF
        return crc


def _stored(image: bytes) -> bytes:
    """Return how the journal stores an image: without jbd2's magic number at its start."""
    image = image.ljust(BLOCK, b"\0")
    return bytes(4) + image[4:] if image.startswith(MAGIC) else image

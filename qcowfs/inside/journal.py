"""The log of a jbd2 journal: its superblock, its blocks, and the checksums that they carry.

Used by jbd2 and fastcommit. Names are those of struct journal_superblock_s and fs/jbd2/recovery.c; all big-endian.
Numbers of blocks are those of the journal's file; only `Log.place` tells where one is on the volume.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from qcowfs._crc32c import crc32c
from qcowfs.inside.journalmap import JournalMap
from qcowfs.inside.reader import Device, Unreadable

__all__ = ["COMMIT", "DESCRIPTOR", "HEADER", "MAGIC", "REVOKE", "JournalSuper", "Log", "Tag", "crc32_be"]

MAGIC = 0xC03B3998
HEADER = struct.Struct(">III")  # magic, type of block, sequence number of the transaction
DESCRIPTOR, COMMIT, SUPER_V1, SUPER_V2, REVOKE = 1, 2, 3, 4, 5

FEATURE_CHECKSUM = 0x1  # the only compatible one: one CRC-32 for a whole transaction
FEATURE_64BIT = 0x2
FEATURE_ASYNC_COMMIT = 0x4
FEATURE_CSUM_V2 = 0x8
FEATURE_CSUM_V3 = 0x10
FEATURE_FAST_COMMIT = 0x20
KNOWN_INCOMPAT = 0x3F

CRC32C = 4  # s_checksum_type
SUPER_SIZE = 1024
OFFSET_SUPER_CHECKSUM = 0xFC
TAIL = 4  # bytes of struct jbd2_journal_block_tail
COMMIT_HEADER = 64  # bytes of struct commit_header
MIN_BLOCKS = 1024  # JBD2_MIN_JOURNAL_BLOCKS
FAST_COMMIT_BLOCKS = 256  # JBD2_DEFAULT_FAST_COMMIT_BLOCKS, where the superblock says 0
WINDOW = 128 << 10  # bytes that are read at once, as the kernel reads ahead
REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))

FLAG_ESCAPE = 1
FLAG_SAME_UUID = 2
FLAG_LAST_TAG = 8


class JournalSuper(NamedTuple):
    """The journal's superblock. The log is in the blocks `first` to `last` - 1, from `start` on; 0 if it is empty.

    Attributes:
        blocks: of the whole journal, fast commits and superblock included.
        fast_first: where fast commits begin; `blocks` if there are none.
        seed: what the checksums of version 2 and 3 begin with.
    """

    blocks: int
    first: int
    last: int
    sequence: int
    start: int
    checksum: bool
    has_64bit: bool
    async_commit: bool
    csum_v2: bool
    csum_v3: bool
    fast_first: int
    seed: int

    @property
    def has_csums(self) -> bool:
        """Whether descriptors, commits, revokes and tags have checksums of their own."""
        return self.csum_v2 or self.csum_v3

    @property
    def tag_bytes(self) -> int:
        if self.csum_v3:
            return 16
        return 8 + (2 if self.csum_v2 else 0) + (4 if self.has_64bit else 0)


class Tag(NamedTuple):
    """What a descriptor says of one block that follows it: where it belongs (a block of the volume), and how."""

    block: int
    escaped: bool
    checksum: int


class Log:
    """The blocks of a journal."""

    def __init__(self, device: Device, journal_map: JournalMap, block_size: int) -> None:
        """Read the superblock.

        Raises:
            Unreadable: the kernel would not load this journal; the text says why.
            OSError: it cannot be read.
        """
        self.block_size = block_size
        self._device = device
        self._map = journal_map
        self._window = memoryview(b"")
        self._window_start = 0
        self.super = _parse_super(self._read_super(), journal_map.blocks)

    def _read_super(self) -> bytes:
        place = self.place(0) * self.block_size
        raw = self._device.read(place, SUPER_SIZE)
        if struct.unpack_from(">I", raw, 12)[0] != self.block_size:
            raise Unreadable("jbd2: the journal's superblock is broken, or its blocks have another size")
        return raw

    def place(self, number: int) -> int:
        """Return the block of the volume that holds the block `number` of the journal."""
        return self._map.run(number)[0]

    def block(self, number: int) -> memoryview:
        """Return the block `number`. Blocks beside it are read with it.

        Raises:
            Unreadable: it is outside the journal.
            OSError: it cannot be read.
        """
        within = (number - self._window_start) * self.block_size
        if not 0 <= within < len(self._window):
            self._move_window(number)
            within = 0
        return self._window[within : within + self.block_size]

    def _move_window(self, number: int) -> None:
        if number >= self.super.blocks:
            raise Unreadable("jbd2: the log leaves the journal")
        place, length = self._map.run(number)
        length = min(length, max(WINDOW // self.block_size, 1), self.super.blocks - number)
        self._window = memoryview(self._device.read(place * self.block_size, length * self.block_size))
        self._window_start = number

    def after(self, number: int, count: int = 1) -> int:
        """Return the number of the block that comes `count` blocks after `number`: the log is a ring."""
        number += count
        if number >= self.super.last:
            number -= self.super.last - self.super.first
        return number

    def tags(self, descriptor: memoryview) -> list[Tag]:
        """Return the tags of a descriptor: one for each block that follows it."""
        size = self.super.tag_bytes
        end = self.block_size - (TAIL if self.super.has_csums else 0)
        place = HEADER.size
        tags = []
        while place + size <= end:
            tag, flags = self._tag(descriptor, place)
            tags.append(tag)
            if flags & FLAG_LAST_TAG:
                break
            place += size if flags & FLAG_SAME_UUID else size + 16
        return tags

    def _tag(self, descriptor: memoryview, place: int) -> tuple[Tag, int]:
        block, checksum, flags = struct.unpack_from(">IHH", descriptor, place)
        if self.super.has_64bit:
            block |= struct.unpack_from(">I", descriptor, place + 8)[0] << 32
        if self.super.csum_v3:
            checksum = struct.unpack_from(">I", descriptor, place + 12)[0]
        return Tag(block, bool(flags & FLAG_ESCAPE), checksum), flags

    def revoked(self, block: memoryview) -> tuple[int, ...]:
        """Return the blocks of the volume that a block of revoke records names."""
        used = struct.unpack_from(">I", block, 12)[0]
        if used > self.block_size - (TAIL if self.super.has_csums else 0):
            raise Unreadable("jbd2: a revoke record is longer than its block")
        size, letter = (8, "Q") if self.super.has_64bit else (4, "I")
        count = max(used - 16, 0) // size
        return struct.unpack_from(f">{count}{letter}", block, 16)

    def is_right_block(self, block: memoryview) -> bool:
        """Tell whether the checksum at the end of a descriptor or a revoke record is right, if there is one."""
        return not self.super.has_csums or self._is_right(block, self.block_size - TAIL)

    def is_right_commit(self, block: memoryview) -> bool:
        """Tell whether the checksum of a commit record is right, if there is one.

        One that is right for the header alone counts too: what wrote it saw zeros after the header.
        """
        if not self.super.has_csums or self._is_right(block, 16):
            return True
        return self._is_right(memoryview(bytes(block[:COMMIT_HEADER]).ljust(self.block_size, b"\0")), 16)

    def _is_right(self, block: memoryview, place: int) -> bool:
        checksum = crc32c(crc32c(self.super.seed, block[:place]), bytes(4))
        checksum = crc32c(checksum, block[place + 4 :])
        return checksum == int.from_bytes(block[place : place + 4], "big")

    def is_right_image(self, block: memoryview, sequence: int, checksum: int) -> bool:
        """Tell whether `block`, which a tag with `checksum` announced, is what was logged."""
        found = crc32c(crc32c(self.super.seed, struct.pack(">I", sequence)), block)
        return checksum == (found if self.super.csum_v3 else found & 0xFFFF)


def _parse_super(raw: bytes, blocks: int) -> JournalSuper:
    magic, kind, _ = HEADER.unpack_from(raw)
    length, first, sequence, start = struct.unpack_from(">IIII", raw, 16)
    if magic != MAGIC or kind not in (SUPER_V1, SUPER_V2):
        raise Unreadable("jbd2: the journal has no superblock")
    if length > blocks or not 0 < first < length:
        raise Unreadable("jbd2: the journal's superblock names blocks outside the journal")
    compat, incompat, ro_compat = struct.unpack_from(">III", raw, 36) if kind == SUPER_V2 else (0, 0, 0)
    seed = _check_features(raw, compat, incompat, ro_compat)
    last, fast_first = length, length
    if incompat & FEATURE_FAST_COMMIT:
        fast_blocks = struct.unpack_from(">I", raw, 0x54)[0] or FAST_COMMIT_BLOCKS
        if last - fast_blocks >= MIN_BLOCKS:
            last -= fast_blocks
            fast_first = last + 1
    if first + MIN_BLOCKS > last + 1:
        raise Unreadable("jbd2: the journal is too short")
    return JournalSuper(
        blocks=length,
        first=first,
        last=last,
        sequence=sequence,
        start=start,
        checksum=bool(compat & FEATURE_CHECKSUM),
        has_64bit=bool(incompat & FEATURE_64BIT),
        async_commit=bool(incompat & FEATURE_ASYNC_COMMIT),
        csum_v2=bool(incompat & FEATURE_CSUM_V2),
        csum_v3=bool(incompat & FEATURE_CSUM_V3),
        fast_first=fast_first,
        seed=seed,
    )


def _check_features(raw: bytes, compat: int, incompat: int, ro_compat: int) -> int:
    """Refuse what the kernel refuses, and return the seed of the checksums."""
    if incompat & ~KNOWN_INCOMPAT or ro_compat:
        raise Unreadable(f"jbd2: the journal has unknown features ({incompat:#x}, {ro_compat:#x})")
    csums = incompat & (FEATURE_CSUM_V2 | FEATURE_CSUM_V3)
    if not csums:
        return 0
    if csums == FEATURE_CSUM_V2 | FEATURE_CSUM_V3 or compat & FEATURE_CHECKSUM:
        raise Unreadable("jbd2: the journal has several kinds of checksums at once")
    if raw[0x50] != CRC32C:
        raise Unreadable(f"jbd2: the journal has checksums of an unknown type ({raw[0x50]})")
    blank = raw[:OFFSET_SUPER_CHECKSUM] + bytes(4) + raw[OFFSET_SUPER_CHECKSUM + 4 :]
    if crc32c(0xFFFFFFFF, blank) != struct.unpack_from(">I", raw, OFFSET_SUPER_CHECKSUM)[0]:
        raise Unreadable("jbd2: the checksum of the journal's superblock is wrong")
    return crc32c(0xFFFFFFFF, raw[0x30:0x40])


def crc32_be(crc: int, data: memoryview) -> int:
    """Return `crc` carried on over `data`, highest bit first, as Linux's crc32_be(): zlib's CRC-32 seen in a mirror."""
    mirrored = zlib.crc32(bytes(data).translate(REVERSED), _mirror(crc) ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    return _mirror(mirrored)


def _mirror(value: int) -> int:
    return int.from_bytes(value.to_bytes(4, "little").translate(REVERSED), "big")

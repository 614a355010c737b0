"""Fast commits: what ext4 noted at the journal's end after the last whole transaction.

Used by jbd2. They say which names, inodes and extents changed, and not how the blocks look after it; fastreplay makes
blocks of them. Names are those of fs/ext4/fast_commit.h; all little-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from qcowfs._crc32c import crc32c
from qcowfs.inside.journal import Log
from qcowfs.inside.reader import Unreadable
from qcowfs.limits import MAX_FAST_COMMIT_TAGS

__all__ = ["ADD_RANGE", "CREAT", "DEL_RANGE", "INODE", "LINK", "UNLINK", "Operation", "scan"]

ADD_RANGE, DEL_RANGE, CREAT, LINK, UNLINK, INODE, PAD, TAIL, HEAD = range(1, 10)
TAG = struct.Struct("<HH")  # struct ext4_fc_tl
TAIL_VALUE = struct.Struct("<II")  # transaction, checksum
HEAD_VALUE = struct.Struct("<II")  # features, transaction
MAX_NAME = 255


class Operation(NamedTuple):
    """One thing that a fast commit says: its tag, and the value that stands after it."""

    tag: int
    value: bytes


def scan(log: Log, inode_size: int, expected: int) -> list[Operation]:
    """Return what the complete fast commits after the last whole transaction say.

    Args:
        expected: sequence number of the transaction that was under way.

    Raises:
        Unreadable: they are broken, and the kernel's recovery would fail.
    """
    return _Scan(log, inode_size, expected).run()


class _Scan:
    def __init__(self, log: Log, inode_size: int, expected: int) -> None:
        self._log = log
        self._expected = expected
        self._lengths = {
            ADD_RANGE: (16, 16),
            DEL_RANGE: (12, 12),
            CREAT: (8 + 1, 8 + MAX_NAME),
            LINK: (8 + 1, 8 + MAX_NAME),
            UNLINK: (8 + 1, 8 + MAX_NAME),
            INODE: (4 + 128, 4 + inode_size),
            PAD: (0, 0xFFFF),
            TAIL: (TAIL_VALUE.size, 0xFFFF),
            HEAD: (HEAD_VALUE.size, HEAD_VALUE.size),
        }
        self._tags: list[Operation] = []
        self._valid = 0  # tags up to the end of the last complete fast commit
        self._crc = 0

    def run(self) -> list[Operation]:
        number = self._log.super.fast_first
        if number < self._log.super.blocks and TAG.unpack_from(self._log.block(number))[0] == HEAD:
            while number < self._log.super.blocks and self._scan_block(bytes(self._log.block(number))):
                number += 1
        return [tag for tag in self._tags[: self._valid] if tag.tag not in (HEAD, PAD, TAIL)]

    def _scan_block(self, block: bytes) -> bool:
        """Take the tags of a block in; return whether the next block goes on with it."""
        place = 0
        while place + TAG.size <= len(block):
            tag, length = TAG.unpack_from(block, place)
            least, most = self._lengths.get(tag, (1, 0))
            end = place + TAG.size + length
            if end > len(block) or not least <= length <= most:
                return self._stop("a tag is broken")
            if not self._scan_tag(tag, block[place:end]):
                return False
            if len(self._tags) > MAX_FAST_COMMIT_TAGS:
                raise Unreadable("jbd2: there are more fast commits than ext4 has room for")
            place = end
        return True

    def _scan_tag(self, tag: int, whole: bytes) -> bool:
        value = whole[TAG.size :]
        self._tags.append(Operation(tag, value))
        if tag == TAIL:
            transaction, checksum = TAIL_VALUE.unpack_from(value)
            crc = crc32c(self._crc, whole[: TAG.size + 4])
            self._crc = 0
            if (transaction, checksum) != (self._expected, crc):
                return self._stop("a checksum is wrong")
            self._valid = len(self._tags)
            return True
        if tag == HEAD:
            features, transaction = HEAD_VALUE.unpack(value)
            if features:
                raise Unreadable(f"jbd2: the fast commits have unknown features ({features:#x})")
            if transaction != self._expected:
                return False
        self._crc = crc32c(self._crc, whole)
        return True

    def _stop(self, why: str) -> bool:
        """End the scan where the last complete fast commit ended; without one the kernel's recovery fails."""
        if not self._valid:
            raise Unreadable(f"jbd2: {why} in the fast commits")
        return False

"""Recovery of the journal of ext3/ext4, in memory: what the kernel would do at the next mount, and nothing is written.

Used by whoever is to read an ext3/ext4 tree, before the reader: `recover` answers in one read of 1 KiB if there is
nothing to do. The passes are those of fs/jbd2/recovery.c: scan (find the last complete transaction), revoke (which
blocks may not be brought back), replay (which blocks the log has, the newest of each). Where the kernel's recovery
would fail and the mount with it, the tree is refused: half a replay is a tree that never was.
"""

from __future__ import annotations

import stat
import struct
from array import array
from bisect import bisect_left
from typing import NamedTuple

from qcowfs.inside import fastcommit, fastreplay
from qcowfs.inside.draft import Draft, NotReplayed
from qcowfs.inside.extsuper import SUPER_OFFSET, SUPER_SIZE, Super, read_inode, read_super, without_recover
from qcowfs.inside.journal import COMMIT, DESCRIPTOR, HEADER, MAGIC, REVOKE, Log, crc32_be
from qcowfs.inside.journalmap import JournalMap
from qcowfs.inside.overlay import Overlay
from qcowfs.inside.reader import Device, Unreadable
from qcowfs.limits import MAX_JOURNAL_RECORDS, MAX_JOURNAL_REVOKES, MAX_JOURNAL_TAGS

__all__ = ["Recovery", "recover"]

NO_CHECKSUM = 0xFFFFFFFF  # what the checksum of a transaction begins with
SPARE_BLOCKS = 256  # of the journal: what a replay of fast commits may need for new blocks
CRC32_TYPE, CRC32_SIZE = 1, 4  # h_chksum_type, h_chksum_size


class Recovery(NamedTuple):
    """The volume as it is after recovery, and what recovery did, in a few words."""

    overlay: Overlay
    summary: str


def recover(device: Device) -> Recovery | None:
    """Return the recovered volume, or None if there is nothing to recover.

    Raises:
        Unreadable: the kernel's recovery would fail, and so would its mount; the text says why.
        OSError: the journal cannot be read.
    """
    superblock = read_super(device)
    if superblock is None or not superblock.needs_recovery or not superblock.has_journal:
        return None
    try:
        return _recover(device, superblock)
    except Unreadable as error:
        raise Unreadable(f"{error} (the kernel would not mount it; -o norecovery shows the disk as it is)") from None


def _recover(device: Device, superblock: Super) -> Recovery | None:
    log = Log(device, _journal_map(device, superblock), superblock.block_size)
    if not log.super.start:
        return None
    walk = _Walk(log)
    walk.scan()
    images = _Images(log, walk)
    fast = fastcommit.scan(log, superblock.inode_size, log.super.sequence + walk.end & 0xFFFFFFFF)
    overlay = images.overlay(device)
    if not walk.end and not fast:
        return None
    _clear_recover(overlay)
    summary = f"jbd2: {walk.end} transactions, {images.count} blocks"
    if fast:
        summary += _replay_fast(log, overlay, superblock, fast)
    return Recovery(overlay, summary)


def _replay_fast(log: Log, overlay: Overlay, superblock: Super, operations: list[fastcommit.Operation]) -> str:
    """Replay fast commits; return what the summary says of them. New blocks lie in the journal's file, from its end."""
    spare = [log.place(number) for number in range(log.super.blocks - SPARE_BLOCKS, log.super.blocks)]
    try:
        draft = Draft(overlay, spare)
        fastreplay.replay(draft, superblock, operations)
    except NotReplayed as reason:
        return f"; fast commits not replayed ({reason}): {len(operations)} operations newer"
    draft.apply()
    return f", {len(operations)} operations of fast commits"


def _clear_recover(overlay: Overlay) -> None:
    block, within = divmod(SUPER_OFFSET, overlay.block_size)
    content = bytearray(overlay.read(block * overlay.block_size, overlay.block_size))
    content[within : within + SUPER_SIZE] = without_recover(bytes(content[within : within + SUPER_SIZE]))
    overlay.put(block, bytes(content))


def _journal_map(device: Device, superblock: Super) -> JournalMap:
    if not superblock.journal_inode:
        raise Unreadable("jbd2: the journal is on another device, and not replayed")
    if superblock.journal_elsewhere:
        raise Unreadable("jbd2: the volume names two journals")
    inode = read_inode(device, superblock, superblock.journal_inode)
    if not inode.links or not stat.S_ISREG(inode.mode):
        # The superblock has a copy of its map, which neither the kernel nor (for extents) e2fsck makes use of.
        raise Unreadable("jbd2: the journal's inode is broken")
    return JournalMap(device, superblock.block_size, inode.flags, inode.block, inode.size)


class _Walk:
    """The scan of a log. Transactions are counted from 0, so that sequence numbers may run over.

    Attributes:
        end: transactions that are complete.
        descriptors: of all transactions: the transaction << 32 | number of the block.
        revokes: the same of revoke records.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.end = 0
        self.descriptors = array("Q")
        self.revokes = array("Q")
        self._failed = False  # at least one commit record was wrong: `end` stands
        self._transaction = 0
        self._next = log.super.start
        self._tags = 0
        self._crc = NO_CHECKSUM
        self._doubtful = False  # a block's checksum was wrong: a leftover of an older journal, or damage
        self._commit_time = 0

    def scan(self) -> None:
        """Find the last complete transaction.

        Raises:
            Unreadable: the log is broken, not only at its end.
        """
        for _ in range(min(MAX_JOURNAL_RECORDS, self.log.super.blocks)):
            block = self.log.block(self._next)
            magic, kind, sequence = HEADER.unpack_from(block)
            if magic != MAGIC or sequence != (self.log.super.sequence + self._transaction) & 0xFFFFFFFF:
                break
            number, self._next = self._next, self.log.after(self._next)
            if kind == DESCRIPTOR:
                self._scan_descriptor(number, block)
            elif kind == REVOKE:
                self._doubtful |= not self.log.is_right_block(block)
                self.revokes.append(self._transaction << 32 | number)
            elif kind != COMMIT or not self._scan_commit(block):
                break
        else:
            raise Unreadable("jbd2: the log is longer than any that was written")
        if not self._failed:
            self.end = self._transaction

    def _scan_descriptor(self, number: int, block: memoryview) -> None:
        self._doubtful |= not self.log.is_right_block(block)
        count = len(self.log.tags(block))
        self._tags += count
        if self._tags > MAX_JOURNAL_TAGS or self._tags > 2 * self.log.super.blocks:
            raise Unreadable("jbd2: the log is longer than any that was written")
        self.descriptors.append(self._transaction << 32 | number)
        if self.log.super.checksum and not self._doubtful and not self._failed:
            self._crc = crc32_be(self._crc, block)
            for _ in range(count):
                self._crc = crc32_be(self._crc, self.log.block(self._next))
                self._next = self.log.after(self._next)
        else:
            self._next = self.log.after(self._next, count)

    def _scan_commit(self, block: memoryview) -> bool:
        """Take a commit record in; return whether the log goes on after it."""
        commit_time: int = struct.unpack_from(">Q", block, 48)[0]
        if self._doubtful:
            if commit_time >= self._commit_time:
                raise self._wrong_transaction()
            return False
        if self.log.super.checksum and self._failed:
            raise self._wrong_transaction()
        if not self._is_right_commit(block):
            if commit_time < self._commit_time:
                return False
            if not self.log.super.async_commit:
                raise self._wrong_transaction()
            self.end, self._failed = self._transaction, True
        self._commit_time = commit_time
        self._transaction += 1
        return True

    def _is_right_commit(self, block: memoryview) -> bool:
        if self.log.super.checksum:
            found = struct.unpack_from(">I", block, 16)[0]
            kind, size = block[12], block[13]
            right = (kind, size, found) in ((CRC32_TYPE, CRC32_SIZE, self._crc), (0, 0, 0))
            if right:
                self._crc = NO_CHECKSUM
            return right
        return self.log.is_right_commit(block)

    def _wrong_transaction(self) -> Unreadable:
        sequence = (self.log.super.sequence + self._transaction) & 0xFFFFFFFF
        return Unreadable(f"jbd2: a checksum of transaction {sequence} is wrong")


class _Images:
    """The images of blocks that complete transactions have, in the order of the log.

    Attributes:
        count: blocks that are brought back.
    """

    def __init__(self, log: Log, walk: _Walk) -> None:
        self.count = 0
        self._log = log
        self._blocks = array("Q")
        self._numbers = array("I")  # where the image is in the journal
        self._transactions = array("I")
        self._checksums = array("I")
        self._escaped = bytearray()
        for item in walk.descriptors:
            transaction, number = item >> 32, item & 0xFFFFFFFF
            if transaction < walk.end:
                self._add(transaction, number)
        self._order = self._newest()
        self._distinct = array("Q", (self._blocks[order] for order in self._order))
        self._revoked = self._revokes(walk)

    def _add(self, transaction: int, number: int) -> None:
        for tag in self._log.tags(self._log.block(number)):
            number = self._log.after(number)
            self._blocks.append(tag.block)
            self._numbers.append(number)
            self._transactions.append(transaction)
            self._checksums.append(tag.checksum)
            self._escaped.append(tag.escaped)

    def _newest(self) -> array[int]:
        """Return the newest image of each block, in the order of the blocks."""
        newest = array("I")
        for order in sorted(range(len(self._blocks)), key=self._blocks.__getitem__):
            if newest and self._blocks[newest[-1]] == self._blocks[order]:
                newest[-1] = order
            else:
                newest.append(order)
        return newest

    def _revokes(self, walk: _Walk) -> array[int]:
        """Return for each distinct block the first transaction of which an image would count."""
        revoked = array("I", bytes(4 * len(self._distinct)))
        seen = 0
        for item in walk.revokes:
            transaction = item >> 32
            if transaction >= walk.end:
                break
            blocks = self._log.revoked(self._log.block(item & 0xFFFFFFFF))
            seen += len(blocks)
            if seen > MAX_JOURNAL_REVOKES:
                raise Unreadable("jbd2: the log revokes more blocks than can be looked through")
            for block in blocks:
                index = bisect_left(self._distinct, block)
                if index < len(revoked) and self._distinct[index] == block:
                    revoked[index] = transaction + 1
        return revoked

    def _check(self, device: Device) -> None:
        """Refuse images that the kernel would not write: a wrong checksum, or a block that is not on the volume."""
        end = device.size // self._log.block_size
        for order, block in enumerate(self._blocks):
            index = bisect_left(self._distinct, block)
            if self._transactions[order] < self._revoked[index]:
                continue
            if self._log.super.has_csums:
                sequence = (self._log.super.sequence + self._transactions[order]) & 0xFFFFFFFF
                image = self._log.block(self._numbers[order])
                if not self._log.is_right_image(image, sequence, self._checksums[order]):
                    raise Unreadable(f"jbd2: the checksum of block {block} in the log is wrong")
            if block >= end:
                raise Unreadable(f"jbd2: the log has a block {block}, outside the volume")

    def overlay(self, device: Device) -> Overlay:
        """Return the volume with the newest images laid over it, but those that were revoked."""
        self._check(device)
        blocks, places = array("Q"), array("Q")
        for block, order, revoked in zip(self._distinct, self._order, self._revoked, strict=True):
            if self._transactions[order] >= revoked:
                blocks.append(block)
                places.append(self._log.place(self._numbers[order]) << 1 | self._escaped[order])
        self.count = len(blocks)
        return Overlay(device, self._log.block_size, blocks, places)

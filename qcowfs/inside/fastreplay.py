"""The replay of ext4's fast commits, on a draft of the volume: what ext4_fc_replay makes of each operation.

Used by jbd2. Two things differ from the kernel, on purpose: directories get the time of the newest inode that was
committed, not that of the recovery; and new blocks lie in the journal's file, where nobody else can have them. Where
the kernel would enlarge a directory, or look into an indexed one to add a name, nothing is replayed at all.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Sequence

from qcowfs._crc32c import crc32c
from qcowfs.inside.draft import EXTENTS, HUGE_FILE, INLINE_DATA, Draft, NotReplayed, Run
from qcowfs.inside.extsuper import Super
from qcowfs.inside.fastcommit import ADD_RANGE, CREAT, DEL_RANGE, INODE, LINK, UNLINK, Operation

__all__ = ["replay"]

INDEX, ENCRYPTED = 0x1000, 0x800
MAX_LENGTH = 32768
TAIL = struct.Struct("<IHBBI")  # struct ext4_dir_entry_tail
TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


def replay(draft: Draft, superblock: Super, operations: Sequence[Operation]) -> None:
    """Change `draft` as `operations` say.

    Raises:
        NotReplayed: one of them cannot be carried out as the kernel would.
    """
    _Replay(draft, superblock, operations).run(operations)


class _Replay:
    def __init__(self, draft: Draft, superblock: Super, operations: Sequence[Operation]) -> None:
        self._draft = draft
        self._super = superblock
        times = [_ctime(operation.value[4:]) for operation in operations if operation.tag == INODE]
        self._now = max(times, default=None)

    def run(self, operations: Sequence[Operation]) -> None:
        for tag, value in operations:
            if tag == INODE:
                self._inode(int.from_bytes(value[:4], "little"), value[4:])
            elif tag == ADD_RANGE:
                number, start, length, high, low = struct.unpack("<IIHHI", value)
                unwritten = length > MAX_LENGTH
                length -= MAX_LENGTH if unwritten else 0
                self._set_range(number, start, length, Run(start, length, high << 32 | low, unwritten))
            elif tag == DEL_RANGE:
                number, start, length = struct.unpack("<III", value)
                self._set_range(number, start, length, None)
            else:
                parent, child = struct.unpack_from("<II", value)
                {CREAT: self._create, LINK: self._link, UNLINK: self._unlink}[tag](parent, child, value[8:])

    def _inode(self, number: int, raw: bytes) -> None:
        inode = self._draft.inode(self._super, number)
        inode[:0x28] = raw[:0x28]
        inode[0x64 : len(raw)] = raw[0x64:]
        if not _links(inode):  # the kernel's replay fails there, and so does its mount
            raise NotReplayed("a file without a name is changed")
        flags = _flags(inode)
        if flags & HUGE_FILE or not flags & (EXTENTS | INLINE_DATA):
            raise NotReplayed("a file has neither extents nor its data in the inode")
        if flags & INLINE_DATA:
            inode[0x28:0x64] = raw[0x28:0x64]
        else:
            if bytes(inode[0x28:0x2A]) != b"\x0a\xf3":
                inode[0x28:0x34] = struct.pack("<HHHHI", 0xF30A, 0, 4, 0, 0)
            self._count_blocks(inode)
        self._draft.seal(number, inode)

    def _count_blocks(self, inode: memoryview) -> None:
        runs, nodes = self._draft.runs(inode)
        blocks = (sum(run.length for run in runs) + nodes) * (self._draft.block_size // 512) if runs else 0
        inode[0x1C:0x20] = struct.pack("<I", blocks & 0xFFFFFFFF)
        inode[0x74:0x76] = struct.pack("<H", blocks >> 32)

    def _living(self, number: int) -> memoryview | None:
        inode = self._draft.inode(self._super, number)
        return inode if _mode(inode) and _links(inode) else None

    def _set_range(self, number: int, start: int, length: int, new: Run | None) -> None:
        inode = self._living(number)
        if inode is None or not length:
            return
        end = start + length
        runs = [new] if new else []
        for run in self._draft.runs(inode)[0]:
            if run.start < start:
                runs.append(run._replace(length=min(run.length, start - run.start)))
            if run.start + run.length > end:
                skip = max(end - run.start, 0)
                runs.append(Run(run.start + skip, run.length - skip, run.block + skip, run.unwritten))
        self._draft.set_runs(number, inode, runs)
        self._draft.seal(number, inode)

    def _create(self, parent: int, child: int, name: bytes) -> None:
        inode = self._living(child)
        if inode is None:
            raise NotReplayed(f"inode {child} is created and does not exist")
        if stat.S_ISDIR(_mode(inode)):
            self._fill_directory(parent, child, inode)
        self._link(parent, child, name)
        inode[0x1A:0x1C] = struct.pack("<H", 1)
        self._draft.seal(child, inode)

    def _fill_directory(self, parent: int, child: int, inode: memoryview) -> None:
        if _flags(inode) & INLINE_DATA:
            raise NotReplayed("a directory has its data in the inode")
        number = self._draft.new_block()
        block = self._draft.block(number)
        end = self._draft.block_size - (TAIL.size if self._draft.has_csums else 0)
        kind = 2 if self._draft.has_types else 0
        struct.pack_into("<IHBB4s", block, 0, child, 12, 1, kind, b".")
        struct.pack_into("<IHBB4s", block, 12, parent, end - 12, 2, kind, b"..")
        self._seal_directory(child, inode, block)
        self._draft.set_runs(child, inode, [Run(0, 1, number, False)])
        inode[4:8] = struct.pack("<I", self._draft.block_size)

    def _link(self, parent: int, child: int, name: bytes) -> None:
        inode, directory = self._living(child), self._living(parent)
        if inode is None or directory is None or self._find(directory, name):
            return
        if _flags(directory) & INDEX:
            raise NotReplayed("a name is added to an indexed directory")
        kind = TYPES.get(stat.S_IFMT(_mode(inode)), 0) if self._draft.has_types else 0
        block, place, used = self._room(directory, len(name))
        length = int.from_bytes(block[place + 4 : place + 6], "little")
        if used:
            block[place + 4 : place + 6] = struct.pack("<H", used)
        block[place + used : place + used + 8 + len(name)] = (
            struct.pack("<IHBB", child, length - used, len(name), kind) + name
        )
        self._seal_directory(parent, directory, block)
        self._touch(parent, directory)
        inode[0x1A:0x1C] = struct.pack("<H", min(_links(inode) + 1, 0xFFFF))
        self._draft.seal(child, inode)

    def _room(self, directory: memoryview, name_length: int) -> tuple[bytearray, int, int]:
        """Return the first entry with room for another: its block, its place, the bytes that it needs itself."""
        needed = _entry_size(name_length)
        for block in self._directory_blocks(directory):
            for place, length in self._entries(block):
                used = _entry_size(block[place + 6]) if any(block[place : place + 4]) else 0
                if length - used >= needed:
                    return block, place, used
        raise NotReplayed("a directory has to grow")

    def _unlink(self, parent: int, child: int, name: bytes) -> None:
        inode, directory = self._living(child), self._living(parent)
        if inode is None or directory is None:
            return
        found = self._find(directory, name)
        if not found:
            return
        block, place, before = found
        if block[place : place + 4] == struct.pack("<I", child):
            length = int.from_bytes(block[place + 4 : place + 6], "little")
            if before is None:
                block[place : place + 4] = bytes(4)
            else:
                length += place - before
                block[before + 4 : before + 6] = struct.pack("<H", length)
            self._seal_directory(parent, directory, block)
            self._touch(parent, directory)
        inode[0x1A:0x1C] = struct.pack("<H", _links(inode) - 1)
        if not _links(inode) and any(inode[0x1C:0x20]) and _flags(inode) & EXTENTS:
            self._draft.set_runs(child, inode, [])  # it is deleted, and its number may be used again
        self._draft.seal(child, inode)

    def _find(self, directory: memoryview, name: bytes) -> tuple[bytearray, int, int | None] | None:
        """Return where an entry is: its block, its place, and that of the entry before it in the block."""
        for block in self._directory_blocks(directory):
            before = None
            for place, _ in self._entries(block):
                if any(block[place : place + 4]) and block[place + 8 : place + 8 + block[place + 6]] == name:
                    return block, place, before
                before = place
        return None

    def _directory_blocks(self, directory: memoryview) -> Iterator[bytearray]:
        if not stat.S_ISDIR(_mode(directory)) or _flags(directory) & (INLINE_DATA | ENCRYPTED):
            raise NotReplayed("a directory is none, or not made of blocks, or encrypted")
        for run in self._draft.runs(directory)[0]:
            for number in range(run.block, run.block + run.length):
                yield self._draft.block(number)

    def _entries(self, block: bytearray) -> Iterator[tuple[int, int]]:
        """Yield the place and length of each entry, but for the checksum at the end."""
        place = 0
        while place + 8 <= len(block):
            length = int.from_bytes(block[place + 4 : place + 6], "little")
            if length < 8 or length % 4 or place + length > len(block) or block[place + 6] + 8 > length:
                raise NotReplayed("a directory is broken")
            self._draft.spend()
            if not self._draft.has_csums or place < len(block) - TAIL.size:
                yield place, length
            place += length

    def _seal_directory(self, number: int, directory: memoryview, block: bytearray) -> None:
        if self._draft.has_csums:
            place = len(block) - TAIL.size
            checksum = crc32c(self._draft.seed(number, directory), block[:place])
            TAIL.pack_into(block, place, 0, TAIL.size, 0, 0xDE, checksum)

    def _touch(self, number: int, directory: memoryview) -> None:
        """Give a directory the time of the change. The kernel gives it the time of the recovery."""
        if self._now is not None:
            (seconds, extra) = self._now[1:]
            directory[0x0C:0x14] = seconds * 2
            if len(directory) > 128 and int.from_bytes(directory[0x80:0x82], "little") >= 0x8C - 0x80:
                directory[0x84:0x8C] = extra * 2
        self._draft.seal(number, directory)


def _ctime(raw: bytes) -> tuple[int, bytes, bytes]:
    """Return the change time of an inode, first as a number to compare, then as it is stored."""
    seconds = raw[0x0C:0x10]
    extra = raw[0x84:0x88] if len(raw) >= 0x88 else bytes(4)
    epoch = int.from_bytes(extra, "little")
    when = int.from_bytes(seconds, "little", signed=True) + ((epoch & 3) << 32)
    return when * 10**9 + (epoch >> 2), seconds, extra


def _entry_size(name_length: int) -> int:
    return (8 + name_length + 3) & ~3


def _mode(inode: memoryview) -> int:
    return int.from_bytes(inode[:2], "little")


def _links(inode: memoryview) -> int:
    return int.from_bytes(inode[0x1A:0x1C], "little")


def _flags(inode: memoryview) -> int:
    return int.from_bytes(inode[0x20:0x24], "little")

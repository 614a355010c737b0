"""The superblock of ext3/ext4, as far as the recovery of its journal needs it, and where inodes are.

Used by jbd2 and fastcommit. Offsets are those of struct ext4_super_block; all little-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from qcowfs._crc32c import crc32c
from qcowfs.inside.reader import Device, Unreadable

__all__ = [
    "SUPER_OFFSET",
    "SUPER_SIZE",
    "Inode",
    "Super",
    "read_inode",
    "read_super",
    "without_recover",
    "without_usage",
]

SUPER_OFFSET = 1024
SUPER_SIZE = 1024
MAGIC = 0xEF53
FIRST_DESCRIPTORS = 16  # that the first block of descriptors has at least: all that the inodes 1 to 16 may need

COMPAT_HAS_JOURNAL = 0x4
INCOMPAT_RECOVER = 0x4
INCOMPAT_JOURNAL_DEV = 0x8
INCOMPAT_64BIT = 0x80
RO_COMPAT_METADATA_CSUM = 0x400

# (offset, bytes) of the fields that say how the file system was used, and nothing of where anything is in it: free
# blocks and inodes, times, mounts, state, the last check, where it was mounted, orphans, bytes written, errors,
# overhead, and the checksum over all that.
USAGE = (
    (0x0C, 8),
    (0x2C, 12),
    (0x3A, 2),
    (0x40, 4),
    (0x88, 64),
    (0xE8, 4),
    (0x158, 4),
    (0x178, 8),
    (0x194, 108),
    (0x248, 4),
    (0x274, 8),
    (0x3FC, 4),
)
RO_COMPAT_ORPHAN_PRESENT = 0x10000
OFFSET_RO_COMPAT = 0x64
OFFSET_INCOMPAT = 0x60
OFFSET_CHECKSUM = 0x3FC


class Super(NamedTuple):
    """What the superblock says.

    Attributes:
        raw: all 1024 bytes.
    """

    block_size: int
    inode_size: int
    inodes_per_group: int
    descriptor_size: int
    has_journal: bool
    needs_recovery: bool
    metadata_csum: bool
    journal_inode: int
    journal_elsewhere: bool
    raw: bytes


class Inode(NamedTuple):
    """The map of an inode: `block` is i_block, 60 bytes."""

    mode: int
    links: int
    size: int
    flags: int
    block: bytes


def read_super(device: Device) -> Super | None:
    """Return the superblock, or None if there is none of ext2/3/4, or it is that of an external journal.

    Raises:
        Unreadable: a field that everything else is reckoned from is out of its range.
    """
    if device.size < SUPER_OFFSET + SUPER_SIZE:
        return None
    raw = device.read(SUPER_OFFSET, SUPER_SIZE)
    compat, incompat, ro_compat = struct.unpack_from("<III", raw, 0x5C)
    if struct.unpack_from("<H", raw, 0x38)[0] != MAGIC or incompat & INCOMPAT_JOURNAL_DEV:
        return None
    log_block_size = struct.unpack_from("<I", raw, 0x18)[0]
    revision = struct.unpack_from("<I", raw, 0x4C)[0]
    inode_size = struct.unpack_from("<H", raw, 0x58)[0] if revision else 128
    inodes_per_group = struct.unpack_from("<I", raw, 0x28)[0]
    descriptor_size = struct.unpack_from("<H", raw, 0xFE)[0] if incompat & INCOMPAT_64BIT else 32
    if log_block_size > 6 or not 128 <= inode_size <= 1024 << log_block_size or not inodes_per_group:
        raise Unreadable("ext4: the superblock's sizes of blocks and inodes make no sense")
    if not 32 <= descriptor_size <= 64:
        raise Unreadable("ext4: the superblock's size of group descriptors makes no sense")
    journal_inode, journal_device = struct.unpack_from("<II", raw, 0xE0)
    return Super(
        block_size=1024 << log_block_size,
        inode_size=inode_size,
        inodes_per_group=inodes_per_group,
        descriptor_size=descriptor_size,
        has_journal=bool(compat & COMPAT_HAS_JOURNAL),
        needs_recovery=bool(incompat & INCOMPAT_RECOVER),
        metadata_csum=bool(ro_compat & RO_COMPAT_METADATA_CSUM),
        journal_inode=journal_inode,
        journal_elsewhere=bool(journal_device),
        raw=raw,
    )


def read_inode(device: Device, superblock: Super, number: int) -> Inode:
    """Return an inode of the first groups, from the volume as it is.

    Raises:
        Unreadable: the number is none of a reserved inode's.
    """
    group, index = divmod(number - 1, superblock.inodes_per_group)
    if number < 1 or group >= FIRST_DESCRIPTORS:
        raise Unreadable(f"ext4: inode {number} cannot be the journal's")
    first_block = (SUPER_OFFSET // superblock.block_size + 1) * superblock.block_size
    descriptor = device.read(first_block + group * superblock.descriptor_size, superblock.descriptor_size)
    table = int.from_bytes(descriptor[8:12], "little")
    if superblock.descriptor_size >= 64:
        table |= int.from_bytes(descriptor[0x28:0x2C], "little") << 32
    raw = device.read(table * superblock.block_size + index * superblock.inode_size, 128)
    size = int.from_bytes(raw[4:8], "little") | int.from_bytes(raw[0x6C:0x70], "little") << 32
    mode, links = struct.unpack_from("<H", raw, 0)[0], struct.unpack_from("<H", raw, 0x1A)[0]
    return Inode(mode, links, size, struct.unpack_from("<I", raw, 0x20)[0], raw[0x28:0x64])


def without_recover(raw: bytes) -> bytes:
    """Return the superblock `raw` as it is once the journal is recovered, with its checksum if it has one."""
    changed = bytearray(raw)
    incompat = struct.unpack_from("<I", raw, OFFSET_INCOMPAT)[0] & ~INCOMPAT_RECOVER
    struct.pack_into("<I", changed, OFFSET_INCOMPAT, incompat)
    if struct.unpack_from("<I", raw, 0x64)[0] & RO_COMPAT_METADATA_CSUM:
        checksum = crc32c(0xFFFFFFFF, changed[:OFFSET_CHECKSUM])
        struct.pack_into("<I", changed, OFFSET_CHECKSUM, checksum)
    return bytes(changed)


def without_usage(raw: bytes) -> bytes:
    """Return of the superblock `raw` what stays as it is while the file system is used; zeros for the rest."""
    lasting = bytearray(raw)
    for offset, length in USAGE:
        lasting[offset : offset + length] = bytes(length)
    for offset, bit in ((OFFSET_INCOMPAT, INCOMPAT_RECOVER), (OFFSET_RO_COMPAT, RO_COMPAT_ORPHAN_PRESENT)):
        features = struct.unpack_from("<I", raw, offset)[0] & ~bit
        struct.pack_into("<I", lasting, offset, features)
    return bytes(lasting)

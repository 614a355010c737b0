"""ext2, ext3 and ext4: told apart as blkid does, refused for what the kernel's fs/ext4 refuses.

Used by filesystems.py.
"""

from __future__ import annotations

import struct
import uuid
from typing import NamedTuple

from qcowfs._crc32c import crc32c
from qcowfs.inside.probes import Filesystem, Read, text

__all__ = ["probe"]

OFFSET = 1024
LENGTH = 1024
MAGIC = 0xEF53
CHECKSUM = 0x3FC  # of all before it
MAX_LOG_BLOCK_SIZE = 6  # EXT4_MAX_BLOCK_LOG_SIZE: 64 KiB
CRC32C = 1
VALID_FS, ERROR_FS = 1, 2  # s_state

HAS_JOURNAL = 0x4  # compatible
METADATA_CSUM = 0x400  # read-only compatible
RECOVER, JOURNAL_DEV, IS_64BIT = 0x4, 0x8, 0x80  # incompatible

# Incompatible features that the kernel's ext4 reads; the names are e2fsprogs'.
KNOWN = {
    0x2: "filetype",
    0x4: "needs_recovery",
    0x10: "meta_bg",
    0x40: "extent",
    0x80: "64bit",
    0x100: "mmp",
    0x200: "flex_bg",
    0x400: "ea_inode",
    0x2000: "metadata_csum_seed",
    0x4000: "large_dir",
    0x8000: "inline_data",
    0x10000: "encrypt",
    0x20000: "casefold",
}
UNKNOWN = {0x1: "compression", 0x1000: "dirdata"}  # those that have a name nevertheless

EXT2_RO_COMPAT = EXT3_RO_COMPAT = 0x7
EXT2_INCOMPAT = 0x2 | 0x10
EXT3_INCOMPAT = EXT2_INCOMPAT | RECOVER


class Superblock(NamedTuple):
    """The fields that count here, with the kernel's names."""

    blocks_count: int
    log_block_size: int
    state: int
    feature_compat: int
    feature_incompat: int
    feature_ro_compat: int
    uuid: bytes
    volume_name: bytes
    checksum_type: int

    @classmethod
    def unpack(cls, data: bytes) -> Superblock | None:
        """Return the fields of the superblock in `data`; None if it has not the magic."""
        blocks_count, log_block_size, magic, state = struct.unpack_from("<4xI16xI28xHH", data)
        compat, incompat, ro_compat, identity, name = struct.unpack_from("<III16s16s", data, 0x5C)
        if magic != MAGIC:
            return None
        if incompat & IS_64BIT:
            blocks_count |= int.from_bytes(data[0x150:0x154], "little") << 32
        return cls(
            blocks_count, log_block_size, state, compat, incompat, ro_compat, identity, name, checksum_type=data[0x175]
        )


def probe(read: Read, size: int) -> Filesystem | None:
    """Recognise ext2, ext3, ext4, and a journal on a device of its own ("jbd")."""
    data = read(OFFSET, LENGTH)
    superblock = Superblock.unpack(data)
    if superblock is None:
        return None
    return Filesystem(
        kind=_kind(superblock),
        label=text(superblock.volume_name),
        uuid=str(uuid.UUID(bytes=superblock.uuid)) if any(superblock.uuid) else "",
        size=_size(superblock),
        clean=superblock.state & (VALID_FS | ERROR_FS) == VALID_FS and not superblock.feature_incompat & RECOVER,
        trouble=_trouble(superblock, data, size),
    )


def _kind(superblock: Superblock) -> str:
    incompat, ro_compat = superblock.feature_incompat, superblock.feature_ro_compat
    if incompat & JOURNAL_DEV:
        return "jbd"
    journal = superblock.feature_compat & HAS_JOURNAL
    if not journal and not incompat & ~EXT2_INCOMPAT and not ro_compat & ~EXT2_RO_COMPAT:
        return "ext2"
    if journal and not incompat & ~EXT3_INCOMPAT and not ro_compat & ~EXT3_RO_COMPAT:
        return "ext3"
    return "ext4"


def _size(superblock: Superblock) -> int:
    if superblock.log_block_size > MAX_LOG_BLOCK_SIZE:
        return 0
    return superblock.blocks_count << (10 + superblock.log_block_size)


def _trouble(superblock: Superblock, data: bytes, size: int) -> str:
    if superblock.feature_incompat & JOURNAL_DEV:
        return "it is the journal of another file system"
    if unknown := superblock.feature_incompat & ~sum(KNOWN):
        return f"it has features that are not known: {', '.join(_names(unknown))}"
    if superblock.feature_ro_compat & METADATA_CSUM:
        if superblock.checksum_type != CRC32C:
            return f"its checksums are of an unknown kind, {superblock.checksum_type}"
        if crc32c(0xFFFFFFFF, data[:CHECKSUM]) != int.from_bytes(data[CHECKSUM:], "little"):
            return "the checksum of its superblock is wrong"
    if superblock.log_block_size > MAX_LOG_BLOCK_SIZE:
        return f"its block size, 2 ** {10 + superblock.log_block_size}, is more than 64 KiB"
    if _size(superblock) > size:
        return f"it is of {_size(superblock)} bytes, on a volume of {size}"
    return ""


def _names(features: int) -> list[str]:
    bits = [1 << bit for bit in range(32) if features >> bit & 1]
    return [UNKNOWN.get(bit, f"FEATURE_I{bit.bit_length() - 1}") for bit in bits]

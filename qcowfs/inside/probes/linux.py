"""XFS, btrfs, squashfs, F2FS, bcachefs, ISO 9660, ZFS and swap: recognised, so that a person is told what is there.

Used by filesystems.py.
"""

from __future__ import annotations

import struct
import uuid

from qcowfs.inside.probes import Filesystem, Read, text, utf16

__all__ = ["PROBES"]

BTRFS_SUPERBLOCK = 64 << 10
ISO_DESCRIPTOR = 32 << 10
F2FS_SUPERBLOCK = 1024
F2FS_MAGIC = 0xF2F52010
BCACHEFS_SUPERBLOCK = 4096
BCACHEFS_MAGIC = uuid.UUID("c68573f6-66ce-90a9-d96a-60cf803df7ef").bytes
BCACHE_MAGIC = uuid.UUID("c68573f6-4e1a-45ca-8265-f57f48ba6d81").bytes
ZFS_LABEL = 16 << 10  # the first of four: a list of names and values in XDR
ZFS_LIST = bytes.fromhex("010100000000000000000001")
PAGE_SIZES = (4096, 8192, 16384, 65536)
SUSPENDED = (b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001")


def _uuid(field: bytes) -> str:
    return str(uuid.UUID(bytes=field)) if any(field) else ""


def xfs(read: Read, size: int) -> Filesystem | None:
    data = read(0, 264)
    block_size, blocks = struct.unpack_from(">IQ", data, 4)
    if not data.startswith(b"XFSB"):
        return None
    return Filesystem(kind="xfs", label=text(data[108:120]), uuid=_uuid(data[32:48]), size=blocks * block_size)


def btrfs(read: Read, size: int) -> Filesystem | None:
    data = read(BTRFS_SUPERBLOCK, 1024)
    if data[0x40:0x48] != b"_BHRfS_M":
        return None
    total = int.from_bytes(data[0x70:0x78], "little")
    return Filesystem(kind="btrfs", label=text(data[0x12B : 0x12B + 256]), uuid=_uuid(data[0x20:0x30]), size=total)


def squashfs(read: Read, size: int) -> Filesystem | None:
    data = read(0, 96)
    if not data.startswith(b"hsqs") or int.from_bytes(data[28:30], "little") < 4:
        return None
    return Filesystem(kind="squashfs", size=int.from_bytes(data[40:48], "little"))


def f2fs(read: Read, size: int) -> Filesystem | None:
    data = read(F2FS_SUPERBLOCK, 2048)
    magic, log_block_size, blocks = struct.unpack_from("<I12xI16xQ", data)
    if magic != F2FS_MAGIC or log_block_size > 16:
        return None
    label = utf16(data[124 : 124 + 1024])
    return Filesystem(kind="f2fs", label=label, uuid=_uuid(data[108:124]), size=blocks << log_block_size)


def bcachefs(read: Read, size: int) -> Filesystem | None:
    data = read(BCACHEFS_SUPERBLOCK, 512)
    if data[24:40] == BCACHE_MAGIC:
        return Filesystem(kind="bcache", uuid=_uuid(data[40:56]))
    if data[24:40] != BCACHEFS_MAGIC:
        return None
    return Filesystem(kind="bcachefs", label=text(data[72:104]), uuid=_uuid(data[56:72]))


def iso9660(read: Read, size: int) -> Filesystem | None:
    data = read(ISO_DESCRIPTOR, 2048)
    if data[1:6] != b"CD001" or data[0] > 2:
        return None
    blocks, block_size = struct.unpack_from("<I", data, 80)[0], struct.unpack_from("<H", data, 128)[0]
    dates = [data[place : place + 16] for place in (830, 813)]  # modified, created
    date = next((date for date in dates if date.isdigit() and date.strip(b"0")), b"")
    return Filesystem(kind="iso9660", label=text(data[40:72]), uuid=_date(date), size=blocks * block_size)


def _date(digits: bytes) -> str:
    if not digits:
        return ""
    year, rest = digits[:4].decode(), digits[4:].decode()
    return "-".join([year, *(rest[place : place + 2] for place in range(0, len(rest), 2))])


def zfs(read: Read, size: int) -> Filesystem | None:
    data = read(ZFS_LABEL, 4096)
    return Filesystem(kind="zfs_member") if data.startswith(ZFS_LIST) and b"pool_guid" in data else None


def swap(read: Read, size: int) -> Filesystem | None:
    """Recognise swap space, and a hibernated system in it."""
    for page_size in PAGE_SIZES:
        magic = read(page_size - 10, 10)
        if magic.startswith(SUSPENDED):
            return Filesystem(kind="swsuspend")
        if magic not in (b"SWAPSPACE2", b"SWAP-SPACE"):
            continue
        version, last_page, _, identity, label = struct.unpack("<III16s16s", read(1024, 44))
        if magic == b"SWAP-SPACE":
            return Filesystem(kind="swap")
        if version == 1 and last_page:
            return Filesystem(kind="swap", label=text(label), uuid=_uuid(identity), size=(last_page + 1) * page_size)
    return None


PROBES = (xfs, squashfs, f2fs, swap, bcachefs, iso9660, zfs, btrfs)

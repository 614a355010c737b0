"""The reader of ext2, ext3 and ext4: what libext2fs finds, said as Linux says it.

Used by the worker. Names are given as stored; those of encrypted directories, and encrypted targets, as Linux shows
them without the key. Files that an interrupted truncation left with blocks past their end still count those: the next
boot frees them.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from array import array
from collections.abc import Mapping
from hashlib import sha256

from qcowfs import _extdir, _extmap, limits
from qcowfs._ext2 import Filesystem
from qcowfs.inside import jbd2
from qcowfs.inside.extsuper import SUPER_OFFSET, SUPER_SIZE, without_usage
from qcowfs.inside.reader import INLINE, Device, Extents, Layout, Reader, Unproven, Unreadable
from qcowfs.inside.record import INODE, Extent, Inode

__all__ = ["ExtReader", "open_reader"]

ROOT = 2
ENCRYPTED, INLINE_DATA = 0x800, 0x10000000
I_BLOCK = 60  # bytes
SHOWN_XATTRS = (b"user.", b"trusted.", b"security.")  # what else there is the kernel keeps to itself
ACL_VERSION = struct.pack("<I", 1)
ACL_SIZES = {
    1: 4,
    2: 8,
    4: 4,
    8: 8,
    16: 4,
    32: 4,
}  # of an entry, by its tag: some have an id
LONGEST_TARGET = 4095  # bytes: PATH_MAX without its NUL
ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")


def open_reader(device: Device, *, recover: bool) -> Reader:
    """Return the reader of the file system on `device`.

    Raises:
        Unreadable: it is no ext file system, too damaged, or has a feature that is not known here; or its journal is
            to be recovered and cannot be.
    """
    try:
        reader = ExtReader(device, jbd2.recover(device) if recover else None)
        root = Inode._make(INODE.unpack(reader.stat(ROOT)))
    except OSError as error:
        raise Unreadable(f"ext: {error.strerror}") from error
    if not stat.S_ISDIR(root.mode):
        raise Unreadable("ext: its root is no directory")
    return reader


class ExtReader:
    """A Reader; inode numbers are those of the file system."""

    root = ROOT

    def __init__(self, device: Device, recovery: jbd2.Recovery | None = None) -> None:
        self._recovery = recovery
        self._device = recovery.overlay if recovery else device
        self._fs = Filesystem(self._device, recovery.overlay.covered() if recovery else None)

    def facts(self) -> Mapping[str, str]:
        state = {"state": "clean" if self._fs.clean else "not clean"}
        return state | ({"recovery": self._recovery.summary} if self._recovery else {})

    def stat(self, ino: int) -> bytes:
        return self._fs.stat(_number(ino))

    def lookup(self, ino: int, name: bytes) -> int:
        return _extdir.lookup(self._fs, _number(ino), name)

    def entries(self, ino: int, cookie: int, room: int) -> bytes:
        return _extdir.entries(self._fs, _number(ino), cookie, room)

    def readlink(self, ino: int) -> bytes:
        told = self._told(ino)
        if not stat.S_ISLNK(told.mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        raw = self._fs.inode(ino)
        target = self._target(ino, raw, told)
        if _flags(raw) & ENCRYPTED:
            target = _extdir.without_key(target[2 : 2 + int.from_bytes(target[:2], "little")])
        else:
            target = target.partition(b"\0")[0]
        if not 0 < len(target) <= LONGEST_TARGET:
            raise OSError(errno.EIO, f"inode {ino}: a symbolic link without a target that can be")
        return target

    def xattrs(self, ino: int) -> Mapping[bytes, bytes]:
        found = self._fs.xattrs(_number(ino))
        shown = {name: value for name, value in found.items() if name.startswith(SHOWN_XATTRS)}
        return shown | {name: _acl(found[name]) for name in ACLS if name in found}

    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        told = self._told(ino)
        raw = self._fs.inode(ino)
        if _flags(raw) & ENCRYPTED:
            raise OSError(errno.ENOKEY, os.strerror(errno.ENOKEY))
        if _flags(raw) & INLINE_DATA:
            data = self._fs.inline(ino)[: told.size]
            return Extents([Extent(0, len(data), INLINE)] if offset < len(data) else [], told.size, data)
        found, end = _extmap.extents(self._fs, ino, offset, limit)
        extents = [Extent._make(extent) for extent in found]
        return self._recovery.overlay.extents(extents, limit, end) if self._recovery else Extents(extents, end)

    def read(self, ino: int, offset: int, length: int) -> bytes:
        raise OSError(errno.EINVAL, "every file of ext has extents")

    def layout(self) -> Layout:
        """Return where inodes are and what they mean, and the blocks that the journal has."""
        lasting = without_usage(self._device.read(SUPER_OFFSET, SUPER_SIZE))
        moved = self._recovery.overlay.covered_ranges() if self._recovery else []
        if len(moved) > limits.INSIDE_RANGES:
            raise OSError(errno.E2BIG, "the journal has too many blocks")
        return Layout(sha256(lasting + self._fs.inode_tables).digest(), moved)

    def suspect(self, ranges: bytes) -> None:
        self._fs.suspect(array("Q", ranges))

    def unproven(self, ino: int) -> Unproven | None:
        found = _extdir.unproven(self._fs, _number(ino))
        return found and Unproven(*found)

    def _told(self, ino: int) -> Inode:
        return Inode._make(INODE.unpack(self.stat(ino)))

    def _target(self, ino: int, raw: bytes, told: Inode) -> bytes:
        """Return the target of a symbolic link as it is stored."""
        size = min(int.from_bytes(raw[4:8], "little"), self._fs.block_size)
        if _flags(raw) & INLINE_DATA:
            return self._fs.inline(ino)[:size]
        if self._is_fast(raw, told):
            return raw[40:100][:size]
        found, _end = _extmap.extents(self._fs, ino, 0, 1)
        if not found or found[0][0]:
            return b""
        return self._device.read(found[0][2], min(size, found[0][1]))

    def _is_fast(self, raw: bytes, told: Inode) -> bool:
        if self._fs.has_ea_inodes:  # i_blocks counts theirs too
            return int.from_bytes(raw[4:8], "little") < I_BLOCK
        acl, acl_high = struct.unpack_from("<I", raw, 104)[0], struct.unpack_from("<H", raw, 118)[0]
        return told.blocks == (self._fs.cluster_size // 512 if acl or acl_high else 0)


def _number(ino: int) -> int:
    if not 0 < ino < 1 << 32:
        raise FileNotFoundError(errno.ENOENT, "no such inode")
    return ino


def _flags(raw: bytes) -> int:
    return int.from_bytes(raw[32:36], "little")


def _acl(stored: bytes) -> bytes:
    """Return an ACL in the form of Linux's xattr (version 2), in which every entry has an id."""
    made = [struct.pack("<I", 2)]
    at = 4
    while at + 4 <= len(stored):
        tag, allowed = struct.unpack_from("<HH", stored, at)
        size = ACL_SIZES.get(tag, 0)
        if not size or at + size > len(stored):
            break
        who = struct.unpack_from("<I", stored, at + 4)[0] if size == 8 else 2**32 - 1
        made.append(struct.pack("<HHI", tag, allowed, who))
        at += size
    if stored[:4] != ACL_VERSION or at != len(stored):
        raise OSError(errno.EIO, "an ACL that is damaged")
    return b"".join(made)

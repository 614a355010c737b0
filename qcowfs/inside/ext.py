"""The reader of ext2, ext3 and ext4: what libext2fs finds, said as Linux says it.

Used by the worker. Names are given as stored; those of encrypted directories too, but for what Linux cannot have.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from qcowfs._ext2 import Filesystem
from qcowfs.inside import jbd2
from qcowfs.inside.reader import INLINE, Device, Extents, Reader, Unreadable
from qcowfs.inside.record import NO_XATTRS, TYPES, Extent, Inode, fill, pack_entry

__all__ = ["ExtReader", "open_reader"]

ROOT = 2
ENCRYPTED, HUGE_FILE, EXTENTS, EA_INODE, INLINE_DATA = 0x800, 0x40000, 0x80000, 0x200000, 0x10000000
RO_COMPAT_HUGE_FILE, INCOMPAT_LARGEDIR = 0x8, 0x4000
OLD_INODE = 128  # bytes; what is longer has i_extra_isize next
XATTR_MAGIC = 0xEA020000
HELD_DIRECTORIES = 4
FEW_EXTENTS = 4
LONGEST_LINK = 4095  # PATH_MAX without its NUL, where the kernel cuts
LAST_NANOSECOND = 999_999_999  # the kernel has a stored time beyond it end here, too, on its way through FUSE


def open_reader(device: Device, *, recover: bool) -> Reader:
    """Return the reader of the file system on `device`.

    Raises:
        Unreadable: it is no ext file system, too damaged, or has a feature that is not known here; or its journal is
            to be recovered and cannot be.
    """
    try:
        return ExtReader(device, jbd2.recover(device) if recover else None)
    except OSError as error:
        raise Unreadable(f"ext: {error.strerror}") from error


class ExtReader:
    """A Reader; inode numbers are those of the file system."""

    root = ROOT

    def __init__(self, device: Device, recovery: jbd2.Recovery | None = None) -> None:
        self._recovery = recovery
        self._device = recovery.overlay if recovery else device
        self._fs = Filesystem(self._device)
        self._names: OrderedDict[int, dict[bytes, int]] = OrderedDict()
        self._mapped: tuple[int, list[Extent]] = (0, [])

    def facts(self) -> Mapping[str, str]:
        state = {"state": "clean" if self._fs.clean else "not clean"}
        return state | ({"recovery": self._recovery.summary} if self._recovery else {})

    def stat(self, ino: int) -> bytes:
        return self._told(ino, self._inode(ino)).pack()

    def lookup(self, ino: int, name: bytes) -> int:
        try:
            return self._directory(ino)[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None

    def entries(self, ino: int, cookie: int, room: int) -> bytes:
        names = list(self._directory(ino).items())[cookie:]
        return fill((self._entry(name, child, cookie + n) for n, (name, child) in enumerate(names, 1)), room)

    def readlink(self, ino: int) -> bytes:
        raw = self._inode(ino)
        told = self._told(ino, raw)
        if not stat.S_ISLNK(told.mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._refuse_encrypted(raw)
        if not _flags(raw) & INLINE_DATA and self._is_fast(raw, told):
            target = raw[40 : 40 + min(told.size, 59)]
        else:
            target = self._bytes(ino, min(told.size, self._fs.block_size, LONGEST_LINK))
        return target.partition(b"\0")[0]

    def xattrs(self, ino: int) -> Mapping[bytes, bytes]:
        found = self._fs.xattrs(ino)
        found.pop(b"system.data", None)
        for name in (b"system.posix_acl_access", b"system.posix_acl_default"):
            if name in found:
                found[name] = _acl(found[name])
        return found

    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        raw = self._inode(ino)
        self._refuse_encrypted(raw)
        size = self._told(ino, raw).size
        if _flags(raw) & INLINE_DATA:
            data = self._fs.inline(ino)[:size]
            return Extents([Extent(0, len(data), INLINE)] if offset < len(data) else [], size, data)
        rest = [extent for extent in self._map(ino, raw, size) if extent.start + extent.length > offset]
        return self._stored(rest, limit, size)

    def read(self, ino: int, offset: int, length: int) -> bytes:
        raise OSError(errno.EINVAL, "every file of ext has extents")

    def _stored(self, extents: list[Extent], limit: int, size: int) -> Extents:
        if self._recovery:
            return self._recovery.overlay.extents(extents, limit, size)
        return Extents(extents[:limit], extents[limit].start if len(extents) > limit else size)

    def _inode(self, ino: int) -> bytes:
        raw = self._fs.inode(ino)
        mode, links = struct.unpack_from("<H24xH", raw)
        if not mode and not links:
            raise FileNotFoundError(errno.ENOENT, "a deleted inode")
        return raw

    def _told(self, ino: int, raw: bytes) -> Inode:
        mode, uid, size, _, _, _, _, gid, nlink, blocks = struct.unpack_from("<HHIIIIIHHI", raw)
        acl, size_high = struct.unpack_from("<II", raw, 104)
        blocks_high, acl_high, uid_high, gid_high = struct.unpack_from("<HHHH", raw, 116)
        incompat, ro_compat = self._fs.features
        if stat.S_ISREG(mode) or incompat & INCOMPAT_LARGEDIR:
            size |= size_high << 32
        if ro_compat & RO_COMPAT_HUGE_FILE:
            blocks |= blocks_high << 32
            blocks *= self._fs.block_size // 512 if _flags(raw) & HUGE_FILE else 1
        if stat.S_ISREG(mode) and _flags(raw) & INLINE_DATA:  # the kernel adds them, lest tools take it for empty
            blocks += (size + 511) // 512
        if stat.S_IFMT(mode) not in TYPES or size >> 63 or blocks >> 54:
            raise OSError(errno.EIO, f"inode {ino}: mode {mode:#o}, {size} bytes in {blocks} sectors")
        bare = not acl and not acl_high and not _has_inner_xattrs(raw)
        (atime, atime_ns), (ctime, ctime_ns), (mtime, mtime_ns) = (_time(raw, *at) for at in TIMES)
        return Inode(
            ino, size, blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, nlink,
            uid | uid_high << 16, gid | gid_high << 16, _device(raw, mode), NO_XATTRS if bare else 0, 0,
        )  # fmt: skip

    def _directory(self, ino: int) -> dict[bytes, int]:
        held = self._names.get(ino)
        if held is None:
            raw = self._inode(ino)
            if not stat.S_ISDIR(struct.unpack_from("<H", raw)[0]):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            held = self._names[ino] = dict(self._fs.names(ino))
            if len(self._names) > HELD_DIRECTORIES:
                self._names.popitem(last=False)
        return held

    def _entry(self, name: bytes, ino: int, cookie: int) -> bytes:
        extents: Sequence[Extent] | None = None
        told: Inode | None = None
        try:
            raw = self._inode(ino)
            told = self._told(ino, raw)
            if stat.S_ISREG(told.mode) and not _flags(raw) & (ENCRYPTED | INLINE_DATA):
                found = self._stored(self._map(ino, raw, told.size), FEW_EXTENTS, told.size)
                extents = found.extents if found.end == told.size and not found.inline else None
        except OSError as error:
            extents = None
            if error.errno == errno.ENOENT or told is None:
                told = Inode._make((ino, *[0] * 8, stat.S_IFREG, *[0] * 5, error.errno or errno.EIO))
        return pack_entry(name, told.pack(), cookie, extents)

    def _map(self, ino: int, raw: bytes, size: int) -> list[Extent]:
        if self._mapped[0] == ino:
            return self._mapped[1]
        runs = self._fs.leaves(ino) if _flags(raw) & EXTENTS else self._fs.blocks(ino)
        unit = self._fs.block_size
        found: list[Extent] = []
        end = 0
        for start, length, block in runs:
            if start < end or (block + length) * unit > self._device.size:
                raise OSError(errno.EIO, f"inode {ino}: an extent overlaps another, or lies outside the volume")
            end = start + length
            if start * unit < size:
                found.append(Extent(start * unit, min(length * unit, size - start * unit), block * unit))
        self._mapped = ino, found
        return found

    def _bytes(self, ino: int, length: int) -> bytes:
        raw = self._inode(ino)
        self._refuse_encrypted(raw)
        if _flags(raw) & INLINE_DATA:
            return self._fs.inline(ino)[:length]
        found = self._map(ino, raw, length)
        if not found or found[0].start:
            raise OSError(errno.EIO, f"inode {ino}: a symbolic link without a target")
        return self._device.read(found[0].offset, min(length, found[0].length))

    def _is_fast(self, raw: bytes, told: Inode) -> bool:
        if _flags(raw) & EA_INODE:
            return told.size < 60
        acl, acl_high = struct.unpack_from("<I", raw, 104)[0], struct.unpack_from("<H", raw, 118)[0]
        return told.blocks == (self._fs.block_size // 512 if acl or acl_high else 0)

    @staticmethod
    def _refuse_encrypted(raw: bytes) -> None:
        if _flags(raw) & ENCRYPTED:
            raise OSError(errno.ENOKEY, os.strerror(errno.ENOKEY))


TIMES = ((8, 140), (12, 132), (16, 136))  # where seconds lie, and nanoseconds with the epoch's bits


def _flags(raw: bytes) -> int:
    return int.from_bytes(raw[32:36], "little")


def _extra(raw: bytes) -> int:
    return OLD_INODE + int.from_bytes(raw[128:130], "little") if len(raw) > OLD_INODE else OLD_INODE


def _time(raw: bytes, seconds_at: int, extra_at: int) -> tuple[int, int]:
    seconds = int.from_bytes(raw[seconds_at : seconds_at + 4], "little", signed=True)
    if extra_at + 4 > _extra(raw):
        return seconds, 0
    extra = int.from_bytes(raw[extra_at : extra_at + 4], "little")
    return seconds + ((extra & 3) << 32), min(extra >> 2, LAST_NANOSECOND)


def _has_inner_xattrs(raw: bytes) -> bool:
    at = _extra(raw)
    return len(raw) > OLD_INODE and int.from_bytes(raw[at : at + 4], "little") == XATTR_MAGIC


def _device(raw: bytes, mode: int) -> int:
    if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode)):
        return 0
    old, new = struct.unpack_from("<II", raw, 40)
    return int(old & 0xFFFF or new)


def _acl(stored: bytes) -> bytes:
    """Return an ACL in the form of Linux's xattr (version 2), in which every entry has an id."""
    made = [struct.pack("<I", 2)]
    at = 4
    while at + 4 <= len(stored):
        tag, allowed = struct.unpack_from("<HH", stored, at)
        named = tag in (2, 8)  # ACL_USER, ACL_GROUP
        if named and at + 8 > len(stored):
            raise OSError(errno.EIO, "an ACL ends in the middle of an entry")
        who = struct.unpack_from("<I", stored, at + 4)[0] if named else 2**32 - 1
        made.append(struct.pack("<HHI", tag, allowed, who))
        at += 8 if named else 4
    return b"".join(made)

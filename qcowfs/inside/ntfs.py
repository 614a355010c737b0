"""The reader of NTFS, which says what ntfs-3g says without a map of users.

Used by the worker. Inode numbers are those of the master file table; its first records, which are NTFS's own, are not
shown. Only what is compressed (LZNT1, and the files that Windows itself compresses) needs a library, libfsntfs, which
unpacks it: libfsntfs 20260827 loses names, without a word, where clusters are larger than 4 KiB, and tells nothing of a
file whose record is damaged, nor whether the clusters of one are compressed.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qcowfs import limits
from qcowfs.inside import reparse
from qcowfs.inside.directories import LONGEST_NAME, Directories, is_name, utf8
from qcowfs.inside.mft import COMPRESSED, DATA, ENCRYPTED, RECORD_BITS, Attribute, Mft, Record, geometry
from qcowfs.inside.ntfsindex import I30, INDEX_ALLOCATION, references
from qcowfs.inside.probes import padded
from qcowfs.inside.probes.windows import ntfs
from qcowfs.inside.reader import Device, Extents, Reader, Unreadable
from qcowfs.inside.record import INODE_BITS, NO_XATTRS, Extent, Inode, pack_entry

try:
    import pyfsntfs
except ImportError:
    pyfsntfs = None

__all__ = ["NtfsReader", "open_reader"]

ROOT = 5
FIRST_USER = 16  # records before it are NTFS's own
STANDARD_INFORMATION, REPARSE_POINT = 0x10, 0xC0  # attributes, beside those of mft.py
READ_ONLY, SYSTEM = 0x1, 0x4  # flags of a file
EPOCH = 116_444_736_000_000_000  # of Unix, in hundreds of nanoseconds since 1601
INTERIX_LINK = b"IntxLNK\1"  # what begins a symbolic link as Interix and ntfs-3g store it
LONGEST_INTERIX_LINK = len(INTERIX_LINK) + 2 * reparse.LONGEST_LINK
LONGEST_REPARSE = 16384  # Windows: bytes of a reparse point
FEW_EXTENTS = 4


def open_reader(device: Device, *, recover: bool) -> Reader:
    """Return the reader of the file system on `device`. Its log is not replayed.

    Raises:
        Unreadable: it is no NTFS, or too damaged.
    """
    try:
        return NtfsReader(device, Mft(device, geometry(device.read(0, 512))))
    except OSError as error:
        raise Unreadable(f"NTFS: {error.strerror}") from error


class NtfsReader:
    """A Reader."""

    root = ROOT

    def __init__(self, device: Device, mft: Mft) -> None:
        self._device = device
        self._mft = mft
        self._directories = Directories(self._names)
        self._volume: Any = None  # of libfsntfs, once something is compressed

    def facts(self) -> Mapping[str, str]:
        found = ntfs(padded(self._device.read, self._device.size), self._device.size)
        if found is None or found.clean is None:
            return {}
        return {"state": "clean"} if found.clean else {"state": "not clean", "recovery": "its log is not replayed"}

    def stat(self, ino: int) -> bytes:
        return self._told(ino, self._mft.record(ino)).pack()

    def lookup(self, ino: int, name: bytes) -> int:
        return self._file(self._directories.lookup(ino, name))[0]

    def entries(self, ino: int, cookie: int, room: int) -> bytes:
        return self._directories.entries(ino, cookie, room, self._entry)

    def readlink(self, ino: int) -> bytes:
        target = self._target(self._mft.record(ino))
        if not target:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return target

    def xattrs(self, ino: int) -> Mapping[bytes, bytes]:
        """Return the alternate data streams; one that Linux cannot have as an extended attribute is left out."""
        found: dict[bytes, bytes] = {}
        room = limits.MAX_NTFS_STREAMS
        for stream in _streams(self._mft.record(ino)):
            name = _attribute_name(stream)
            if len(name) <= LONGEST_NAME and stream.size <= min(limits.MAX_NTFS_STREAM, room):
                found[name] = self._content(ino, stream)
                room -= stream.size + len(name)
        return found

    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        record = self._mft.record(ino)
        if record.is_directory:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        data = record.find(DATA)
        if data is None:
            return Extents([], 0)
        if data.flags & ENCRYPTED:
            raise OSError(errno.ENOKEY, os.strerror(errno.ENOKEY))
        if _is_packed(data) or reparse.tag(self._reparse(record)) == reparse.WOF:
            return None
        return self._mft.extents(data, offset, max(limit, 1))

    def read(self, ino: int, offset: int, length: int) -> bytes:
        data = self._mft.record(ino).find(DATA)
        length = min(length, data.size - offset) if data else 0
        return bytes(self._unpacked(ino).read_buffer_at_offset(length, offset)) if length > 0 else b""

    def _content(self, ino: int, stream: Attribute) -> bytes:
        """Return the whole of an alternate data stream."""
        if not _is_packed(stream):
            return self._mft.read(stream, 0, stream.size)
        name = stream.name.decode("utf-16-le", "surrogatepass")
        found = self._unpacked(ino).get_alternate_data_stream_by_name(name)
        return bytes(found.read_buffer_at_offset(stream.size, 0))

    def _unpacked(self, ino: int) -> Any:
        """Return a file as libfsntfs has it."""
        if pyfsntfs is None:
            raise OSError(errno.ENOTSUP, "it is compressed; install qcowfs[windows] to read it")
        if self._volume is None:
            self._volume = pyfsntfs.volume()
            self._volume.open_file_object(_Stream(self._device))
        return self._volume.get_file_entry(ino)

    def _told(self, ino: int, record: Record) -> Inode:
        standard = record.find(STANDARD_INFORMATION)
        if standard is None or standard.value is None or len(standard.value) < 36:
            raise OSError(errno.EIO, "a file without times")
        modified, changed, accessed, flags = struct.unpack_from("<8xQQQI", standard.value)
        (atime, atime_ns), (mtime, mtime_ns), (ctime, ctime_ns) = map(_time, (accessed, modified, changed))
        data, nlink = record.find(DATA), record.links
        size, blocks = (data.size, -(-data.allocated // 512)) if data else (0, 0)
        target = self._target(record)
        if target:
            mode, size = stat.S_IFLNK | 0o777, len(target)
        elif record.is_directory:
            index = record.find(INDEX_ALLOCATION, I30)
            mode, nlink = stat.S_IFDIR | 0o755, 1
            size, blocks = (index.size, -(-index.allocated // 512)) if index else (0, 0)
        else:
            mode = stat.S_IFREG | (0o555 if flags & READ_ONLY else 0o755)
        bare = NO_XATTRS if not any(_streams(record)) else 0
        return Inode(
            ino, size, blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, nlink, 0, 0, 0, bare, 0
        )  # fmt: skip

    def _file(self, reference: int) -> tuple[int, Record]:
        """Return the inode number and the record of the file that a directory refers to."""
        number, sequence = reference & ((1 << RECORD_BITS) - 1), reference >> RECORD_BITS
        record = self._mft.record(number)
        if sequence and sequence != record.sequence:
            raise OSError(errno.EIO, "not the file that the directory names, which was deleted")
        return number, record

    def _entry(self, name: bytes, reference: int, cookie: int) -> bytes:
        extents: Sequence[Extent] | None = None
        try:
            ino, record = self._file(reference)
            told = self._told(ino, record)
        except OSError as error:
            number = error.errno if error.errno != errno.ENOENT else errno.EIO
            told = _unreadable(reference & ((1 << RECORD_BITS) - 1), number or errno.EIO)
        else:
            extents = self._few(told)
        return pack_entry(name, told.pack(), cookie, extents)

    def _few(self, told: Inode) -> Sequence[Extent] | None:
        """Return all extents of a file, if they are few, and none of them in its record."""
        if not stat.S_ISREG(told.mode):
            return None
        try:
            found = self.extents(told.ino, 0, FEW_EXTENTS)
        except OSError:
            return None  # who reads the file will be told
        return found.extents if found and not found.inline and found.end == told.size else None

    def _names(self, ino: int) -> Iterator[tuple[bytes, int]]:
        record = self._mft.record(ino)
        if not record.is_directory:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        for stored, reference in references(self._mft, record):
            name = utf8(stored)
            if reference & ((1 << RECORD_BITS) - 1) >= FIRST_USER and is_name(name):
                yield name, reference

    def _reparse(self, record: Record) -> bytes:
        point = record.find(REPARSE_POINT)
        return self._mft.read(point, 0, min(point.size, LONGEST_REPARSE)) if point else b""

    def _target(self, record: Record) -> bytes:
        """Return the target of a symbolic link, b"" if it is none."""
        target = reparse.target(self._reparse(record))
        data = record.find(DATA)
        if target or record.is_directory or data is None:
            return target
        if not len(INTERIX_LINK) < data.size <= LONGEST_INTERIX_LINK or _is_packed(data) or not _is_system(record):
            return b""
        stored = self._mft.read(data, 0, data.size)
        return utf8(stored[len(INTERIX_LINK) :])[: reparse.LONGEST_LINK] if stored.startswith(INTERIX_LINK) else b""


class _Stream:
    """A Device as libfsntfs reads it: a file object."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._place = 0

    def read(self, size: int) -> bytes:
        size = max(min(size, self._device.size - self._place), 0)
        found = self._device.read(self._place, size)
        self._place += size
        return found

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> None:
        self._place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._device.size}[whence]

    def tell(self) -> int:
        return self._place

    def get_size(self) -> int:
        return self._device.size


def _is_packed(attribute: Attribute) -> bool:
    """Return whether the clusters of an attribute hold its bytes as they are not."""
    return attribute.value is None and bool(attribute.flags & COMPRESSED)


def _is_system(record: Record) -> bool:
    standard = record.find(STANDARD_INFORMATION)
    return standard is not None and standard.value is not None and bool(standard.value[32] & SYSTEM)


def _streams(record: Record) -> Iterator[Attribute]:
    """Yield the alternate data streams of a file."""
    return (attribute for attribute in record.attributes if attribute.kind == DATA and attribute.name)


def _attribute_name(stream: Attribute) -> bytes:
    return b"user." + utf8(stream.name)


def _unreadable(ino: int, number: int) -> Inode:
    """Return the inode of a file whose record cannot be read: whether it is a directory is not known."""
    ino = ino if 0 < ino < 1 << INODE_BITS else 1
    return Inode(ino, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFREG, 1, 0, 0, 0, NO_XATTRS, number)


def _time(filetime: int) -> tuple[int, int]:
    """Return seconds and nanoseconds from hundreds of nanoseconds since 1601."""
    seconds, rest = divmod(filetime - EPOCH, 10_000_000)
    return seconds, rest * 100

"""The reader of NTFS: what libfsntfs finds, said as ntfs-3g says it without a map of users.

Used by the worker. Inode numbers are those of the master file table; its first records, which are NTFS's own, are not
shown. What the mount process cannot read where it is (LZNT1, and what Windows compresses its own files with) libfsntfs
unpacks.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence

import pyfsntfs

from qcowfs import limits
from qcowfs.inside.directories import LONGEST_NAME, Directories, is_name, utf8
from qcowfs.inside.probes import padded
from qcowfs.inside.probes.windows import ntfs
from qcowfs.inside.reader import INLINE, Device, Extents, Reader, Unreadable
from qcowfs.inside.record import NO_XATTRS, Extent, Inode, pack_entry

__all__ = ["NtfsReader", "open_reader"]

ROOT = 5
FIRST_USER = 16  # records before it are NTFS's own
RECORD_BITS = 48  # of a file reference; the rest is its sequence number, one more for each file that had the record
READ_ONLY, SYSTEM, SPARSE, REPARSE_POINT, COMPRESSED, ENCRYPTED = 0x1, 0x4, 0x200, 0x400, 0x800, 0x4000
FILE_NAME, DATA, INDEX_ALLOCATION = 0x30, 0x80, 0xA0  # types of attributes
HOLE = 1  # flag of an extent
LARGEST_RECORD = 4096
EPOCH = 116_444_736_000_000_000  # of Unix, in hundreds of nanoseconds since 1601
INTERIX_LINK = b"IntxLNK\1"  # what begins a symbolic link as Interix and ntfs-3g store it
LONGEST_LINK = 4095
WOF_STREAM = "WofCompressedData"
FEW_EXTENTS = 4
UNREADABLE = 1 << 39  # inode numbers from here on are of files whose records libfsntfs cannot read


def open_reader(device: Device, *, recover: bool) -> Reader:
    """Return the reader of the file system on `device`. Its log is not replayed.

    Raises:
        Unreadable: it is no NTFS, or too damaged.
    """
    try:
        return NtfsReader(device)
    except OSError as error:
        raise Unreadable(f"NTFS: {error}") from error


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


class NtfsReader:
    """A Reader."""

    root = ROOT

    def __init__(self, device: Device) -> None:
        self._device = device
        self._volume = pyfsntfs.volume()
        self._volume.open_file_object(_Stream(device))
        if self._volume.cluster_block_size > self._volume.index_entry_size:
            # libfsntfs 20260827 finds there only the few names that are in a directory's own record, and says nothing.
            raise Unreadable(f"NTFS: clusters of {self._volume.cluster_block_size} bytes are not supported yet")
        self._directories = Directories(self._names)
        self._held: tuple[int, pyfsntfs.file_entry] | None = None

    def facts(self) -> Mapping[str, str]:
        found = ntfs(padded(self._device.read, self._device.size), self._device.size)
        if found is None or found.clean:
            return {"state": "clean"} if found else {}
        return {"state": "not clean", "recovery": "its log is not replayed"}

    def stat(self, ino: int) -> bytes:
        return self._told(ino, self._file(ino)).pack()

    def lookup(self, ino: int, name: bytes) -> int:
        return self._directories.lookup(ino, name)

    def entries(self, ino: int, cookie: int, room: int) -> bytes:
        return self._directories.entries(ino, cookie, room, self._entry)

    def readlink(self, ino: int) -> bytes:
        target = _target(self._file(ino))
        if not target:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return target

    def xattrs(self, ino: int) -> Mapping[bytes, bytes]:
        """Return the alternate data streams; one that no extended attribute of Linux can be is not among them."""
        file = self._file(ino)
        found: dict[bytes, bytes] = {}
        room = limits.MAX_NTFS_STREAMS
        for stream in file.alternate_data_streams:
            name, size = b"user." + _bytes(stream.name), stream.size
            if _is_attribute(name) and size <= min(limits.MAX_NTFS_STREAM, room) and stream.name != WOF_STREAM:
                found[name] = stream.read_buffer_at_offset(size, 0) if size else b""
                room -= size
        return found

    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        file = self._file(ino)
        size = file.size
        if _flags(file) & ENCRYPTED:
            raise OSError(errno.ENOKEY, os.strerror(errno.ENOKEY))
        if file.number_of_extents == 0:
            return _resident(file, size)
        if _is_packed(file):
            return None
        return self._stored(file, offset, max(limit, 1), size)

    def read(self, ino: int, offset: int, length: int) -> bytes:
        file = self._file(ino)
        length = min(length, file.size - offset)
        return bytes(file.read_buffer_at_offset(length, offset)) if length > 0 else b""

    def _file(self, ino: int) -> pyfsntfs.file_entry:
        if self._held is None or self._held[0] != ino:
            if not 0 <= ino < self._volume.number_of_file_entries:
                raise FileNotFoundError(errno.ENOENT, "no such record")
            file = self._volume.get_file_entry(ino)
            if not file.is_allocated() or file.base_record_file_reference:
                raise FileNotFoundError(errno.ENOENT, "a deleted file")
            self._held = ino, file
        return self._held[1]

    def _told(self, ino: int, file: pyfsntfs.file_entry) -> Inode:
        attributes = [(attribute.attribute_type, attribute) for attribute in file.attributes]
        target = _target(file)
        size, blocks, nlink = file.size, _blocks(file), 1
        if target:
            mode, size = stat.S_IFLNK | 0o777, len(target)
        elif file.has_directory_entries_index():
            index = [attribute.data_size for kind, attribute in attributes if kind == INDEX_ALLOCATION]
            mode, size, blocks = stat.S_IFDIR | 0o755, sum(index), sum(index) // 512
        else:
            mode = stat.S_IFREG | (0o555 if _flags(file) & READ_ONLY else 0o755)
            nlink = max(sum(kind == FILE_NAME for kind, _ in attributes), 1)
        (atime, atime_ns), (mtime, mtime_ns), (ctime, ctime_ns) = (
            _time(file.get_access_time_as_integer()),
            _time(file.get_modification_time_as_integer()),
            _time(file.get_entry_modification_time_as_integer()),
        )
        flags = 0 if file.number_of_alternate_data_streams else NO_XATTRS
        return Inode(
            ino, size, blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns, mode, nlink, 0, 0, 0, flags, 0
        )  # fmt: skip

    def _entry(self, name: bytes, ino: int, cookie: int) -> bytes:
        extents: Sequence[Extent] | None = None
        try:
            if ino < 0:
                raise OSError(errno.EIO, "not the file that the directory names")
            file = self._file(ino)
            told = self._told(ino, file)
            if stat.S_ISREG(told.mode) and file.number_of_extents <= FEW_EXTENTS and (not told.size or told.blocks):
                found = self.extents(ino, 0, FEW_EXTENTS)
                extents = found.extents if found and not found.inline and found.end == told.size else None
        except (OSError, ValueError):
            told = Inode(abs(ino), 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFREG, 1, 0, 0, 0, NO_XATTRS, errno.EIO)
        return pack_entry(name, told.pack(), cookie, extents)

    def _names(self, ino: int) -> Iterator[tuple[bytes, int]]:
        """Yield names and inode numbers; one below 0 is of a file that cannot be read."""
        directory = self._file(ino)
        if not directory.has_directory_entries_index():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        for place in range(directory.number_of_sub_file_entries):
            try:
                child = directory.get_sub_file_entry(place)
                name, reference = _bytes(child.name), child.get_i30_file_reference()
                same = child.file_reference == reference
            except (OSError, ValueError):  # libfsntfs tells the name only of what it can read
                name, reference, same = b"unreadable entry %d" % place, UNREADABLE + place, False
            number = reference & ((1 << RECORD_BITS) - 1)
            if number >= FIRST_USER and is_name(name):
                yield name, number if same else -number

    def _stored(self, file: pyfsntfs.file_entry, offset: int, limit: int, size: int) -> Extents:
        """Return extents; what lies behind the valid length reads as zeros, whatever is stored there."""
        valid = min(size, _valid(file))
        found: list[Extent] = []
        start = 0
        for number in range(file.number_of_extents):
            place, length, flags = file.get_extent(number)
            end = min(start + length, valid)
            if not flags & HOLE and start < end and end > offset:
                if place + end - start > self._device.size:
                    raise OSError(errno.EIO, "an extent outside the volume")
                if len(found) == limit:
                    return Extents(found, start)
                found.append(Extent(start, end - start, place))
            start += length
        return Extents(found, size)


def _flags(file: pyfsntfs.file_entry) -> int:
    return int(file.file_attribute_flags or 0)


def _resident(file: pyfsntfs.file_entry, size: int) -> Extents:
    """Return the bytes of a file that are in its record."""
    if size > LARGEST_RECORD:
        raise OSError(errno.EIO, "a file without clusters that does not fit into a record")
    return Extents(
        [Extent(0, size, INLINE)] if size else [], size, file.read_buffer_at_offset(size, 0) if size else b""
    )


def _is_packed(file: pyfsntfs.file_entry) -> bool:
    """Return whether the clusters of a file hold its bytes as they are not.

    libfsntfs does not tell whether they are compressed, only what the file says of itself. What has holes and does not
    call itself sparse is read through the library too.
    """
    flags = _flags(file)
    if flags & COMPRESSED or (flags & REPARSE_POINT and file.has_alternate_data_stream_by_name(WOF_STREAM)):
        return True
    return not flags & SPARSE and any(file.get_extent(n)[2] & HOLE for n in range(file.number_of_extents))


def _valid(file: pyfsntfs.file_entry) -> int:
    """Return how many bytes of a file were ever written."""
    for attribute in file.attributes:
        if attribute.attribute_type == DATA and not attribute.attribute_name:
            return int(attribute.valid_data_size)
    return 0


def _blocks(file: pyfsntfs.file_entry) -> int:
    """Return what is allocated for a file, in units of 512 bytes; in its record, it is a multiple of 8 bytes."""
    count = int(file.number_of_extents)
    if not count:
        return -(-(-(-int(file.size) // 8) * 8) // 512)
    return sum(int(length) for _, length, flags in map(file.get_extent, range(count)) if not flags & HOLE) // 512


def _target(file: pyfsntfs.file_entry) -> bytes:
    """Return the target of a symbolic link, b"" if it is none. A drive of Windows is the first name of the target."""
    flags = _flags(file)
    if flags & REPARSE_POINT:
        text = (file.symbolic_link_target or "").removeprefix("\\??\\").replace("\\", "/")
    elif flags & SYSTEM and len(INTERIX_LINK) < file.size <= len(INTERIX_LINK) + 2 * LONGEST_LINK:
        stored = file.read_buffer_at_offset(file.size, 0)
        return utf8(stored[len(INTERIX_LINK) :])[:LONGEST_LINK] if stored.startswith(INTERIX_LINK) else b""
    else:
        return b""
    return _bytes(text.partition("\0")[0])[:LONGEST_LINK]


def _bytes(text: str | None) -> bytes:
    return (text or "").encode("utf-8", "surrogatepass")


def _is_attribute(name: bytes) -> bool:
    """Return whether Linux can have an extended attribute of this name."""
    return len(b"user.") < len(name) <= LONGEST_NAME and b"\0" not in name


def _time(filetime: int | None) -> tuple[int, int]:
    """Return seconds and nanoseconds from hundreds of nanoseconds since 1601."""
    seconds, rest = divmod((filetime or EPOCH) - EPOCH, 10_000_000)
    return seconds, rest * 100

# cython: language_level=3, cdivision=True
"""Sources: bytes by offset, read without the GIL.

Used by the parsers (through `read_at`) and by the compiled rooms (through `source_t`). A source knows no format. Reads
may come from any number of threads; `close` only after the last of them.

No file is mapped into memory: a file that is cut while it is mapped would kill the process with SIGBUS.
"""

import os
import stat

from cython cimport no_gc_clear
from libc.errno cimport EBADF, EINTR, EINVAL, EIO, ENXIO, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from qcowfs.clib.unistd cimport SEEK_DATA, SEEK_END, SEEK_HOLE, c_close, c_lseek, c_pread

cdef enum:
    LARGEST_OFFSET = 0x7FFFFFFFFFFFFFFF

cdef uint32_t last_identity = 0


cdef class Source:
    """Bytes by offset. An abstract base: use FileSource or SliceSource."""

    def __cinit__(self, *args, **kwargs):
        global last_identity
        last_identity += 1
        self.c.identity = last_identity
        self.c.fd = -1
        self.c.pread = NULL

    @property
    def size(self):
        """Length in bytes at this moment, of a block device too.

        Raises:
            OSError: the length cannot be had.
        """
        cdef int64_t length
        with nogil:
            length = self.c.end(&self.c)
        if length < 0:
            raise OSError(-length, os.strerror(-length), self.name)
        return length

    def read_at(self, uint64_t offset, Py_ssize_t length):
        """Return `length` bytes at `offset`; fewer only where the source ends.

        Raises:
            OSError: the read failed.
        """
        if length < 0:
            raise ValueError("length must not be negative")
        cdef bytes data = PyBytes_FromStringAndSize(NULL, length)
        cdef char* buffer = PyBytes_AS_STRING(data)
        cdef int64_t got
        with nogil:
            got = self.c.pread(&self.c, buffer, <uint64_t>length, offset)
        if got < 0:
            raise OSError(-got, os.strerror(-got), self.name)
        return data if got == length else data[:got]

    def place(self):
        """Return what is equal for two sources if they are the same bytes of the host, by whatever names.

        Raises:
            OSError: the file's status cannot be had.
        """
        return self.c.identity

    def uncached(self):
        """Return a source of the same bytes that no cache of ours stands before, so that it sees what changed."""
        return self

    def again(self):
        """Return another source of the same bytes: caches take it for a new one. None: there is no such thing."""
        return None

    def close(self):
        """Give back what the source holds; reading it afterwards is an error."""


@no_gc_clear  # without its owner it would take the descriptor for its own, and close it
cdef class FileSource(Source):
    """A regular file or a block device, behind a descriptor that this object owns from now on."""

    def __init__(self, int fd, str name):
        self.c.fd = fd
        self.c.pread = file_pread
        self.c.status = file_status
        self.c.end = file_end
        self.name = name

    def fileno(self):
        """Return the descriptor, which stays the source's own."""
        if self.c.fd < 0:
            raise ValueError("the source is closed")
        return self.c.fd

    def place(self):
        status = os.fstat(self.fileno())
        if stat.S_ISBLK(status.st_mode):  # one device may have two nodes
            return -1, status.st_rdev
        return status.st_dev, status.st_ino

    def again(self):
        cdef FileSource other = FileSource(self.fileno(), self.name)
        other.owner = self if self.owner is None else self.owner
        return other

    def close(self):
        if self.c.fd >= 0 and self.owner is None:
            c_close(self.c.fd)
        self.c.fd = -1

    def __dealloc__(self):
        if self.c.fd >= 0 and self.owner is None:
            c_close(self.c.fd)


cdef class SliceSource(Source):
    """`size` bytes of `base` from `offset` (None: up to its end), as QEMU's raw driver cuts with the same two words."""

    def __init__(self, Source base not None, uint64_t offset, size):
        cdef uint64_t end = <uint64_t>base.size
        if offset > end or (size is not None and not 0 <= size <= end - offset):
            raise ValueError("the slice is not within its base")
        self.base = base
        self.name = base.name
        self.c.base = &base.c
        self.c.start = offset
        self.c.room = end - offset if size is None else size
        self.c.pread = slice_pread
        self.c.status = slice_status
        self.c.end = slice_end

    def place(self):
        return self.base.place(), self.c.start, self.c.room

    def uncached(self):
        base = self.base.uncached()
        return self if base is self.base else SliceSource(base, self.c.start, self.c.room)

    def again(self):
        base = self.base.again()
        return None if base is None else SliceSource(base, self.c.start, self.c.room)

    def close(self):
        self.base.close()


def descriptor_of(Source source not None):
    """Return the descriptor that is read in the end, None if there is none."""
    while isinstance(source, SliceSource):
        source = (<SliceSource>source).base
    return source.fileno() if isinstance(source, FileSource) else None


cdef int64_t file_pread(const source_t* source, void* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    cdef uint64_t done = 0
    cdef Py_ssize_t got
    if source.fd < 0:
        return -EBADF
    if offset > LARGEST_OFFSET or length > LARGEST_OFFSET - offset:
        return -EINVAL
    while done < length:
        got = c_pread(source.fd, <char*>buffer + done, length - done, <int64_t>(offset + done))
        if got == 0:
            break
        if got > 0:
            done += <uint64_t>got
        elif errno != EINTR:
            return -errno
    return <int64_t>done


cdef int file_status(const source_t* source, uint64_t offset, uint64_t* length) noexcept nogil:
    # lseek moves the descriptor's position, which nobody uses: every read is a pread.
    cdef int64_t place
    if offset > LARGEST_OFFSET:
        return -EINVAL
    place = c_lseek(source.fd, <int64_t>offset, SEEK_DATA)
    if place < 0:
        if errno == ENXIO:  # a hole up to the end, or past it
            return 0
        return 1 if errno == EINVAL else -errno  # EINVAL: this file system cannot tell, so all is data
    if <uint64_t>place > offset:
        length[0] = min(length[0], <uint64_t>place - offset)
        return 0
    place = c_lseek(source.fd, <int64_t>offset, SEEK_HOLE)
    if place < 0:
        return -errno
    if <uint64_t>place <= offset:
        return -EIO  # the file changed between the two calls
    length[0] = min(length[0], <uint64_t>place - offset)
    return 1


cdef int64_t file_end(const source_t* source) noexcept nogil:
    cdef int64_t place = c_lseek(source.fd, 0, SEEK_END)
    return place if place >= 0 else -errno


cdef int64_t slice_pread(const source_t* source, void* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    if offset >= source.room:
        return 0
    return source.base.pread(source.base, buffer, min(length, source.room - offset), source.start + offset)


cdef int slice_status(const source_t* source, uint64_t offset, uint64_t* length) noexcept nogil:
    if offset >= source.room:
        return 0
    length[0] = min(length[0], source.room - offset)
    return source.base.status(source.base, source.start + offset, length)


cdef int64_t slice_end(const source_t* source) noexcept nogil:
    return <int64_t>source.room

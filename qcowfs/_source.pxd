# Bytes by offset, read without the GIL; knows no format.
#
# A source_t is what the compiled rooms read through; the cdef class that embeds it owns it, and whoever keeps a
# source_t* keeps a reference to that object too.

from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef struct source_t:
    # Read up to `length` bytes at `offset`. Returns the bytes read, short only at the end of the source, or -errno.
    int64_t (*pread)(const source_t* source, void* buffer, uint64_t length, uint64_t offset) noexcept nogil
    # Is `offset` data (1) or a hole (0)? Cuts `length[0]` to the run of the same answer, which is > 0. Or -errno.
    int (*status)(const source_t* source, uint64_t offset, uint64_t* length) noexcept nogil
    # Length in bytes at this moment, or -errno.
    int64_t (*end)(const source_t* source) noexcept nogil
    uint32_t identity  # one number for each source of the process, never used again: half of a cache key
    int fd  # FileSource
    const source_t* base  # SliceSource
    uint64_t start  # SliceSource: its first byte in base
    uint64_t room  # SliceSource: its length
    void* state  # a remote source's own


cdef class Source:
    cdef source_t c
    cdef readonly str name  # for messages: the path as the file was opened by


cdef class FileSource(Source):
    cdef FileSource owner  # of the descriptor; None: this one


cdef class SliceSource(Source):
    cdef Source base

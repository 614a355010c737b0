# A disk: one point in time read as raw bytes, through the whole chain, without the GIL.

from libc.stdint cimport int64_t, uint64_t

from qcowfs._cache cimport Cache
from qcowfs._resolve cimport disk_t
from qcowfs._tables cimport fault_t


cdef enum:
    SEEK_TIME_MS = 1000  # a seek gives up after it


# Fill `buffer` with `length` bytes at `offset`, all within the disk. Returns 0, or -1 with `fault`.
cdef int disk_read(
    disk_t* disk, char* buffer, uint64_t offset, uint64_t length, fault_t* fault) noexcept nogil

# Decompress into the cache what nobody has or is decompressing, of the clusters in [offset, end); one cluster at most.
# Returns where to go on; `end` if nothing is left. Faults are left to whoever reads.
cdef uint64_t disk_preload(disk_t* disk, uint64_t offset, uint64_t end) noexcept nogil

# The first data (or hole) at `offset` or after it, as lseek(2) has it of a file that is the disk up to `end`, where a
# hole is. Returns 0 with `found`, or ENXIO. What cannot be resolved counts as data, so that reading it is an error and
# not a hole.
cdef int disk_seek(const disk_t* disk, uint64_t offset, uint64_t end, bint data, uint64_t* found) noexcept nogil

# Does the range at `offset` hold data? `length` says up to where, `end` at most. What cannot be resolved
# counts as data.
cdef bint holds_data(const disk_t* disk, uint64_t offset, uint64_t end, uint64_t* length) noexcept nogil

# Was something found that nobody was warned of? Then it is for Disk.warn_past_end, with the GIL.
cdef bint disk_has_warning(const disk_t* disk) noexcept nogil

cdef int64_t monotonic_ms() noexcept nogil


cdef class Disk:
    cdef disk_t c
    cdef tuple layers  # of LayerMap, kept alive
    cdef Cache cache

    cdef object extent_at(self, uint64_t offset, uint64_t length)
    cdef object read_fault(self, const fault_t* fault)
    cdef int warn_past_end(self) except -1

# A disk: one point in time read as raw bytes, through the whole chain, without the GIL.

from libc.stdint cimport uint64_t

from qcowfs._cache cimport Cache
from qcowfs._resolve cimport disk_t
from qcowfs._tables cimport fault_t


# Fill `buffer` with `length` bytes at `offset`, all within the disk. Returns 0, or -1 with `fault`.
cdef int disk_read(
    disk_t* disk, char* buffer, uint64_t offset, uint64_t length, fault_t* fault) noexcept nogil

# The same without asking the guards: the bytes are right if disk_check returns 0 afterwards.
cdef int disk_fill(
    disk_t* disk, char* buffer, uint64_t offset, uint64_t length, fault_t* fault) noexcept nogil

# Decompress into the cache what nobody has or is decompressing, of the clusters in [offset, end); one cluster at most.
# Returns where to go on; `end` if nothing is left. Faults are left to whoever reads.
cdef uint64_t disk_preload(disk_t* disk, uint64_t offset, uint64_t end) noexcept nogil

# Was something found that nobody was warned of? Then it is for Disk.warn_past_end, with the GIL.
cdef bint disk_has_warning(const disk_t* disk) noexcept nogil


cdef class Disk:
    cdef disk_t c
    cdef tuple layers  # of LayerMap, kept alive
    cdef tuple guards  # of Guard, kept alive
    cdef Cache cache

    cdef int require_guards(self) except -1
    cdef object extent_at(self, uint64_t offset, uint64_t length)
    cdef object read_fault(self, const fault_t* fault)
    cdef int warn_past_end(self) except -1

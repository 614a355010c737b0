# A disk: one point in time read as raw bytes, through the whole chain, without the GIL.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._cache cimport Cache, cache_t
from qcowfs._tables cimport fault_t, layer_t, mapping_t


cdef struct resolved_t:  # the chain's answer; mapping_t is one layer's
    mapping_t mapping  # its length is the length of this answer
    layer_t* layer  # which layer decides; NULL: none, reads as zeros
    uint32_t depth  # of the layer that decides, or of the last that was asked


cdef struct disk_t:
    layer_t** layers  # from the point's own layer down to the base
    uint32_t count
    uint64_t virtual_size  # bytes
    cache_t* cache
    const layer_t* past_end  # a layer of which a data cluster was found to lie past the end of its file


# The answer at `offset` for at most `length` bytes (both within the disk, length > 0). Returns 0, or -1 with `fault`.
cdef int disk_resolve(
    const disk_t* disk, uint64_t offset, uint64_t length, resolved_t* resolved, fault_t* fault) noexcept nogil

# Fill `buffer` with `length` bytes at `offset`, all within the disk. Returns 0, or -1 with `fault`.
cdef int disk_read(
    disk_t* disk, char* buffer, uint64_t offset, uint64_t length, fault_t* fault) noexcept nogil


cdef class Disk:
    cdef disk_t c
    cdef tuple layers  # of LayerMap, kept alive
    cdef Cache cache
    cdef bint warned  # of past_end

    cdef object extent_at(self, uint64_t offset, uint64_t length)
    cdef object read_fault(self, const fault_t* fault)
    cdef int warn_past_end(self) except -1

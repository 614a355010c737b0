# The chain's answer for a guest offset: which layer decides, and what it says.
#
# A point never changes, so what was found out is remembered for whole ranges: a warm answer for a chain of 40 layers
# costs one look into the cache, as for a single layer.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._cache cimport cache_t
from qcowfs._guard cimport guard_t
from qcowfs._tables cimport fault_t, layer_t, mapping_t


cdef struct resolved_t:  # the chain's answer; mapping_t is one layer's
    mapping_t mapping  # its length is the length of this answer
    layer_t* layer  # which layer decides; NULL: none, reads as zeros
    uint32_t number  # the place in disk_t.layers of the layer that decides, or of the last that was asked


cdef struct disk_t:
    layer_t** layers  # from the point's own layer down to the base
    uint32_t count
    uint32_t identity  # under which ranges are remembered; one number for each point of a cache
    uint32_t range_bits  # log2 of the bytes that are remembered together
    uint64_t virtual_size  # bytes
    cache_t* cache
    guard_t** guards  # each has to hold after a read
    uint32_t guard_count
    uint32_t past_end  # atomic; the depth, + 1, of a layer whose data was found to lie past the end of its file
    uint32_t warned  # atomic; 1: `past_end` was said
    uint32_t compressed  # atomic; 1: a compressed cluster was met


# The answer at `offset` for at most `length` bytes (both within the disk, length > 0). Returns 0, or -1 with `fault`.
cdef int disk_resolve(
    const disk_t* disk, uint64_t offset, uint64_t length, resolved_t* resolved, fault_t* fault) noexcept nogil

# The same without remembering it, and for longer ranges at once: for who asks only once, from the start to the end.
cdef int resolve_by_layers(
    const disk_t* disk, uint64_t offset, uint64_t length, resolved_t* resolved, fault_t* fault) noexcept nogil

# log2 of the bytes to remember together for these layers.
cdef uint32_t range_bits_of(layer_t** layers, uint32_t count) noexcept nogil

# Ask the guards, after the bytes were read. Returns 0, or -1 with `fault`.
cdef int disk_check(disk_t* disk, fault_t* fault) noexcept nogil

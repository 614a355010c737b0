# One layer in one state (an L1 table over a source): what does *this layer* say of a guest offset?
#
# guest offset: in the virtual disk; host offset: in the file. A mapping_t is this layer's answer; the answer of the
# whole chain is _core's resolved_t.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._cache cimport cache_t, entry_kind, entry_t
from qcowfs._source cimport Source, source_t


cdef enum mapping_type:
    UNALLOCATED  # ask the layer below
    ZERO  # zeros, nothing stored
    ZERO_ALLOCATED  # zeros, with a host cluster that must not be read
    NORMAL
    COMPRESSED


cdef enum rule_t:
    RULE_NONE
    RULE_L1_UNALIGNED
    RULE_L2_UNALIGNED
    RULE_SECTOR_UNALIGNED
    RULE_L1_PAST_END
    RULE_L2_PAST_END
    RULE_ZERO_IN_VERSION_2
    RULE_COMPRESSED_IN_DATA_FILE
    RULE_DATA_FILE_OFFSET
    RULE_SUBCLUSTER_BOTH
    RULE_SUBCLUSTER_WITHOUT_CLUSTER
    RULE_BAD_STREAM
    RULE_READ_FAILED
    RULE_REFCOUNT_PAST_END
    RULE_NO_MEMORY
    RULE_DELETED
    RULE_WRITTEN


cdef struct fault_t:
    rule_t rule
    int error  # errno
    uint32_t depth
    uint64_t guest_offset
    uint64_t host_offset  # of the table entry or the data that is wrong


cdef struct mapping_t:
    mapping_type type
    uint64_t length  # bytes from the guest offset on with this answer, > 0
    uint64_t host_offset  # NORMAL, ZERO_ALLOCATED: of the byte asked for; COMPRESSED: of the stream
    uint64_t host_length  # COMPRESSED: most bytes that the stream can have
    uint64_t descriptor  # COMPRESSED: names this stream within its source


cdef enum layer_kind:
    LAYER_RAW
    LAYER_QCOW1
    LAYER_QCOW2


cdef struct layer_t:
    layer_kind kind
    uint32_t depth
    uint64_t virtual_size  # bytes; a layer below reads as zeros past it
    const source_t* source  # the tables
    const source_t* data  # NORMAL clusters; the same, or the external data file
    uint32_t version  # qcow2: 2 or 3
    uint32_t cluster_bits
    uint32_t l2_bits  # log2 of the entries of one L2 table
    bint extended_l2
    bint external_data
    bint zstd
    uint64_t l1_offset
    uint64_t l1_entries


# This layer's answer at `offset` (which is within it), for at most `length` bytes. Returns 0, or -1 with `fault`.
cdef int layer_map(
    const layer_t* layer, cache_t* cache, uint64_t offset, uint64_t length,
    mapping_t* mapping, fault_t* fault) noexcept nogil

# Where the L2 table for `offset` is in the layer's source (0: there is none), and how far at most, `length` being cut
# down, that answer goes. Not of a raw layer. Returns 0, or -1 with `fault`'s rule, error and host offset.
cdef int layer_l2_table(
    const layer_t* layer, cache_t* cache, uint64_t offset, uint64_t* length, uint64_t* l2_offset,
    fault_t* fault) noexcept nogil

# log2 of the bytes that one answer covers: a subcluster with extended L2 entries, else a cluster. Not of a raw layer.
cdef uint32_t unit_bits(const layer_t* layer) noexcept nogil

# Fill in all of `fault`. Returns -1.
cdef int layer_fault(
    fault_t* fault, const layer_t* layer, rule_t rule, int error, uint64_t offset, uint64_t host_offset) noexcept nogil

# The slice of a table (or of the file's bytes) at `place`, through the cache; NULL with `fault`'s rule, error and
# host offset. The caller releases it.
cdef entry_t* table_slice(
    const source_t* source, cache_t* cache, entry_kind kind, uint64_t place, fault_t* fault) noexcept nogil

# Where the stream of a compressed cluster is: sets mapping's type, host_offset, host_length and descriptor.
cdef void parse_compressed(const layer_t* layer, uint64_t entry, mapping_t* mapping) noexcept nogil


cdef enum:
    SLICE_SIZE = 1024  # limits.TABLE_SLICE_SIZE
    SLICE_ENTRIES = 128


cdef enum:
    QCOW2_COMPRESSED_BIT = 62
    QCOW1_COMPRESSED_BIT = 63


cdef class LayerMap:
    cdef layer_t c
    cdef readonly Source source
    cdef readonly Source data

    cdef void use(self, layer_kind kind, Source source, Source data, uint32_t depth, uint64_t virtual_size)

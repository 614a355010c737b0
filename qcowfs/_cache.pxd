# One byte-budgeted cache for all that is costly to get: slices of L1/L2 tables and decompressed clusters.
#
# An entry is found by (kind, source, place). Who acquires an entry that was not there loads it and publishes it (or
# abandons it); whoever else wants it meanwhile waits, so that no slice is read and no cluster decompressed twice.
# An entry with references is never freed.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs.clib.pthread cimport pthread_cond_t, pthread_mutex_t


cdef enum entry_kind:
    KIND_TABLE  # big-endian u64 of a table, native in memory
    KIND_BYTES  # bytes of the file as they are (refcount blocks)
    KIND_CLUSTER  # a decompressed cluster; place is the whole descriptor
    KIND_RANGE  # what a whole chain says of a range of a disk; source is the disk's identity, place the range's number


cdef enum entry_state:
    STATE_LOADING
    STATE_READY
    STATE_FAILED


cdef struct entry_t:
    entry_t* chain  # next of the same bucket
    entry_t* newer  # neighbours in the order of use; only entries without references are in it
    entry_t* older
    uint64_t place
    uint32_t source
    entry_kind kind
    entry_state state
    uint32_t references
    int failure  # STATE_FAILED: the loader's word for it
    bint listed  # still found by acquire; else freed with the last reference
    uint64_t capacity  # bytes at payload
    uint64_t valid  # bytes of payload that were there to be loaded
    unsigned char* payload


cdef struct cache_t:
    pthread_mutex_t lock  # guards everything below and the bookkeeping of every entry, never held while loading
    pthread_cond_t settled  # some entry left STATE_LOADING
    entry_t** buckets
    uint64_t bucket_mask
    entry_t* newest
    entry_t* oldest
    uint64_t used  # bytes, bookkeeping included
    uint64_t budget  # bytes; entries with references may exceed it for a moment


# Find or make the entry, with one more reference; it is STATE_READY, STATE_FAILED, or STATE_LOADING if it is the
# caller's to load. NULL: no memory.
cdef entry_t* cache_acquire(
    cache_t* cache, entry_kind kind, uint32_t source, uint64_t place, uint64_t capacity) noexcept nogil
# Make the entry, if it is not there: it is the caller's to load. NULL: somebody has it already, or no memory.
cdef entry_t* cache_begin(
    cache_t* cache, entry_kind kind, uint32_t source, uint64_t place, uint64_t capacity) noexcept nogil
# Find an entry that is STATE_READY, with one more reference; NULL: there is none.
cdef entry_t* cache_find(cache_t* cache, entry_kind kind, uint32_t source, uint64_t place) noexcept nogil
cdef void cache_publish(cache_t* cache, entry_t* entry, uint64_t valid) noexcept nogil
cdef void cache_abandon(cache_t* cache, entry_t* entry, int failure) noexcept nogil
cdef void cache_release(cache_t* cache, entry_t* entry) noexcept nogil


cdef class Cache:
    cdef cache_t c

# One byte-budgeted cache for all that is costly to get: slices of L1/L2 tables, decompressed clusters, remote blocks.
#
# An entry is found by (kind, source, place). Who acquires an entry that was not there loads it and publishes it (or
# abandons it); whoever else wants it meanwhile waits, so that no slice is read and no cluster decompressed twice.
# An entry with references is never freed.
#
# There are two orders of use, as in 2Q (Johnson and Shasha, 1994), so that a scan does not throw out what is used all
# the time: an entry that is used again, some time after its first use, is kept, and those that were used once make
# room first, down to a quarter of the budget. A reader that goes through an entry in small steps uses it once.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs.clib.pthread cimport pthread_cond_t, pthread_mutex_t


cdef enum entry_kind:
    KIND_TABLE  # big-endian u64 of a table, native in memory
    KIND_BYTES  # bytes of the file as they are (refcount blocks)
    KIND_CLUSTER  # a decompressed cluster; place is the whole descriptor
    KIND_RANGE  # what a whole chain says of a range of a disk; source is the disk's identity, place the range's number
    KIND_BLOCK  # bytes of a remote source; place is the block's number
    KIND_PAGE  # the same, of a page that somebody wants without the block around it


cdef enum entry_state:
    STATE_LOADING
    STATE_READY
    STATE_FAILED


cdef struct entry_t:
    entry_t* chain  # next of the same bucket
    entry_t* newer  # neighbours in its order of use; only entries without references are in one
    entry_t* older
    uint64_t used_at  # the cache's `inserted` when it was used for the first time
    uint64_t place
    uint32_t source
    entry_kind kind
    entry_state state
    uint32_t references
    int failure  # STATE_FAILED: the loader's word for it
    bint used  # somebody asked for it, not only for its being loaded ahead
    bint kept  # in the order of those that were used again
    bint listed  # still found by acquire; else freed with the last reference
    uint64_t capacity  # bytes at payload
    uint64_t valid  # bytes of payload that were there to be loaded
    unsigned char* payload


cdef struct order_t:
    entry_t* newest
    entry_t* oldest


cdef struct cache_t:
    pthread_mutex_t lock  # guards everything below and the bookkeeping of every entry, never held while loading
    pthread_cond_t settled  # some entry left STATE_LOADING
    entry_t** buckets
    uint64_t bucket_mask
    order_t orders[2]  # by entry_t.kept
    uint64_t used  # bytes, bookkeeping included
    uint64_t kept  # of them, of entries that are kept
    uint64_t inserted  # bytes since the beginning: the clock by which "some time" is measured
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
# The same, without its counting as a use.
cdef entry_t* cache_peek(cache_t* cache, entry_kind kind, uint32_t source, uint64_t place) noexcept nogil
cdef void cache_publish(cache_t* cache, entry_t* entry, uint64_t valid) noexcept nogil
cdef void cache_abandon(cache_t* cache, entry_t* entry, int failure) noexcept nogil
cdef void cache_release(cache_t* cache, entry_t* entry) noexcept nogil
# Whoever asks from now on does not find what was cached or is being loaded of `source`.
cdef void cache_forget(cache_t* cache, uint32_t source) noexcept nogil


cdef class Cache:
    cdef cache_t c

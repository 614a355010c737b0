# cython: language_level=3, cdivision=True
"""A byte-budgeted cache, shared by all points of a mount, or by all remote sources.

Used by the compiled rooms only; Python makes one and hands it on. One mutex guards the bookkeeping and is never held
while anything is loaded; a second reader of an entry that is being loaded waits for it. Least recently used goes first,
but for what was used again and again.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from qcowfs.clib.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)

cdef enum:
    BYTES_PER_BUCKET = 1024  # the usual entry is a table slice of about that size: one entry a bucket when full
    AGAIN_SHARE = 16  # of the budget: so much was inserted between two uses that are not one reader's small steps
    PASSING_SHARE = 4  # of the budget: what was used once has so much even when all else was used again


cdef class Cache:
    """A cache of at most `budget` bytes (entries in use may exceed it for a moment)."""

    def __cinit__(self, uint64_t budget):
        cdef uint64_t buckets = 64
        while buckets * BYTES_PER_BUCKET < budget and buckets < 1 << 20:
            buckets *= 2
        self.c.buckets = <entry_t**>calloc(buckets, sizeof(entry_t*))
        if self.c.buckets == NULL:
            raise MemoryError()
        self.c.bucket_mask = buckets - 1
        self.c.budget = budget
        pthread_mutex_init(&self.c.lock, NULL)
        pthread_cond_init(&self.c.settled, NULL)

    def __dealloc__(self):
        if self.c.buckets == NULL:
            return
        # Whoever holds a reference to an entry holds one to this object too, so all entries are in an order of use.
        self.c.budget = 0
        shrink(&self.c)
        free(self.c.buckets)
        pthread_cond_destroy(&self.c.settled)
        pthread_mutex_destroy(&self.c.lock)

    @property
    def budget(self):
        """Bytes that the cache may hold."""
        return self.c.budget

    @property
    def used(self):
        """Bytes that the cache holds now."""
        cdef uint64_t used
        with nogil:
            pthread_mutex_lock(&self.c.lock)
            used = self.c.used
            pthread_mutex_unlock(&self.c.lock)
        return used


cdef entry_t* cache_acquire(
    cache_t* cache, entry_kind kind, uint32_t source, uint64_t place, uint64_t capacity) noexcept nogil:
    cdef entry_t* entry
    pthread_mutex_lock(&cache.lock)
    entry = find(cache, kind, source, place)
    if entry == NULL:
        entry = insert(cache, kind, source, place, capacity)
        if entry != NULL:
            touch(cache, entry)
    else:
        refer(cache, entry)
        touch(cache, entry)
        while entry.state == STATE_LOADING:
            pthread_cond_wait(&cache.settled, &cache.lock)
    pthread_mutex_unlock(&cache.lock)
    return entry


cdef entry_t* cache_begin(
    cache_t* cache, entry_kind kind, uint32_t source, uint64_t place, uint64_t capacity) noexcept nogil:
    cdef entry_t* entry = NULL
    pthread_mutex_lock(&cache.lock)
    if find(cache, kind, source, place) == NULL:
        entry = insert(cache, kind, source, place, capacity)
    pthread_mutex_unlock(&cache.lock)
    return entry


cdef entry_t* cache_find(cache_t* cache, entry_kind kind, uint32_t source, uint64_t place) noexcept nogil:
    return find_ready(cache, kind, source, place, True)


cdef entry_t* cache_peek(cache_t* cache, entry_kind kind, uint32_t source, uint64_t place) noexcept nogil:
    return find_ready(cache, kind, source, place, False)


cdef entry_t* find_ready(
    cache_t* cache, entry_kind kind, uint32_t source, uint64_t place, bint use) noexcept nogil:
    cdef entry_t* entry
    pthread_mutex_lock(&cache.lock)
    entry = find(cache, kind, source, place)
    if entry != NULL and entry.state != STATE_READY:
        entry = NULL
    if entry != NULL:
        refer(cache, entry)
        if use:
            touch(cache, entry)
    pthread_mutex_unlock(&cache.lock)
    return entry


cdef void cache_publish(cache_t* cache, entry_t* entry, uint64_t valid) noexcept nogil:
    pthread_mutex_lock(&cache.lock)
    entry.valid = valid
    entry.state = STATE_READY
    pthread_cond_broadcast(&cache.settled)
    pthread_mutex_unlock(&cache.lock)


cdef void cache_abandon(cache_t* cache, entry_t* entry, int failure) noexcept nogil:
    # A failure is not remembered: the next reader tries again, those who wait now learn of it.
    pthread_mutex_lock(&cache.lock)
    entry.failure = failure
    entry.state = STATE_FAILED
    if entry.listed:  # else it was forgotten meanwhile
        unlink_bucket(cache, entry)
    pthread_cond_broadcast(&cache.settled)
    pthread_mutex_unlock(&cache.lock)


cdef void cache_release(cache_t* cache, entry_t* entry) noexcept nogil:
    pthread_mutex_lock(&cache.lock)
    entry.references -= 1
    if entry.references == 0:
        if entry.listed:
            link_use(cache, entry)
            shrink(cache)
        else:
            discard(cache, entry)
    pthread_mutex_unlock(&cache.lock)


cdef void cache_forget(cache_t* cache, uint32_t source) noexcept nogil:
    cdef uint64_t bucket
    cdef entry_t* entry
    cdef entry_t* next_one
    pthread_mutex_lock(&cache.lock)
    for bucket in range(cache.bucket_mask + 1):
        entry = cache.buckets[bucket]
        while entry != NULL:
            next_one = entry.chain
            if entry.source == source:
                unlink_bucket(cache, entry)
                if entry.references == 0:
                    unlink_use(cache, entry)
                    discard(cache, entry)
            entry = next_one
    pthread_mutex_unlock(&cache.lock)


cdef inline uint64_t bucket_of(
    const cache_t* cache, entry_kind kind, uint32_t source, uint64_t place) noexcept nogil:
    # Places are multiples of large powers of two: the multiplication spreads them, its high half is used.
    cdef uint64_t mixed = (place ^ (<uint64_t>source << 40) ^ (<uint64_t>kind << 60)) * <uint64_t>0x9E3779B97F4A7C15
    return (mixed >> 32) & cache.bucket_mask


cdef entry_t* find(cache_t* cache, entry_kind kind, uint32_t source, uint64_t place) noexcept nogil:
    cdef entry_t* entry = cache.buckets[bucket_of(cache, kind, source, place)]
    while entry != NULL:
        if entry.place == place and entry.source == source and entry.kind == kind:
            return entry
        entry = entry.chain
    return NULL


cdef inline void refer(cache_t* cache, entry_t* entry) noexcept nogil:
    if entry.references == 0:
        unlink_use(cache, entry)
    entry.references += 1


cdef inline void touch(cache_t* cache, entry_t* entry) noexcept nogil:
    """Somebody uses the entry, which has a reference and is in no order."""
    if not entry.used:
        entry.used = True
        entry.used_at = cache.inserted
    elif not entry.kept and cache.inserted - entry.used_at > cache.budget // AGAIN_SHARE:
        entry.kept = True
        cache.kept += sizeof(entry_t) + entry.capacity


cdef entry_t* insert(
    cache_t* cache, entry_kind kind, uint32_t source, uint64_t place, uint64_t capacity) noexcept nogil:
    cdef entry_t** bucket = &cache.buckets[bucket_of(cache, kind, source, place)]
    cdef entry_t* entry = <entry_t*>malloc(sizeof(entry_t) + capacity)
    if entry == NULL:
        return NULL
    entry.place = place
    entry.source = source
    entry.kind = kind
    entry.state = STATE_LOADING
    entry.references = 1
    entry.failure = 0
    entry.used = entry.kept = False
    entry.used_at = 0
    entry.listed = True
    entry.capacity = capacity
    entry.valid = 0
    entry.payload = <unsigned char*>entry + sizeof(entry_t)
    entry.newer = entry.older = NULL
    entry.chain = bucket[0]
    bucket[0] = entry
    cache.used += sizeof(entry_t) + capacity
    cache.inserted += sizeof(entry_t) + capacity
    shrink(cache)
    return entry


cdef void unlink_bucket(cache_t* cache, entry_t* entry) noexcept nogil:
    cdef entry_t** link = &cache.buckets[bucket_of(cache, entry.kind, entry.source, entry.place)]
    while link[0] != entry:
        link = &link[0].chain
    link[0] = entry.chain
    entry.listed = False


cdef void link_use(cache_t* cache, entry_t* entry) noexcept nogil:
    cdef order_t* order = &cache.orders[entry.kept]
    entry.newer = NULL
    entry.older = order.newest
    if order.newest != NULL:
        order.newest.newer = entry
    else:
        order.oldest = entry
    order.newest = entry


cdef void unlink_use(cache_t* cache, entry_t* entry) noexcept nogil:
    cdef order_t* order = &cache.orders[entry.kept]
    if entry.newer != NULL:
        entry.newer.older = entry.older
    else:
        order.newest = entry.older
    if entry.older != NULL:
        entry.older.newer = entry.newer
    else:
        order.oldest = entry.newer
    entry.newer = entry.older = NULL


cdef void discard(cache_t* cache, entry_t* entry) noexcept nogil:
    cache.used -= sizeof(entry_t) + entry.capacity
    if entry.kept:
        cache.kept -= sizeof(entry_t) + entry.capacity
    free(entry)


cdef void shrink(cache_t* cache) noexcept nogil:
    cdef entry_t* entry
    cdef bint from_kept
    while cache.used > cache.budget:
        from_kept = cache.used - cache.kept <= cache.budget // PASSING_SHARE
        entry = cache.orders[from_kept].oldest
        if entry == NULL:
            entry = cache.orders[not from_kept].oldest
        if entry == NULL:
            return  # all are in use
        unlink_use(cache, entry)
        unlink_bucket(cache, entry)
        discard(cache, entry)

# cython: language_level=3, cdivision=True
"""The cache that stands before every remote source: aligned blocks, read ahead, in memory and in a directory.

Used by chain, which puts a BlockSource around what a protocol's room opened. Reads run without the GIL, from any number
of threads at once. A block is fetched by the first who wants it, reader or helper; others wait for it. A helper only
does earlier what the reader would do, so nobody depends on there being one. docs/decisions/0010-block-cache.md.
"""

import threading

from cython cimport no_gc_clear
from libc.errno cimport EAGAIN, EBADF, EIO, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, nanosleep, timespec

from qcowfs._blockfile cimport BLOCK, blockfile_read, blockfile_write
from qcowfs._cache cimport (
    KIND_BLOCK, STATE_FAILED, STATE_LOADING, STATE_READY, Cache, cache_abandon, cache_acquire, cache_begin, cache_find,
    cache_forget, cache_peek, cache_publish, cache_release, entry_t,
)
from qcowfs._pool cimport MOST_THREADS, pool_add, pool_destroy, pool_drain, pool_init, pool_stop
from qcowfs._source cimport Source, source_t
from qcowfs._statuses cimport statuses_ask, statuses_destroy, statuses_forget, statuses_init
from qcowfs._streams cimport streams_destroy, streams_follow, streams_init
from qcowfs.clib.atomic cimport (
    atomic_add, atomic_add_64, atomic_load, atomic_load_64, atomic_store, atomic_subtract,
)

cdef enum:
    AHEAD_SHARE = 4  # of the budget: what all readers together are read ahead; the cache never gives less to it
    QUICK_NS = 2000000000  # a failure that came sooner is of some block, and not a server that does not answer
    WAIT_NS = 1000000  # between two looks whether the last reader has gone


cdef class BlockCache:
    """Memory for blocks of all remote sources of a process: `budget` bytes, and 1 MiB for each request on its way."""

    def __init__(self, uint64_t budget):
        self.cache = Cache(budget)
        self.lock = threading.Lock()
        self.c.cache = &self.cache.c
        streams_init(&self.c.streams, BLOCK, budget // AHEAD_SHARE)
        pool_init(&self.c.fetchers, MOST_THREADS)
        pool_init(&self.c.writer, 1)

    def __dealloc__(self):
        if self.c.cache != NULL:  # each source has a reference to this, so none is open
            with nogil:
                pool_destroy(&self.c.fetchers)
                pool_destroy(&self.c.writer)
            streams_destroy(&self.c.streams)

    @property
    def budget(self):
        """Bytes that the blocks may take."""
        return self.cache.budget

    @property
    def used(self):
        """Bytes that they take now."""
        return self.cache.used

    def statistics(self):
        """Return what was counted since the beginning.

        `requests` and `fetched` (bytes) of the sources behind; `hits` and `misses`, blocks that a reader wanted; and
        `restored`, blocks that came out of a directory.
        """
        return {
            "requests": atomic_load_64(&self.c.requests),
            "fetched": atomic_load_64(&self.c.fetched),
            "hits": atomic_load_64(&self.c.hits),
            "misses": atomic_load_64(&self.c.misses),
            "restored": atomic_load_64(&self.c.restored),
        }


@no_gc_clear
cdef class BlockSource(Source):
    """`base` behind a cache.

    What has no `version` may be written while it is read. Its blocks are right for everything that was frozen when they
    were fetched, and stay until `forget`, which whoever reads the tables anew calls after that and before anything of
    them is used; the tables themselves are read through `uncached`.

    Args:
        cache: shared by all sources of a process.
        base: belongs to this object once it is made.
        directory: keeps blocks from one mount to the next; None: nothing does. Used only with a version.
        version: what another content of the same size would change.

    Raises:
        OSError: the length of the base cannot be had.
    """

    def __cinit__(self, *args, **kwargs):
        statuses_init(&self.blocks.statuses)

    def __init__(self, BlockCache cache not None, Source base not None, *, directory=None, version=None):
        self.blocks.size = base.size
        self.name = base.name
        self.base = base
        self.cache = cache
        self.blocks.shared = &cache.c
        self.blocks.base = &base.c
        self.blocks.identity = self.c.identity
        if directory is not None and version is not None:
            self.directory = directory
            self.kept = directory.open_blocks((base.name, base.place(), version), self.blocks.size)
        self.blocks.kept = &self.kept.c if self.kept is not None else NULL
        self.blocks.owner = <void*>self
        self.c.state = &self.blocks
        self.c.pread = blocks_pread
        self.c.status = blocks_status
        self.c.end = blocks_end
        with cache.lock:
            cache.sources += 1
        self.open = True

    def place(self):
        return self.base.place()

    def uncached(self):
        return self.base

    def forget(self):
        """Drop what is cached in memory; also what is on its way is not kept. A directory's blocks never change."""
        with nogil:
            statuses_forget(&self.blocks.statuses)
            cache_forget(self.blocks.shared.cache, self.blocks.identity)

    def close(self):
        """Make reads that wait fail, close the base, and write what is still to be kept."""
        if not self.open:
            return
        self.open = False
        atomic_store(&self.blocks.closing, 1)
        try:
            self.base.close()
        finally:
            with nogil:
                finish(&self.blocks)
            if self.kept is not None:
                self.kept.close()
            leave(self.cache)

    def __dealloc__(self):
        if self.open:
            atomic_store(&self.blocks.closing, 1)
            with nogil:
                finish(&self.blocks)
            leave(self.cache)
        statuses_destroy(&self.blocks.statuses)


cdef void finish(blocks_t* blocks) noexcept nogil:
    cdef timespec pause
    pause.tv_sec = 0
    pause.tv_nsec = WAIT_NS
    pool_drain(&blocks.shared.fetchers, blocks, False)
    while atomic_load(&blocks.readers):
        nanosleep(&pause, NULL)
    pool_drain(&blocks.shared.writer, blocks, True)
    cache_forget(blocks.shared.cache, blocks.identity)


cdef int leave(BlockCache cache) except -1:
    with cache.lock:
        cache.sources -= 1
        if cache.sources == 0:
            with nogil:
                pool_stop(&cache.c.fetchers)
                pool_stop(&cache.c.writer)
    return 0


cdef int64_t blocks_pread(const source_t* source, void* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    cdef blocks_t* blocks = <blocks_t*>source.state
    cdef int64_t got
    if offset >= blocks.size:
        return 0
    atomic_add(&blocks.readers, 1)
    if atomic_load(&blocks.closing):
        got = -EBADF
    else:
        got = read_all(blocks, <unsigned char*>buffer, min(length, blocks.size - offset), offset)
    atomic_subtract(&blocks.readers, 1)
    return got


cdef int blocks_status(const source_t* source, uint64_t offset, uint64_t* length) noexcept nogil:
    cdef blocks_t* blocks = <blocks_t*>source.state
    return statuses_ask(&blocks.statuses, blocks.base, blocks.size, offset, length)


cdef int64_t blocks_end(const source_t* source) noexcept nogil:
    return <int64_t>(<blocks_t*>source.state).size


cdef int64_t read_all(blocks_t* blocks, unsigned char* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    cdef uint64_t end = offset + length
    cdef uint64_t done = 0
    cdef uint64_t piece
    cdef uint64_t start
    cdef uint64_t upto
    cdef bint spread = False
    cdef int failure
    if streams_follow(&blocks.shared.streams, blocks.identity, offset, end, blocks.size, &start, &upto):
        hand_out(blocks, start // BLOCK, (upto - 1) // BLOCK, False)
    while done < length:
        piece = min(BLOCK - (offset + done) % BLOCK, length - done)
        failure = read_piece(blocks, buffer + done, piece, offset + done, end, &spread)
        if failure:
            return -failure
        done += piece
    return <int64_t>length


cdef int read_piece(
    blocks_t* blocks, unsigned char* buffer, uint64_t length, uint64_t offset, uint64_t end,
    bint* spread) noexcept nogil:
    """Read what is wanted of one block. `end` is that of the whole read. Returns 0 or an errno."""
    cdef shared_t* shared = blocks.shared
    cdef uint64_t number = offset // BLOCK
    cdef entry_t* entry = cache_find(shared.cache, KIND_BLOCK, blocks.identity, number)
    cdef timespec begin
    cdef int failure
    if entry != NULL:
        atomic_add_64(&shared.hits, 1)
    else:
        clock_gettime(CLOCK_MONOTONIC, &begin)
        entry = cache_acquire(shared.cache, KIND_BLOCK, blocks.identity, number, BLOCK)
        if entry == NULL:
            return read_directly(blocks, buffer, length, offset)
        if entry.state == STATE_LOADING:
            atomic_add_64(&shared.misses, 1)
            if not spread[0]:
                spread[0] = True
                hand_out(blocks, number + RUN, (end - 1) // BLOCK, True)
            load(blocks, entry, number, (end - 1) // BLOCK)
        else:
            atomic_add_64(&shared.hits, 1)
    failure = entry.failure if entry.state == STATE_FAILED else 0
    if not failure:
        memcpy(buffer, entry.payload + offset % BLOCK, length)
    cache_release(shared.cache, entry)
    if failure and is_quick(&begin) and not atomic_load(&blocks.closing):
        # The request was for more than this reader wants, and one bad sector of it is no reason to refuse the rest.
        return read_directly(blocks, buffer, length, offset)
    return failure


cdef int read_directly(blocks_t* blocks, unsigned char* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    cdef int64_t got = ask(blocks, buffer, length, offset)
    return <int>-got if got < 0 else 0


cdef bint is_quick(const timespec* begin) noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return (now.tv_sec - begin.tv_sec) * 1000000000 + now.tv_nsec - begin.tv_nsec < QUICK_NS


cdef void hand_out(blocks_t* blocks, uint64_t first, uint64_t last, bint urgent) noexcept nogil:
    """Have helpers load blocks `first` to `last`, a request each; what is there already costs nothing."""
    cdef uint64_t requests
    cdef uint64_t number
    cdef uint64_t start
    if first > last:
        return
    requests = min((last - first) // RUN + 1, <uint64_t>MOST_THREADS)
    for number in range(requests):
        start = first + (requests - 1 - number if urgent else number) * RUN  # each urgent one goes before the last one
        if not pool_add(&blocks.shared.fetchers, help, blocks, start, min(start + RUN - 1, last), urgent):
            return


cdef void help(void* owner, uint64_t first, uint64_t last) noexcept nogil:
    cdef blocks_t* blocks = <blocks_t*>owner
    cdef entry_t* entry
    while first <= last and not atomic_load(&blocks.closing):
        entry = cache_begin(blocks.shared.cache, KIND_BLOCK, blocks.identity, first, BLOCK)
        if entry == NULL:
            first += 1
            continue
        first += load(blocks, entry, first, last)
        cache_release(blocks.shared.cache, entry)


cdef uint64_t load(blocks_t* blocks, entry_t* entry, uint64_t number, uint64_t last) noexcept nogil:
    """Load `entry`, which is block `number`, with those after it up to `last` that nobody has; returns how many."""
    cdef entry_t* entries[RUN]
    cdef uint64_t count = 1
    cdef uint64_t place
    cdef uint64_t start
    entries[0] = entry
    while count < RUN and number + count <= last:
        entries[count] = cache_begin(blocks.shared.cache, KIND_BLOCK, blocks.identity, number + count, BLOCK)
        if entries[count] == NULL:
            break
        count += 1
    if blocks.kept != NULL:
        for place in range(count):
            restore(blocks, entries[place], number + place)
    start = 0
    while start < count:
        place = start
        while place < count and entries[place].state == STATE_LOADING:
            place += 1
        if place > start:
            fetch(blocks, entries + start, number + start, place - start)
        start = place + 1
    for place in range(1, count):
        cache_release(blocks.shared.cache, entries[place])
    return count


cdef inline uint64_t length_of(const blocks_t* blocks, uint64_t number, uint64_t count) noexcept nogil:
    return min(count * BLOCK, blocks.size - number * BLOCK)


cdef void restore(blocks_t* blocks, entry_t* entry, uint64_t number) noexcept nogil:
    cdef uint64_t length = length_of(blocks, number, 1)
    if blockfile_read(blocks.kept, number, entry.payload, length):
        cache_publish(blocks.shared.cache, entry, length)
        atomic_add_64(&blocks.shared.restored, 1)


cdef void fetch(blocks_t* blocks, entry_t** entries, uint64_t number, uint64_t count) noexcept nogil:
    cdef uint64_t length = length_of(blocks, number, count)
    cdef unsigned char* buffer = entries[0].payload if count == 1 else <unsigned char*>malloc(length)
    cdef int64_t got = -ENOMEM
    cdef uint64_t place
    cdef uint64_t valid
    if buffer != NULL:
        got = ask(blocks, buffer, length, number * BLOCK)
    for place in range(count):
        if got < 0:
            cache_abandon(blocks.shared.cache, entries[place], <int>-got)
            continue
        valid = length_of(blocks, number + place, 1)
        if count > 1:
            memcpy(entries[place].payload, buffer + place * BLOCK, valid)
        cache_publish(blocks.shared.cache, entries[place], valid)
    if count > 1:
        free(buffer)
    if got >= 0 and blocks.kept != NULL and not atomic_load(&blocks.kept.allowance.stopped):
        pool_add(&blocks.shared.writer, keep, blocks, number, number + count - 1, False)


cdef int64_t ask(blocks_t* blocks, unsigned char* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    """Read from the base: all of it, or -errno."""
    cdef int64_t got = blocks.base.pread(blocks.base, buffer, length, offset)
    atomic_add_64(&blocks.shared.requests, 1)
    if got >= 0:
        atomic_add_64(&blocks.shared.fetched, <uint64_t>got)
        if <uint64_t>got != length:
            return -EIO  # it became shorter than it was
    return got


cdef void keep(void* owner, uint64_t first, uint64_t last) noexcept nogil:
    """Write blocks to the directory, if they are still in memory."""
    cdef blocks_t* blocks = <blocks_t*>owner
    cdef uint64_t number
    cdef entry_t* entry
    for number in range(first, last + 1):
        entry = cache_peek(blocks.shared.cache, KIND_BLOCK, blocks.identity, number)
        if entry != NULL:
            write(blocks, number, entry)
            cache_release(blocks.shared.cache, entry)


cdef void write(blocks_t* blocks, uint64_t number, const entry_t* entry) noexcept nogil:
    cdef int failure
    if atomic_load(&blocks.kept.allowance.stopped):
        return
    failure = blockfile_write(blocks.kept, number, entry.payload, entry.valid)
    if failure == EAGAIN:
        tidy(blocks.owner)
        failure = blockfile_write(blocks.kept, number, entry.payload, entry.valid)
    if failure and failure != EAGAIN:
        give_up(blocks.owner, failure)


cdef void tidy(void* owner) noexcept with gil:
    (<BlockSource>owner).directory.tidy()


cdef void give_up(void* owner, int failure) noexcept with gil:
    (<BlockSource>owner).directory.give_up(failure)

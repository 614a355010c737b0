# cython: language_level=3, cdivision=True
"""The cache that stands before every remote source: aligned blocks, read ahead, in memory and in a directory.

Used by chain, which puts a BlockSource around what a protocol's room opened; `_blockread` does the reading. Opening and
closing: any thread. docs/decisions/0010-block-cache.md has the reasons.
"""

import threading

from cython cimport no_gc_clear
from libc.stdint cimport uint64_t
from libc.stdlib cimport free

from qcowfs._blockfile cimport BLOCK
from qcowfs._blockread cimport blocks_end, blocks_finish, blocks_pread, blocks_status
from qcowfs._cache cimport Cache, cache_forget
from qcowfs._pool cimport MOST_THREADS, pool_destroy, pool_init, pool_stop
from qcowfs._source cimport Source
from qcowfs._spares cimport spares_destroy, spares_init, spares_t, spares_take
from qcowfs._statuses cimport statuses_destroy, statuses_forget, statuses_init
from qcowfs._streams cimport streams_destroy, streams_init
from qcowfs.clib.atomic cimport atomic_load_64, atomic_store

cdef enum:
    AHEAD_SHARE = 4  # of the budget: what all readers together are read ahead; the cache never gives less to it


@no_gc_clear  # sources use all of it until they are gone themselves
cdef class BlockCache:
    """Memory for blocks of all remote sources of a process: `budget` bytes, and 1 MiB for each request on its way."""

    def __init__(self, uint64_t budget):
        self.cache = Cache(budget)
        self.lock = threading.Lock()
        self.c.cache = &self.cache.c
        streams_init(&self.c.streams, BLOCK, budget // AHEAD_SHARE)
        spares_init(&self.c.runs)
        pool_init(&self.c.fetchers, MOST_THREADS)
        pool_init(&self.c.writer, 1)

    def __dealloc__(self):
        if self.c.cache != NULL:  # each source has a reference to this, so none is open
            with nogil:
                pool_destroy(&self.c.fetchers)
                pool_destroy(&self.c.writer)
            free_all(&self.c.runs)
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


@no_gc_clear  # helpers may be reading from the base
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
        near: the way to its server is short beside the time that a block takes on it, so that whoever reads at random
            gets pages. Of what is kept in a directory all blocks are whole.

        patience: seconds that a read of the base takes if nobody answers; for some time after that reads of what is not
            here fail at once, since a person's `ls` may read at dozens of places. 0: every read waits.

    Raises:
        OSError: the length of the base cannot be had.
    """

    def __cinit__(self, *args, **kwargs):
        statuses_init(&self.blocks.statuses)

    def __init__(
            self, BlockCache cache not None, Source base not None, *, directory=None, version=None, bint near=False,
            double patience=0.0):
        self.blocks.size = base.size
        self.name = base.name
        self.base = base
        self.cache = cache
        self.blocks.shared = &cache.c
        self.blocks.base = &base.c
        self.blocks.identity = self.c.identity
        if directory is not None and version is not None:
            self.directory = directory
            self.blocks.directory = <void*>directory
            self.kept = directory.open_blocks((base.name, base.place(), version), self.blocks.size)
        self.blocks.kept = &self.kept.c if self.kept is not None else NULL
        self.blocks.near = near and self.kept is None
        self.blocks.patience_ns = <uint64_t>(patience * 1000000000)
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
                blocks_finish(&self.blocks)
            if self.kept is not None:
                self.kept.close()
            leave(self.cache)

    def __dealloc__(self):
        if self.open:
            atomic_store(&self.blocks.closing, 1)
            with nogil:
                blocks_finish(&self.blocks)
            leave(self.cache)
        statuses_destroy(&self.blocks.statuses)


cdef void free_all(spares_t* spares) noexcept:
    cdef void* spare = spares_take(spares)
    while spare != NULL:
        free(spare)
        spare = spares_take(spares)
    spares_destroy(spares)


cdef int leave(BlockCache cache) except -1:
    with cache.lock:
        cache.sources -= 1
        if cache.sources == 0:
            with nogil:
                pool_stop(&cache.c.fetchers)
                pool_stop(&cache.c.writer)
    return 0

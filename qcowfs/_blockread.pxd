# Reading a remote source block by block: out of memory, out of a file, or from the server.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs._blockfile cimport blockfile_t
from qcowfs._cache cimport cache_t
from qcowfs._pool cimport pool_t
from qcowfs._source cimport source_t
from qcowfs._spares cimport spares_t
from qcowfs._statuses cimport statuses_t
from qcowfs._streams cimport streams_t

cdef enum:
    RUN = 16  # blocks that are asked for at once: 1 MiB
    TOUCHED = 256  # blocks that are remembered for having been touched: what is read at random passes by soon


cdef struct shared_t:
    cache_t* cache
    pool_t fetchers
    pool_t writer  # of one thread: the disk is written by nobody who has a reader waiting
    streams_t streams
    spares_t runs  # room for RUN blocks each
    uint64_t requests  # atomic, like all of these: asked of the sources behind
    uint64_t fetched  # bytes that they gave
    uint64_t hits  # blocks that were in memory, or on their way, when a reader wanted them
    uint64_t misses  # blocks that were not
    uint64_t restored  # blocks that a file of the directory gave


cdef struct blocks_t:
    shared_t* shared
    const source_t* base
    uint32_t identity  # of the BlockSource
    uint64_t size  # of the base when it was opened
    const blockfile_t* kept  # where blocks are kept on disk; NULL: nowhere
    bint near  # to ask for a page is cheaper than to ask for a block; never with `kept`
    uint64_t touched[TOUCHED]  # atomic, by its number: the last block of which a page was asked for, + 1
    uint64_t patience_ns  # so long takes a read of the base if nobody answers; 0: nobody knows
    uint64_t silent_until  # atomic: until this time nobody is asked again; 0: somebody answered
    void* directory  # the CacheDirectory, borrowed from the BlockSource
    statuses_t statuses
    uint32_t readers  # atomic: reads that are under way
    uint32_t closing  # atomic


# The vtable of a source_t whose `state` is a blocks_t.
cdef int64_t blocks_pread(const source_t* source, void* buffer, uint64_t length, uint64_t offset) noexcept nogil
cdef int blocks_status(const source_t* source, uint64_t offset, uint64_t* length) noexcept nogil
cdef int64_t blocks_end(const source_t* source) noexcept nogil
# After `closing` was set, and the base told to let go of reads that wait: return when nobody uses `blocks` any more.
cdef void blocks_finish(blocks_t* blocks) noexcept nogil

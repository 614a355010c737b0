# Blocks of remote sources, cached in memory and in a directory, and read ahead.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._blockfile cimport BlockFile, blockfile_t
from qcowfs._cache cimport Cache, cache_t
from qcowfs._pool cimport pool_t
from qcowfs._source cimport Source, source_t
from qcowfs._statuses cimport statuses_t
from qcowfs._streams cimport streams_t

cdef enum:
    RUN = 16  # blocks that are asked for at once: 1 MiB


cdef struct shared_t:
    cache_t* cache
    pool_t fetchers
    pool_t writer  # of one thread: the disk is written by nobody who has a reader waiting
    streams_t streams
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
    void* owner  # the BlockSource
    statuses_t statuses
    uint32_t readers  # atomic: reads that are under way
    uint32_t closing  # atomic


cdef class BlockCache:
    cdef shared_t c
    cdef Cache cache
    cdef object lock  # guards `sources`, and the pools' end; a threading.Lock
    cdef uint32_t sources  # that are open


cdef class BlockSource(Source):
    cdef blocks_t blocks
    cdef BlockCache cache
    cdef Source base
    cdef BlockFile kept
    cdef object directory
    cdef bint open

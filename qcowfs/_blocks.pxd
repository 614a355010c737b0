# The cache that stands before every remote source, for Python.

from libc.stdint cimport uint32_t

from qcowfs._blockfile cimport BlockFile
from qcowfs._blockread cimport blocks_t, shared_t
from qcowfs._cache cimport Cache
from qcowfs._source cimport Source


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

# endian.h

from libc.stdint cimport uint32_t, uint64_t

cdef extern from "<endian.h>" nogil:
    uint64_t be64toh(uint64_t value)
    uint32_t be32toh(uint32_t value)
    # ...

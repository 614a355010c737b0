# Buffers of one size that are used again and again, by any thread.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs.clib.pthread cimport pthread_mutex_t

cdef enum:
    MOST_KEPT = 8  # what more threads than that need at once is allocated, and given back


cdef struct buffers_t:
    pthread_mutex_t lock  # guards the two below
    uint32_t count
    void* kept[MOST_KEPT]
    uint64_t size  # bytes of each


cdef void buffers_init(buffers_t* buffers, uint64_t size) noexcept nogil
cdef void buffers_destroy(buffers_t* buffers) noexcept nogil  # all of them were given back
cdef void* buffers_take(buffers_t* buffers) noexcept nogil  # NULL: there is no memory
cdef void buffers_give(buffers_t* buffers, void* buffer) noexcept nogil

# What was used, and is kept for the next one who needs such a thing; by any thread.

from libc.stdint cimport uint32_t

from qcowfs.clib.pthread cimport pthread_mutex_t

cdef enum:
    MOST_KEPT = 8  # more threads than this at once make and free their own


cdef struct spares_t:
    pthread_mutex_t lock  # guards the two below
    uint32_t count
    void* kept[MOST_KEPT]


cdef void spares_init(spares_t* spares) noexcept nogil
cdef void spares_destroy(spares_t* spares) noexcept nogil  # all of them were taken
cdef void* spares_take(spares_t* spares) noexcept nogil  # NULL: there is none, and the caller makes one
cdef bint spares_give(spares_t* spares, void* spare) noexcept nogil  # False: there is no room, and the caller frees it

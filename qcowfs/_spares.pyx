# cython: language_level=3, cdivision=True
"""Spares: buffers and contexts of libraries that are used again and again, because making them is dear.

Used by `_codec` and `_blockread`. What they are is the business of those. No Python; any thread.
"""

from qcowfs.clib.pthread cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock


cdef void spares_init(spares_t* spares) noexcept nogil:
    pthread_mutex_init(&spares.lock, NULL)
    spares.count = 0


cdef void spares_destroy(spares_t* spares) noexcept nogil:
    pthread_mutex_destroy(&spares.lock)


cdef void* spares_take(spares_t* spares) noexcept nogil:
    cdef void* spare = NULL
    pthread_mutex_lock(&spares.lock)
    if spares.count:
        spares.count -= 1
        spare = spares.kept[spares.count]  # the last one that was used: it may still be in a processor's cache
    pthread_mutex_unlock(&spares.lock)
    return spare


cdef bint spares_give(spares_t* spares, void* spare) noexcept nogil:
    cdef bint kept = False
    pthread_mutex_lock(&spares.lock)
    if spares.count < MOST_KEPT:
        spares.kept[spares.count] = spare
        spares.count += 1
        kept = True
    pthread_mutex_unlock(&spares.lock)
    return kept

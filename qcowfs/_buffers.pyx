# cython: language_level=3, cdivision=True
"""Buffers that are used again and again.

Used by `_blockread`, for what comes from a server. malloc(3) gives 1 MiB that was freed back to the kernel, which hands
out 256 pages anew, each zeroed, for the next one: a tenth of what reading 1 MiB costs. No Python; any thread.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from qcowfs.clib.pthread cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock


cdef void buffers_init(buffers_t* buffers, uint64_t size) noexcept nogil:
    pthread_mutex_init(&buffers.lock, NULL)
    buffers.count = 0
    buffers.size = size


cdef void buffers_destroy(buffers_t* buffers) noexcept nogil:
    cdef uint32_t number
    for number in range(buffers.count):
        free(buffers.kept[number])
    pthread_mutex_destroy(&buffers.lock)


cdef void* buffers_take(buffers_t* buffers) noexcept nogil:
    cdef void* buffer = NULL
    pthread_mutex_lock(&buffers.lock)
    if buffers.count:
        buffers.count -= 1
        buffer = buffers.kept[buffers.count]  # the last one that was used: it may still be in a processor's cache
    pthread_mutex_unlock(&buffers.lock)
    return malloc(buffers.size) if buffer == NULL else buffer


cdef void buffers_give(buffers_t* buffers, void* buffer) noexcept nogil:
    pthread_mutex_lock(&buffers.lock)
    if buffers.count < MOST_KEPT:
        buffers.kept[buffers.count] = buffer
        buffers.count += 1
        buffer = NULL
    pthread_mutex_unlock(&buffers.lock)
    free(buffer)

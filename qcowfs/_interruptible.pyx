# cython: language_level=3, cdivision=True
"""Reads that Ctrl-C can interrupt, whatever they wait for.

Used by `_blockread`, for the main thread only: Python runs signal handlers nowhere else, and not while it waits in C. A
read that nobody waits for any more goes on by itself, into memory of its own.
"""

from libc.errno cimport EINTR
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from qcowfs._pool cimport pool_add, pool_t
from qcowfs.clib.atomic cimport atomic_subtract
from qcowfs.clib.pthread cimport (
    pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_t, pthread_cond_timedwait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_t, pthread_mutex_unlock,
)

cdef extern from *:
    """
    #include <sys/syscall.h>
    #include <unistd.h>

    /* Asked once a thread: two system calls for each read would cost as much as the read. */
    static int qcowfs_in_main_thread(void)
    {
        static __thread int known;

        if (!known)
            known = syscall(SYS_gettid) == getpid() ? 1 : 2;
        return known == 1;
    }
    """
    bint qcowfs_in_main_thread() noexcept nogil

cdef extern from "Python.h":
    int PyOS_InterruptOccurred()
    void PyErr_SetInterrupt()

cdef enum:
    LOOK_NS = 100000000  # between two looks for a signal


cdef struct order_t:
    pthread_mutex_t lock  # guards `done` and `got`
    pthread_cond_t ended
    uint32_t references  # atomic: of who waits, and of the helper
    bint done
    int64_t got
    read_t read
    void* owner
    uint64_t offset
    uint64_t length
    unsigned char buffer[0]


cdef bint in_main_thread() noexcept nogil:
    return qcowfs_in_main_thread()


cdef int64_t read_interruptibly(
    pool_t* pool, read_t read, void* owner, void* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    cdef order_t* order = <order_t*>calloc(1, sizeof(order_t) + length)
    cdef int64_t got
    if order == NULL:
        return read(owner, buffer, length, offset)
    pthread_mutex_init(&order.lock, NULL)
    pthread_cond_init(&order.ended, NULL)
    order.references = 2
    order.read = read
    order.owner = owner
    order.offset = offset
    order.length = length
    if pool_add(pool, carry_out, owner, <uint64_t>order, 0, True):
        got = wait_for(order)
        if got > 0:
            memcpy(buffer, order.buffer, <uint64_t>got)
    else:
        got = read(owner, buffer, length, offset)
        put_back(order)
    put_back(order)
    return got


cdef void carry_out(void* owner, uint64_t first, uint64_t last) noexcept nogil:
    cdef order_t* order = <order_t*>first
    cdef int64_t got = order.read(owner, order.buffer, order.length, order.offset)
    pthread_mutex_lock(&order.lock)
    order.got = got
    order.done = True
    pthread_cond_signal(&order.ended)
    pthread_mutex_unlock(&order.lock)
    put_back(order)


cdef int64_t wait_for(order_t* order) noexcept nogil:
    cdef timespec when
    cdef int64_t got = -EINTR
    cdef bint interrupted = False
    pthread_mutex_lock(&order.lock)
    while not order.done and not interrupted:
        clock_gettime(CLOCK_REALTIME, &when)
        when.tv_nsec += LOOK_NS
        if when.tv_nsec >= 1000000000:
            when.tv_nsec -= 1000000000
            when.tv_sec += 1
        if pthread_cond_timedwait(&order.ended, &order.lock, &when):
            pthread_mutex_unlock(&order.lock)  # the helper may have the GIL and want the lock
            interrupted = is_interrupted()
            pthread_mutex_lock(&order.lock)
    if order.done:
        got = order.got
    pthread_mutex_unlock(&order.lock)
    return got


cdef bint is_interrupted() noexcept with gil:
    # Only looked at: the handler runs once, when Python code goes on.
    if PyOS_InterruptOccurred():
        PyErr_SetInterrupt()
        return True
    return False


cdef void put_back(order_t* order) noexcept nogil:
    if atomic_subtract(&order.references, 1) == 0:
        pthread_cond_destroy(&order.ended)
        pthread_mutex_destroy(&order.lock)
        free(order)

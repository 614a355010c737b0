# Threads that do tasks for others: started when there is something to do, as many as are useful at once.
#
# A task is dropped when there is no room for it, so it may only be something that whoever wants it can do itself.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._threads cimport thread_t
from qcowfs.clib.pthread cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    MOST_THREADS = 16
    TASKS = 64

ctypedef void (*work_t)(void* owner, uint64_t first, uint64_t last) noexcept nogil


cdef struct task_t:
    work_t work
    void* owner  # who has to be there until the task is done; see pool_drain
    uint64_t first
    uint64_t last


cdef struct helper_t:
    thread_t thread
    pool_t* pool
    void* owner  # of the task that it does now; NULL: none


cdef struct pool_t:
    pthread_mutex_t lock  # guards all of this; never held while a task is done
    pthread_cond_t wanted  # there is a task, or it is time to stop
    pthread_cond_t done  # a task was done
    task_t tasks[TASKS]  # a ring
    uint32_t first
    uint32_t count
    uint32_t most  # threads that there may be
    uint32_t running  # threads that there are
    uint32_t idle  # of them, those that wait for a task
    bint stopping
    helper_t helpers[MOST_THREADS]


cdef void pool_init(pool_t* pool, uint32_t most) noexcept nogil
cdef void pool_destroy(pool_t* pool) noexcept nogil
# Have `work(owner, first, last)` called, before all that waits if it is `urgent`. False: there was no room.
cdef bint pool_add(
    pool_t* pool, work_t work, void* owner, uint64_t first, uint64_t last, bint urgent) noexcept nogil
# Return when all tasks of `owner` were done; what wants to end soon has told them to do nothing.
cdef void pool_drain(pool_t* pool, void* owner) noexcept nogil
# Collect the threads; the pool can be used again afterwards. No two calls at once.
cdef void pool_stop(pool_t* pool) noexcept nogil

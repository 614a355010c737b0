# cython: language_level=3, cdivision=True
"""A pool of threads that do tasks for others.

Used by `_blockread`: many requests are on their way to a server at once, and what arrived is written to the disk
meanwhile. No Python of its own; what a task does is its own business.
"""

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._threads cimport thread_start, thread_stop
from qcowfs.clib.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)


cdef void pool_init(pool_t* pool, uint32_t most) noexcept nogil:
    pthread_mutex_init(&pool.lock, NULL)
    pthread_cond_init(&pool.wanted, NULL)
    pthread_cond_init(&pool.done, NULL)
    pool.first = pool.count = pool.running = pool.idle = 0
    pool.most = min(most, <uint32_t>MOST_THREADS)
    pool.stopping = False


cdef void pool_destroy(pool_t* pool) noexcept nogil:
    pool_stop(pool)
    pthread_cond_destroy(&pool.done)
    pthread_cond_destroy(&pool.wanted)
    pthread_mutex_destroy(&pool.lock)


cdef bint pool_add(
    pool_t* pool, work_t work, void* owner, uint64_t first, uint64_t last, bint urgent) noexcept nogil:
    cdef task_t* task
    cdef bint room
    pthread_mutex_lock(&pool.lock)
    if pool.count >= pool.idle and pool.running < pool.most and not pool.stopping:
        start_one(pool)
    room = pool.running > 0 and pool.count < TASKS and not pool.stopping
    if room:
        if urgent:
            pool.first = (pool.first + TASKS - 1) % TASKS
            task = &pool.tasks[pool.first]
        else:
            task = &pool.tasks[(pool.first + pool.count) % TASKS]
        pool.count += 1
        task.work = work
        task.owner = owner
        task.first = first
        task.last = last
        pthread_cond_signal(&pool.wanted)
    pthread_mutex_unlock(&pool.lock)
    return room


cdef void start_one(pool_t* pool) noexcept nogil:
    # A machine that is out of threads has one fewer here: whoever added the task does it itself.
    cdef helper_t* helper = &pool.helpers[pool.running]
    helper.pool = pool
    helper.owner = NULL
    if thread_start(&helper.thread, help, helper) == 0:
        pool.running += 1


cdef void help(void* argument) noexcept nogil:
    cdef helper_t* helper = <helper_t*>argument
    cdef pool_t* pool = helper.pool
    cdef task_t task
    pthread_mutex_lock(&pool.lock)
    while not pool.stopping:
        if pool.count == 0:
            pool.idle += 1
            pthread_cond_wait(&pool.wanted, &pool.lock)
            pool.idle -= 1
            continue
        task = pool.tasks[pool.first]
        pool.first = (pool.first + 1) % TASKS
        pool.count -= 1
        helper.owner = task.owner
        pthread_mutex_unlock(&pool.lock)
        task.work(task.owner, task.first, task.last)
        pthread_mutex_lock(&pool.lock)
        helper.owner = NULL
        pthread_cond_broadcast(&pool.done)
    pthread_mutex_unlock(&pool.lock)


cdef void pool_drain(pool_t* pool, void* owner) noexcept nogil:
    pthread_mutex_lock(&pool.lock)
    while has_task(pool, owner):
        pthread_cond_wait(&pool.done, &pool.lock)
    pthread_mutex_unlock(&pool.lock)


cdef bint has_task(const pool_t* pool, const void* owner) noexcept nogil:
    cdef uint32_t number
    for number in range(pool.count):
        if pool.tasks[(pool.first + number) % TASKS].owner == owner:
            return True
    for number in range(pool.running):
        if pool.helpers[number].owner == owner:
            return True
    return False


cdef void pool_stop(pool_t* pool) noexcept nogil:
    cdef uint32_t number
    pthread_mutex_lock(&pool.lock)
    pool.stopping = True
    pthread_cond_broadcast(&pool.wanted)
    pthread_mutex_unlock(&pool.lock)
    for number in range(pool.running):  # nobody starts one any more
        thread_stop(&pool.helpers[number].thread)
    pthread_mutex_lock(&pool.lock)
    pool.running = pool.count = 0
    pool.stopping = False
    pthread_mutex_unlock(&pool.lock)

# cython: language_level=3, cdivision=True
"""Decompress ahead: what a sequential reader wants next is put into the cache by threads that have nothing else to do.

Used by `_dataplane`. No Python, no GIL. A read that comes before its clusters are done helps (`disk_preload`), so two
cores work on one reader. Tasks that find no room are dropped: they only save time.
"""

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._core cimport disk_preload
from qcowfs._handles cimport handle_t, handles_keep, handles_put, handles_t
from qcowfs._threads cimport thread_start, thread_stop
from qcowfs.clib.atomic cimport atomic_load, atomic_store
from qcowfs.clib.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_signal, pthread_cond_wait,
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)

cdef enum:
    WINDOW = 2 << 20  # bytes ahead of a reader: four of the kernel's largest reads
    WINDOW_SHARE = 8  # of the cache's budget: what is thrown out before it is read was for nothing
    STEPS = 4  # a task is at least this part of a window


cdef int ahead_start(ahead_t* ahead, handles_t* handles, uint32_t helpers) noexcept nogil:
    cdef int status
    pthread_mutex_init(&ahead.lock, NULL)
    pthread_cond_init(&ahead.wanted, NULL)
    ahead.handles = handles
    ahead.first = ahead.count = ahead.running = 0
    atomic_store(&ahead.stopping, 0)
    while ahead.running < min(helpers, <uint32_t>MOST_HELPERS):
        status = thread_start(&ahead.helpers[ahead.running], help, ahead)
        if status:
            ahead_stop(ahead)
            return status
        ahead.running += 1
    return 0


cdef void ahead_stop(ahead_t* ahead) noexcept nogil:
    cdef uint32_t number
    pthread_mutex_lock(&ahead.lock)
    atomic_store(&ahead.stopping, 1)
    pthread_cond_broadcast(&ahead.wanted)
    pthread_mutex_unlock(&ahead.lock)
    for number in range(ahead.running):
        thread_stop(&ahead.helpers[number])
    while ahead.count > 0:
        handles_put(ahead.handles, ahead.tasks[ahead.first].handle)
        ahead.first = (ahead.first + 1) % TASKS
        ahead.count -= 1
    pthread_cond_destroy(&ahead.wanted)
    pthread_mutex_destroy(&ahead.lock)


cdef void ahead_follow(ahead_t* ahead, handle_t* handle, uint64_t offset, uint64_t end) noexcept nogil:
    cdef uint64_t window = min(<uint64_t>WINDOW, handle.disk.cache.budget // WINDOW_SHARE)
    cdef uint64_t target = min(end + window, handle.disk.virtual_size)
    cdef bint sequential
    pthread_mutex_lock(&ahead.lock)
    # The kernel's own reads ahead come in any order, but near each other.
    sequential = offset <= handle.next + window and handle.next <= end + window
    if not sequential:
        handle.ahead = end
    elif handle.ahead < end or handle.ahead > target + window:
        handle.ahead = end
    handle.next = end
    if sequential and handle.ahead < target and (
            target - handle.ahead >= window // STEPS or target == handle.disk.virtual_size):
        add_task(ahead, handle, handle.ahead, target)
    pthread_mutex_unlock(&ahead.lock)


cdef void add_task(ahead_t* ahead, handle_t* handle, uint64_t offset, uint64_t end) noexcept nogil:
    cdef task_t* task
    if ahead.count == TASKS or atomic_load(&ahead.stopping):
        return
    task = &ahead.tasks[(ahead.first + ahead.count) % TASKS]
    task.handle = handle
    task.offset = offset
    task.end = end
    ahead.count += 1
    handle.ahead = end
    handles_keep(ahead.handles, handle)
    pthread_cond_signal(&ahead.wanted)


cdef void help(void* argument) noexcept nogil:
    cdef ahead_t* ahead = <ahead_t*>argument
    cdef task_t task
    while take_task(ahead, &task):
        while task.offset < task.end and not atomic_load(&ahead.stopping):
            task.offset = disk_preload(task.handle.disk, task.offset, task.end)
        handles_put(ahead.handles, task.handle)


cdef bint take_task(ahead_t* ahead, task_t* task) noexcept nogil:
    """Wait for a task; False when it is time to stop."""
    cdef bint found = False
    pthread_mutex_lock(&ahead.lock)
    while ahead.count == 0 and not atomic_load(&ahead.stopping):
        pthread_cond_wait(&ahead.wanted, &ahead.lock)
    if not atomic_load(&ahead.stopping):
        task[0] = ahead.tasks[ahead.first]
        ahead.first = (ahead.first + 1) % TASKS
        ahead.count -= 1
        found = True
    pthread_mutex_unlock(&ahead.lock)
    return found

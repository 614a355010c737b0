# Decompressing ahead of sequential readers, on cores that have nothing else to do.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._handles cimport handle_t, handles_t
from qcowfs._threads cimport thread_t
from qcowfs.clib.pthread cimport pthread_cond_t, pthread_mutex_t


cdef enum:
    MOST_HELPERS = 4
    TASKS = 32


cdef struct task_t:
    handle_t* handle  # with a reference
    uint64_t offset
    uint64_t end


cdef struct ahead_t:
    pthread_mutex_t lock  # guards all of this, and `next` and `ahead` of every handle; never held while decompressing
    pthread_cond_t wanted  # there is a task, or it is time to stop
    handles_t* handles
    task_t tasks[TASKS]  # a ring
    uint32_t first
    uint32_t count
    uint32_t stopping  # atomic, set under the lock
    thread_t helpers[MOST_HELPERS]
    uint32_t running


# Returns 0 or an errno; `helpers` threads at most.
cdef int ahead_start(ahead_t* ahead, handles_t* handles, uint32_t helpers) noexcept nogil
cdef void ahead_stop(ahead_t* ahead) noexcept nogil

# Somebody reads [offset, end) of a disk with compressed clusters.
cdef void ahead_follow(ahead_t* ahead, handle_t* handle, uint64_t offset, uint64_t end) noexcept nogil

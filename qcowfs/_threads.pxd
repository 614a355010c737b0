# Threads that never run Python code of their own: started, woken from a system call, and waited for.

from libc.stdint cimport uint32_t

from qcowfs.clib.pthread cimport pthread_t


cdef struct thread_t:
    pthread_t id
    void (*work)(void*) noexcept nogil
    void* argument
    uint32_t ended  # atomic; 1: `work` returned


# Start `work(argument)`; `thread` stays where it is until it was stopped. Returns 0 or an errno.
cdef int thread_start(thread_t* thread, void (*work)(void*) noexcept nogil, void* argument) noexcept nogil

# Interrupt the system call that the thread is in, again and again until `work` returned, and collect the thread. The
# caller has seen to it that `work` returns when its system calls are interrupted.
cdef void thread_stop(thread_t* thread) noexcept nogil

# A read that a helper does while the main thread waits for it, so that Ctrl-C ends the waiting.

from libc.stdint cimport int64_t, uint64_t

from qcowfs._pool cimport pool_t

ctypedef int64_t (*read_t)(void* owner, void* buffer, uint64_t length, uint64_t offset) noexcept nogil


# Is this the thread that runs Python's signal handlers?
cdef bint in_main_thread() noexcept nogil
# What `read(owner, ...)` returns, or -EINTR if there was a SIGINT, whose handler runs as soon as Python goes on.
cdef int64_t read_interruptibly(
    pool_t* pool, read_t read, void* owner, void* buffer, uint64_t length, uint64_t offset) noexcept nogil

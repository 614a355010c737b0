# Readers of sources that a thread talks to a server for; _queue.pxd has what lies between them.

from libc.stdint cimport int64_t, uint64_t

from qcowfs._queue cimport queue_t, turn_t
from qcowfs._source cimport Source
from qcowfs._threads cimport thread_t

# For readers, from any number of threads: bytes (all of them), or -errno; 1, 0 or -errno as source_t.status.
cdef int64_t queue_read(queue_t* queue, char* buffer, uint64_t length, uint64_t offset) noexcept nogil
cdef int queue_status(queue_t* queue, uint64_t offset, uint64_t* length) noexcept nogil

# For the service thread. Let readers have the wheel for as long as they use it, unless somebody waits for this thread.
cdef void queue_pass(queue_t* queue) noexcept nogil


cdef class QueuedSource(Source):
    cdef queue_t queue
    cdef thread_t thread
    cdef bint ready  # the queue was made
    cdef bint running
    # Run `work(argument)` as the service thread. It calls queue_pass while all is well, and returns soon once
    # queue_failed() is EBADF.
    cdef int serve(self, void (*work)(void*) noexcept nogil, turn_t turn, void* argument) except -1
    # End the thread. A subclass whose thread uses what is its own calls it in its __dealloc__, which comes first.
    cdef void stop(self) noexcept

# The thread that talks to the server of one export, and what it shares with the readers.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs._nbdlink cimport link_t, server_t
from qcowfs._queue cimport queue_t, request_t
from qcowfs.clib.pthread cimport pthread_mutex_t

cdef enum:
    MOST_IN_FLIGHT = 64  # commands
    MOST_EXTENTS = 512  # kept of one answer


cdef struct slot_t:
    request_t* request  # NULL: free
    service_t* service
    bint done  # libnbd is through with it
    int error  # errno, as the server said or as the connection ended; 0: none


cdef struct extent_t:
    uint64_t end  # offset; it begins where the one before ends
    bint hole


cdef struct extents_t:
    pthread_mutex_t mutex  # of all below, which is what the server told last
    uint64_t start  # of the first one
    uint32_t count
    extent_t found[MOST_EXTENTS]


cdef struct service_t:
    # The service thread's alone, but for `extents` and for what was set before it started.
    queue_t* queue
    server_t server
    bint is_qemu  # it is a process of ours
    int ill  # an eventfd that is written to when another one is wanted in its place; -1: there is none
    link_t link
    uint64_t size  # bytes, as of opening; so are the next two
    uint32_t smallest
    bint tells_extents
    slot_t slots[MOST_IN_FLIGHT]
    extents_t extents
    int64_t next_attempt  # ns of monotonic(): not to connect before
    int64_t pause  # ns between that attempt and the one after it
    bint proven  # this connection has answered a command
    bint refused  # it, or one before it that was not proven since, has refused one, and the log knows


# Serve until the queue failed with EBADF; for QueuedSource.serve.
cdef void nbd_serve(void* service) noexcept nogil
cdef bint nbd_turn(void* service) noexcept nogil

# Answer from what the server told last: 1 data, 0 a hole, and `length[0]` is cut to the run; -1: that is not known.
cdef int extents_find(extents_t* extents, uint64_t offset, uint64_t* length) noexcept nogil

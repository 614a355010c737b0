# One connection to an NBD server: made, moved on, and given up; none of it takes longer than it may.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs._queue cimport queue_t
from qcowfs.clib.libnbd cimport nbd_handle

cdef enum:
    REASON_SIZE = 256  # bytes of a reason, its NUL among them


cdef struct server_t:
    # Where to, as libnbd wants it; the strings belong to the source.
    const char* uri  # names no file but the socket
    const char* certificates  # a directory with ca-cert.pem in it; NULL: TLS, if any, without
    const char* keys  # a file of pre-shared keys; NULL: TLS, if any, without
    bint tls


cdef struct link_t:
    nbd_handle* handle  # NULL: there is no connection
    uint64_t size  # bytes of the export
    uint32_t smallest  # bytes, a power of 2: commands begin and end at multiples of it, or at the end of the export
    uint32_t largest  # bytes of one command
    bint tells_extents
    bint answers_whole  # it can be asked to answer a read in one piece
    bint several  # other connections see the same bytes at once
    char reason[REASON_SIZE]  # why the last call failed; may hold what the server said


# Connect until `deadline` (ns of monotonic()). Returns 0, or -errno and a reason: -ETIMEDOUT, -EBADF once the queue
# failed, -EINTR after a signal in this thread, or what the system or the server said. `listing`: go no further than to
# where the server can be asked for its exports.
cdef int link_open(
    link_t* link, const server_t* server, queue_t* queue, int64_t deadline, bint listing) noexcept nogil

# Let data move until something did, something was queued, or the deadline passed. Returns 0, or -errno and a reason:
# the connection is dead. -EINTR is not among them.
cdef int link_step(link_t* link, queue_t* queue, int64_t deadline) noexcept nogil

# Give the connection up. No buffer of a command in flight is touched afterwards, and no callback is called.
cdef void link_close(link_t* link) noexcept nogil

# Wait until `deadline`, or until something was queued.
cdef void link_pause(queue_t* queue, int64_t deadline) noexcept nogil

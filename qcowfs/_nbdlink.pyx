# cython: language_level=3, cdivision=True
# distutils: libraries = nbd
"""One connection to an NBD server, by libnbd.

Used by _nbd, from one thread at a time. libnbd's calls that wait are not used: they know no end of patience. It is
never asked for debug output, which would show what people read, whatever the environment says.
"""

from libc.errno cimport EBADF, EINTR, EIO, ENOMEM, EPROTO, ETIMEDOUT, errno
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport strerror, strncpy, strstr

from qcowfs._queue cimport monotonic, queue_failed, queue_t, queue_woken
from qcowfs.clib.libnbd cimport (
    LIBNBD_AIO_DIRECTION_READ, LIBNBD_AIO_DIRECTION_WRITE, LIBNBD_ALLOW_TRANSPORT_TCP, LIBNBD_ALLOW_TRANSPORT_UNIX,
    LIBNBD_CONTEXT_BASE_ALLOCATION, LIBNBD_SIZE_MAXIMUM, LIBNBD_SIZE_MINIMUM, LIBNBD_TLS_DISABLE, LIBNBD_TLS_REQUIRE,
    nbd_add_meta_context, nbd_aio_connect_uri, nbd_aio_disconnect, nbd_aio_get_direction, nbd_aio_get_fd,
    nbd_aio_is_closed, nbd_aio_is_dead, nbd_aio_is_negotiating, nbd_aio_is_ready, nbd_aio_notify_read,
    nbd_aio_notify_write, nbd_can_df, nbd_can_meta_context, nbd_can_multi_conn, nbd_close, nbd_create,
    nbd_get_block_size, nbd_get_errno, nbd_get_error, nbd_get_size, nbd_set_debug, nbd_set_opt_mode,
    nbd_set_tls_certificates, nbd_set_tls_psk_file, nbd_set_uri_allow_local_file, nbd_set_uri_allow_tls,
    nbd_set_uri_allow_transports,
)
from qcowfs.clib.poll cimport POLLERR, POLLHUP, POLLIN, POLLOUT, c_poll, pollfd_t
from qcowfs.clib.socket cimport (
    IPPROTO_TCP, SO_KEEPALIVE, SOL_SOCKET, TCP_KEEPIDLE, TCP_KEEPINTVL, TCP_USER_TIMEOUT, setsockopt,
)

cdef enum:
    MILLISECOND = 1000000  # ns
    LONGEST_WAIT_MS = 60000
    DEFAULT_LARGEST = 32 << 20  # specification: what a server takes that tells nothing
    LEAST_LARGEST = 4096  # a server that takes less at once would be asked for ever
    MOST_SMALLEST = 64 << 10  # specification: the minimum block size is at most that


cdef int link_open(
    link_t* link, const server_t* server, queue_t* queue, int64_t deadline, bint listing) noexcept nogil:
    cdef int status
    link.handle = nbd_create()
    if link.handle == NULL:
        return failed(link)
    status = prepare(link, server, listing)
    if status == 0 and nbd_aio_connect_uri(link.handle, server.uri) < 0:
        status = failed(link)
    while status == 0 and not arrived(link, listing):
        status = step(link, queue, deadline)
        if status == 0 and queue_failed(queue):
            status = -EBADF
        elif status == 0 and monotonic() >= deadline:
            status = given_up(link, -ETIMEDOUT, strerror(ETIMEDOUT))
    if status == 0 and not listing:
        status = learn(link)
    if status:
        link_close(link)
    else:
        watch_peer(link, queue.patience)
    return status


cdef int prepare(link_t* link, const server_t* server, bint listing) noexcept nogil:
    """Say what the URI may ask for: what it names was taken out of it before, and only the socket is left."""
    if nbd_set_debug(link.handle, False) < 0 or nbd_set_uri_allow_local_file(link.handle, False) < 0:
        return failed(link)
    if nbd_set_uri_allow_transports(link.handle, LIBNBD_ALLOW_TRANSPORT_TCP | LIBNBD_ALLOW_TRANSPORT_UNIX) < 0:
        return failed(link)
    if nbd_set_uri_allow_tls(link.handle, LIBNBD_TLS_REQUIRE if server.tls else LIBNBD_TLS_DISABLE) < 0:
        return failed(link)
    if server.certificates != NULL and nbd_set_tls_certificates(link.handle, server.certificates) < 0:
        return failed(link)
    if server.keys != NULL and nbd_set_tls_psk_file(link.handle, server.keys) < 0:
        return failed(link)
    if listing and nbd_set_opt_mode(link.handle, True) < 0:
        return failed(link)
    return 0 if nbd_add_meta_context(link.handle, LIBNBD_CONTEXT_BASE_ALLOCATION) == 0 else failed(link)


cdef bint arrived(link_t* link, bint listing) noexcept nogil:
    return nbd_aio_is_ready(link.handle) > 0 or (listing and nbd_aio_is_negotiating(link.handle) > 0)


cdef int learn(link_t* link) noexcept nogil:
    """Take what the server told, none of which may be believed."""
    cdef int64_t size = nbd_get_size(link.handle)
    cdef int64_t smallest = nbd_get_block_size(link.handle, LIBNBD_SIZE_MINIMUM)
    cdef int64_t largest = nbd_get_block_size(link.handle, LIBNBD_SIZE_MAXIMUM)
    if size < 0:
        return given_up(link, -EPROTO, b"the server tells a size that no disk has")
    smallest = max(smallest, 1)
    if smallest > MOST_SMALLEST or smallest & (smallest - 1):
        return given_up(link, -EPROTO, b"the server tells a minimum block size that none has")
    largest = largest if largest > 0 else DEFAULT_LARGEST
    if largest < LEAST_LARGEST or largest < smallest:
        return given_up(link, -EPROTO, b"the server takes requests of a few bytes only")
    link.size = <uint64_t>size
    link.smallest = <uint32_t>smallest
    link.largest = <uint32_t>min(largest, DEFAULT_LARGEST)
    link.tells_extents = nbd_can_meta_context(link.handle, LIBNBD_CONTEXT_BASE_ALLOCATION) > 0
    link.answers_whole = nbd_can_df(link.handle) > 0
    link.several = nbd_can_multi_conn(link.handle) > 0
    return 0


cdef void watch_peer(link_t* link, int64_t patience) noexcept nogil:
    """Let TCP notice in half of the patience that the other side is gone: then there is time for a new connection."""
    cdef int timeout = <int>min(max(patience // (2 * MILLISECOND), 1), 0x7FFFFFFF)
    cdef int seconds = <int>max(timeout // 4000, 1)
    cdef int yes = 1
    cdef int fd = nbd_aio_get_fd(link.handle)
    # A Unix socket knows none of these, and needs none.
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &timeout, sizeof(int))
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &yes, sizeof(int))
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &seconds, sizeof(int))
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &seconds, sizeof(int))


cdef int link_step(link_t* link, queue_t* queue, int64_t deadline) noexcept nogil:
    cdef int status = step(link, queue, deadline)
    return 0 if status == -EINTR else status


cdef int step(link_t* link, queue_t* queue, int64_t deadline) noexcept nogil:
    cdef pollfd_t waiting[2]
    cdef unsigned direction = nbd_aio_get_direction(link.handle)
    cdef int status = status_of(link, 0)
    if status:
        return status  # it broke when a command was sent
    waiting[0].fd = nbd_aio_get_fd(link.handle)
    waiting[0].events = <short>(
        (POLLIN if direction & LIBNBD_AIO_DIRECTION_READ else 0)
        | (POLLOUT if direction & LIBNBD_AIO_DIRECTION_WRITE else 0))
    waiting[0].revents = 0
    waiting[1].fd = queue.wakeup
    waiting[1].events = POLLIN
    waiting[1].revents = 0
    if c_poll(waiting, 2, milliseconds_until(deadline)) < 0:
        return -EINTR if errno == EINTR else given_up(link, -errno, strerror(errno))
    if waiting[1].revents:
        queue_woken(queue)
    # As libnbd's own loop: reading first, and never both after one poll, for the first may have changed everything.
    if waiting[0].revents & (POLLIN | POLLHUP) and direction & LIBNBD_AIO_DIRECTION_READ:
        status = nbd_aio_notify_read(link.handle)
    elif waiting[0].revents & (POLLOUT | POLLHUP) and direction & LIBNBD_AIO_DIRECTION_WRITE:
        status = nbd_aio_notify_write(link.handle)
    elif waiting[0].revents & (POLLERR | POLLHUP):
        status = nbd_aio_notify_read(link.handle) if direction & LIBNBD_AIO_DIRECTION_READ else 0
        return status_of(link, status) or given_up(link, -EIO, b"the connection broke")
    return status_of(link, status)


cdef int status_of(link_t* link, int status) noexcept nogil:
    if status < 0:
        return failed(link)
    if nbd_aio_is_dead(link.handle) > 0 or nbd_aio_is_closed(link.handle) > 0:
        return given_up(link, -EIO, b"the server closed the connection")
    return 0


cdef void link_pause(queue_t* queue, int64_t deadline) noexcept nogil:
    cdef pollfd_t waiting
    waiting.fd = queue.wakeup
    waiting.events = POLLIN
    waiting.revents = 0
    if c_poll(&waiting, 1, milliseconds_until(deadline)) > 0:
        queue_woken(queue)


cdef int milliseconds_until(int64_t deadline) noexcept nogil:
    if deadline == INT64_MAX:
        return -1
    return <int>min(max((deadline - monotonic()) // MILLISECOND + 1, 0), LONGEST_WAIT_MS)


cdef void link_close(link_t* link) noexcept nogil:
    if link.handle != NULL and nbd_aio_is_ready(link.handle) > 0:
        nbd_aio_disconnect(link.handle, 0)  # the server need not wonder; whether it gets it does not matter
    nbd_close(link.handle)
    link.handle = NULL


cdef int failed(link_t* link) noexcept nogil:
    """Keep what libnbd says of its last call in this thread, without the name of the call before it."""
    cdef const char* said = nbd_get_error()
    cdef const char* text
    cdef int error = nbd_get_errno()
    if said == NULL:
        return given_up(link, -ENOMEM, strerror(ENOMEM))
    text = strstr(said, b": ")
    return given_up(link, -error if error > 0 else -EPROTO, said if text == NULL else text + 2)


cdef int given_up(link_t* link, int status, const char* reason) noexcept nogil:
    strncpy(link.reason, reason, REASON_SIZE - 1)
    link.reason[REASON_SIZE - 1] = 0
    return status

# cython: language_level=3, cdivision=True
# distutils: libraries = nbd
"""The thread that talks to an NBD server: many commands in flight, and a new connection when one breaks.

Used by _nbd. What was in flight on a connection that broke is asked for again, as long as its reader has patience. An
error that the server itself answers is passed on at once: it has tried what there was to try, unless it is one of ours
that can be replaced. The thread runs no Python; libnbd's callbacks come in it.
"""

from libc.errno cimport EBADF, EIO, ESHUTDOWN, ESTALE, ETIMEDOUT
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport strerror, strncpy

from qcowfs._nbdlink cimport REASON_SIZE, link_close, link_open, link_pause, link_step
from qcowfs._queue cimport (
    BACK, FAULT, READ, TROUBLE, monotonic, queue_complete, queue_deadline, queue_fail, queue_failed,
    queue_first_deadline, queue_put_back, queue_take, queue_tell, request_t,
)
from qcowfs._requests cimport queue_pass
from qcowfs.clib.libnbd cimport (
    LIBNBD_CMD_FLAG_DF, LIBNBD_STATE_ZERO, nbd_aio_block_status, nbd_aio_pread, nbd_aio_pread_structured,
    nbd_chunk_callback, nbd_completion_callback, nbd_extent_callback,
)
from qcowfs.clib.poll cimport eventfd_write
from qcowfs.clib.pthread cimport pthread_mutex_lock, pthread_mutex_unlock

cdef enum:
    EXTENTS_AHEAD = 1 << 30  # bytes that the server is asked about at once
    FIRST_PAUSE = 50000000  # ns before the second attempt to connect; then it doubles
    LONGEST_PAUSE = 1000000000


cdef void nbd_serve(void* argument) noexcept nogil:
    cdef service_t* service = <service_t*>argument
    service.pause = FIRST_PAUSE
    while queue_failed(service.queue) != EBADF:
        if nbd_turn(service):
            queue_pass(service.queue)
        else:
            reconnect(service)
    lose(service)


cdef bint nbd_turn(void* argument) noexcept nogil:
    cdef service_t* service = <service_t*>argument
    if service.link.handle == NULL:
        return False
    fill(service)
    settle(service, link_step(&service.link, service.queue, queue_deadline(service.queue)))
    return service.link.handle != NULL


cdef void reconnect(service_t* service) noexcept nogil:
    """Wait until somebody wants to read, then until the next attempt is due, and make it."""
    cdef int64_t until = INT64_MAX
    cdef int status
    if queue_first_deadline(service.queue) != INT64_MAX:
        until = service.next_attempt
    if until > monotonic():
        link_pause(service.queue, until)
        return
    status = link_open(
        &service.link, &service.server, service.queue, monotonic() + service.queue.patience, False)
    if status == 0:
        check_again(service)
    elif status != -EBADF:
        if status == -ETIMEDOUT:
            ask_for_another(service)
        trouble(service, service.link.reason)


cdef void check_again(service_t* service) noexcept nogil:
    """Is it what was opened? Its size is all that an export can be told by."""
    service.proven = False
    if service.link.size != service.size:
        queue_tell(service.queue, FAULT, b"the export came back with another size: nothing more is read")
        queue_fail(service.queue, ESTALE)
        lose(service)
    elif service.link.smallest != service.smallest or service.link.largest < service.queue.largest:
        lose(service)
        trouble(service, b"the server came back with other block sizes")


cdef void trouble(service_t* service, const char* reason) noexcept nogil:
    queue_tell(service.queue, TROUBLE, reason)
    service.next_attempt = monotonic() + service.pause
    service.pause = min(2 * service.pause, LONGEST_PAUSE)


cdef void lose(service_t* service) noexcept nogil:
    """Give up the connection, and put back what was in flight."""
    cdef uint32_t i
    link_close(&service.link)
    for i in range(<uint32_t>MOST_IN_FLIGHT):
        if service.slots[i].request != NULL:
            queue_put_back(service.queue, service.slots[i].request)
            service.slots[i].request = NULL


cdef void fill(service_t* service) noexcept nogil:
    cdef slot_t* slot
    cdef uint32_t i
    for i in range(<uint32_t>MOST_IN_FLIGHT):
        slot = &service.slots[i]
        if slot.request != NULL:
            continue
        slot.request = queue_take(service.queue)
        if slot.request == NULL:
            return
        slot.service = service
        slot.done = False
        slot.error = 0
        issue(service, slot)


cdef void issue(service_t* service, slot_t* slot) noexcept nogil:
    cdef request_t* request = slot.request
    cdef nbd_completion_callback done
    cdef nbd_extent_callback found
    cdef int64_t cookie
    cdef uint64_t start
    done.callback = completed
    done.user_data = slot
    done.free = NULL
    if request.kind == READ:
        cookie = issue_read(service, request, done)
    elif service.link.tells_extents:
        found.callback = told
        found.user_data = slot
        found.free = NULL
        start = request.offset // service.smallest * service.smallest
        cookie = nbd_aio_block_status(
            service.link.handle, min(<uint64_t>EXTENTS_AHEAD, service.size - start), start, found, done, 0)
    else:
        cookie = -1
    if cookie < 0:
        slot.done = True
        slot.error = EIO


cdef int64_t issue_read(service_t* service, request_t* request, nbd_completion_callback done) noexcept nogil:
    cdef nbd_chunk_callback came
    if not service.is_qemu or not service.link.answers_whole:
        return nbd_aio_pread(service.link.handle, request.buffer, request.length, request.offset, done, 0)
    # QEMU ends the connection if a read fails whose answer it has begun, and it begins at once if pieces will do.
    came.callback = came_in
    came.user_data = NULL
    came.free = NULL
    return nbd_aio_pread_structured(
        service.link.handle, request.buffer, request.length, request.offset, came, done, LIBNBD_CMD_FLAG_DF)


cdef int came_in(
    void* argument, const void* piece, size_t count, uint64_t offset, unsigned status, int* error,
) noexcept nogil:
    return 0  # libnbd has put it into the buffer


cdef int completed(void* argument, int* error) noexcept nogil:
    cdef slot_t* slot = <slot_t*>argument
    slot.done = True
    slot.error = error[0]
    return 1  # libnbd may forget the command


cdef void settle(service_t* service, int status) noexcept nogil:
    """End what libnbd is through with; `status`: 0, or the connection is dead."""
    cdef slot_t* slot
    cdef uint32_t i
    for i in range(<uint32_t>MOST_IN_FLIGHT):
        slot = &service.slots[i]
        if slot.request == NULL or not slot.done:
            continue
        if slot.error == 0:
            prove(service)
        elif slot.error == ESHUTDOWN or status < 0:
            continue  # not the server's word on this command: it is put back below
        elif is_doubtful(service, slot):
            slot.request.tries += 1
            status = -slot.error
            strncpy(service.link.reason, b"QEMU has lost its server, or cannot read there", REASON_SIZE - 1)
            ask_for_another(service)
            continue
        complete(service, slot)
    for i in range(<uint32_t>MOST_IN_FLIGHT):
        if service.slots[i].request != NULL and service.slots[i].done and status == 0:
            status = -ESHUTDOWN
            strncpy(service.link.reason, b"the server is shutting down", REASON_SIZE - 1)
    if status == 0 and queue_deadline(service.queue) <= monotonic():
        status = -ETIMEDOUT
        strncpy(service.link.reason, b"the server does not answer", REASON_SIZE - 1)
        ask_for_another(service)
    if status < 0:
        lose(service)
        trouble(service, service.link.reason)


cdef bint is_doubtful(service_t* service, const slot_t* slot) noexcept nogil:
    """Tell whether an error may be of the server alone, and not of what is read: another one has not been asked yet."""
    return service.ill >= 0 and slot.request.kind == READ and not slot.request.tries


cdef void ask_for_another(service_t* service) noexcept nogil:
    if service.ill >= 0:
        eventfd_write(service.ill, 1)


cdef void prove(service_t* service) noexcept nogil:
    if not service.proven:
        service.proven = True
        service.refused = False
        service.pause = FIRST_PAUSE
        queue_tell(service.queue, BACK, b"the server is back")


cdef void complete(service_t* service, slot_t* slot) noexcept nogil:
    cdef request_t* request = slot.request
    cdef int64_t result = <int64_t>request.length
    slot.request = NULL
    if request.kind == READ:
        if slot.error:
            result = -EIO
            refuse(service, slot.error)
    elif slot.error:
        result = 1  # all of it data: reading it tells the truth
    else:
        result = extents_find(&service.extents, request.offset, &request.length)
        result = 1 if result < 0 else result
    queue_complete(service.queue, request, result)


cdef void refuse(service_t* service, int error) noexcept nogil:
    """Say in the log, once for each connection that answers anything else, what the server says of a read."""
    if not service.refused:
        service.refused = True
        queue_tell(service.queue, FAULT, strerror(error))


cdef int told(
    void* argument, const char* context, uint64_t offset, uint32_t* entries, size_t count, int* error,
) noexcept nogil:
    """Keep what the server tells, as far as there is room: pairs of a length and flags."""
    cdef service_t* service = (<slot_t*>argument).service
    cdef extents_t* extents = &service.extents
    cdef uint64_t end = offset
    cdef bint hole
    cdef size_t i
    pthread_mutex_lock(&extents.mutex)
    extents.start = offset
    extents.count = 0
    for i in range(0, count - count % 2, 2):
        hole = entries[i + 1] & LIBNBD_STATE_ZERO
        end += entries[i]
        if extents.count and extents.found[extents.count - 1].hole == hole:
            extents.found[extents.count - 1].end = end
            continue
        if extents.count == MOST_EXTENTS:
            break
        extents.found[extents.count].end = end
        extents.found[extents.count].hole = hole
        extents.count += 1
    pthread_mutex_unlock(&extents.mutex)
    return 0


cdef int extents_find(extents_t* extents, uint64_t offset, uint64_t* length) noexcept nogil:
    cdef int answer = -1
    cdef uint32_t low = 0
    cdef uint32_t high
    cdef uint32_t middle
    pthread_mutex_lock(&extents.mutex)
    high = extents.count
    if offset >= extents.start:
        while low < high:  # the first that ends after offset
            middle = (low + high) // 2
            if extents.found[middle].end > offset:
                high = middle
            else:
                low = middle + 1
        if low < extents.count:
            answer = 0 if extents.found[low].hole else 1
            length[0] = min(length[0], extents.found[low].end - offset)
    pthread_mutex_unlock(&extents.mutex)
    return answer

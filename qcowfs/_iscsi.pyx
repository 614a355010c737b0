# cython: language_level=3, cdivision=True
# distutils: libraries = iscsi
"""A logical unit of an iSCSI target as a Source: many reads in flight on one session, by one thread, without Python.

Used by source/iscsi.py. Nothing is ever sent that changes the unit or reserves it. After a failure the thread logs in
again, looks whether it is the same unit, and sends again what had no answer: a read may be repeated. Reads come from
any number of threads; `connect` and `close` from one.
"""

from libc.errno cimport EBADF, EIO, ESTALE
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.stdio cimport snprintf

from qcowfs._iscsisession cimport (
    LBA_STATUS_SIZE, OFFLINE, ONLINE, describe_login, facts_t, identity_t, mapped, same_unit, session_begin,
    session_end, session_fail, session_logout, session_send, session_t, session_wait, session_watch,
)
from qcowfs._queue cimport (
    BACK, FAULT, NEWS_SIZE, READ, TROUBLE, monotonic, queue_complete, queue_deadline, queue_fail, queue_failed,
    queue_put_back, queue_t, queue_take, queue_tell, queue_woken, request_t,
)
from qcowfs._requests cimport QueuedSource, queue_pass, queue_status
from qcowfs._source cimport source_t
from qcowfs.clib.libiscsi cimport *

cdef enum:
    IN_FLIGHT = 64  # commands; targets allow 32 to 128
    # Bytes of one command: what fits into one of libiscsi's PDUs. tgtd gave 1.6 GB/s so, and 0.7 by commands of 1 MiB.
    LARGEST_REQUEST = 1 << 18
    LARGEST_BLOCK = 65536
    SECOND = 1000000000  # ns
    FIRST_PAUSE = SECOND // 50  # before the second attempt to connect, and before a busy unit is asked again
    REPORTED_LUNS_CHANGED = 0x3F0E  # additional sense code

cdef int64_t LONGEST_PAUSE = 2 * <int64_t>SECOND
cdef int64_t LONGEST_SILENCE = 15 * <int64_t>SECOND  # as QEMU: three times 5 seconds


cdef struct part_t:
    part_t* next  # of those that are free
    lun_t* lun
    request_t* request  # NULL: free
    scsi_iovec pieces[3]  # what is read: before the buffer, the buffer, behind it


cdef struct lun_t:
    queue_t* queue
    session_t session
    facts_t facts  # as of opening
    part_t parts[IN_FLIGHT]
    part_t* free
    int64_t pause  # ns before the next attempt to connect; 0 after a read went well
    int64_t next_attempt  # ns of monotonic()
    int64_t next_take  # the same: when a unit that was busy is asked again
    int64_t longest_pause  # ns
    int online  # 1: the session is one with the unit that was opened
    int told  # additional sense code that was told last, or a number below 0
    unsigned char scratch[LARGEST_BLOCK]  # takes what of a block nobody asked for


cdef class LunSource(QueuedSource):
    """A logical unit.

    Args:
        name: for messages.
        patience: seconds that one read may take.
        login: what `describe_login` wants.
    """

    cdef lun_t lun
    cdef public object identity  # what place() returns, once it is known

    def __init__(self, str name, double patience, dict login):
        cdef session_t* session = &self.lun.session
        cdef int i
        QueuedSource.__init__(self, name, patience, LARGEST_REQUEST)
        describe_login(&session.login, login)
        self.lun.queue = &self.queue
        session.silence = min(max(self.queue.patience // 2, <int64_t>1), LONGEST_SILENCE)
        self.lun.longest_pause = min(LONGEST_PAUSE, self.queue.patience // 4)
        for i in range(IN_FLIGHT):
            self.lun.parts[i].lun = &self.lun
            self.lun.parts[i].next = self.lun.free
            self.lun.free = &self.lun.parts[i]

    def begin(self, uint32_t portal):
        """Begin to connect to one of the portals."""
        self.lun.session.portal = portal
        with nogil:
            session_end(&self.lun.session)
            session_begin(&self.lun.session)

    def connect(self, double seconds):
        """Go on connecting for so long. Returns True once it is done, False before.

        Raises:
            ConnectionError: it failed; the reason in libiscsi's words, or those of this room.
        """
        cdef session_t* session = &self.lun.session
        cdef int64_t deadline = monotonic() + <int64_t>(seconds * SECOND)
        with nogil:
            while session.state != ONLINE and not session.failed and monotonic() < deadline:
                session_wait(session, -1, deadline)
        if session.failed:
            raise ConnectionError(session.why.decode("utf-8", "replace"))
        return session.state == ONLINE

    def start(self):
        """Begin to serve reads of what `connect` found."""
        cdef facts_t* facts = &self.lun.facts
        cdef uint64_t largest = LARGEST_REQUEST
        facts[0] = self.lun.session.facts
        if facts.largest:
            largest = min(largest, <uint64_t>facts.largest * facts.block_size)
        self.queue.largest = max(largest - largest % facts.block_size, <uint64_t>facts.block_size)
        self.c.room = facts.blocks * facts.block_size
        if facts.thin:
            self.c.status = thin_status
        self.serve(serve_lun, lun_turn, &self.lun)

    @property
    def facts(self):
        """Block size in bytes, the unit's designator (VPD 0x83) and its serial number (VPD 0x80); empty: none."""
        cdef identity_t* designator = &self.lun.facts.designator
        cdef identity_t* serial = &self.lun.facts.serial
        return (
            self.lun.facts.block_size, designator.data[:designator.size], serial.data[:serial.size],
        )

    def place(self):
        return self.identity

    def close(self):
        QueuedSource.close(self)
        with nogil:
            session_end(&self.lun.session)


cdef int thin_status(const source_t* source, uint64_t offset, uint64_t* length) noexcept nogil:
    if offset >= source.room:
        return 0
    length[0] = min(length[0], source.room - offset)
    return queue_status(<queue_t*>source.state, offset, length)


cdef void serve_lun(void* argument) noexcept nogil:
    cdef lun_t* lun = <lun_t*>argument
    cdef session_t* session = &lun.session
    cdef int error = 0
    lun.online = 1
    while error != EBADF:
        if lun_turn(lun):
            queue_pass(lun.queue)
        else:
            if session.failed:
                give_up(lun)
            take_turn(lun, error)
        error = queue_failed(lun.queue)
    if in_flight(lun):  # their readers shall not wait for a logout
        drop(lun)
    session_logout(session, monotonic() + SECOND)


cdef bint lun_turn(void* argument) noexcept nogil:
    cdef lun_t* lun = <lun_t*>argument
    cdef session_t* session = &lun.session
    if session.state == ONLINE and lun.online and not session.failed:
        take_turn(lun, 0)
    return session.state == ONLINE and lun.online and not session.failed


cdef void take_turn(lun_t* lun, int error) noexcept nogil:
    cdef session_t* session = &lun.session
    cdef int64_t deadline = prepare(lun, error)
    if session.state == ONLINE and not session.failed:
        deadline = min(deadline, submit(lun))
    if not session.failed and session_wait(session, lun.queue.wakeup, deadline):
        queue_woken(lun.queue)


cdef int64_t prepare(lun_t* lun, int error) noexcept nogil:
    """Connect if it is time to, and look after the connection. Returns when to come back at the latest."""
    cdef session_t* session = &lun.session
    cdef int64_t now = monotonic()
    cdef int64_t deadline = queue_deadline(lun.queue)
    if session.state == OFFLINE:
        if error:
            return INT64_MAX  # it is another unit now: there is nothing to do but to wait for the end
        if now < lun.next_attempt:
            return lun.next_attempt
        session_begin(session)
    elif session.state == ONLINE and not lun.online:
        welcome(lun)
    if deadline <= now:
        session_fail(session, b"the target did not answer in time")
    return min(session_watch(session, now), deadline)


cdef void welcome(lun_t* lun) noexcept nogil:
    """Look whether the unit that was connected again is the one that was opened."""
    if same_unit(&lun.facts, &lun.session.facts):
        lun.online = 1
        return
    queue_tell(lun.queue, FAULT, b"this is another logical unit than the one that was opened: no read is answered")
    queue_fail(lun.queue, ESTALE)
    session_fail(&lun.session, b"another logical unit")


cdef void give_up(lun_t* lun) noexcept nogil:
    """End a session that failed; what was in flight waits for the next one, which `prepare` begins."""
    cdef session_t* session = &lun.session
    cdef char text[NEWS_SIZE]
    drop(lun)
    if not lun.online:
        session.portal = (session.portal + 1) % session.login.portal_count
    if lun.pause:  # one that is back at once is not worth a line
        snprintf(text, NEWS_SIZE, b"%.200s; connecting again, while reads wait", session.why)
        queue_tell(lun.queue, TROUBLE, text)
    lun.online = 0
    lun.next_attempt = monotonic() + lun.pause
    lun.pause = min(max(2 * lun.pause, <int64_t>FIRST_PAUSE), lun.longest_pause)


cdef void drop(lun_t* lun) noexcept nogil:
    cdef int i
    session_end(&lun.session)
    for i in range(IN_FLIGHT):
        if lun.parts[i].request != NULL:  # libiscsi forgets commands of a session that it logged out
            put_back(&lun.parts[i])


cdef bint in_flight(lun_t* lun) noexcept nogil:
    cdef int i
    for i in range(IN_FLIGHT):
        if lun.parts[i].request != NULL:
            return True
    return False


cdef int64_t submit(lun_t* lun) noexcept nogil:
    """Send what waits. Returns when to come back at the latest."""
    cdef request_t* request
    cdef bint some = False
    if monotonic() < lun.next_take:
        return lun.next_take
    while lun.free != NULL and not lun.session.failed:
        request = queue_take(lun.queue)
        if request == NULL:
            break
        start(lun, request)
        some = True
    if some and not lun.session.failed:
        session_send(&lun.session)
    return INT64_MAX


cdef void start(lun_t* lun, request_t* request) noexcept nogil:
    cdef part_t* part = lun.free
    cdef scsi_task* task
    lun.free = part.next
    part.request = request
    if request.kind == READ:
        task = start_read(lun, part)
    else:
        task = iscsi_get_lba_status_task(
            lun.session.context, lun.session.login.lun, request.offset // lun.facts.block_size, LBA_STATUS_SIZE,
            status_done, part)
    if task == NULL:
        session_fail(&lun.session, iscsi_get_error(lun.session.context))
        put_back(part)


cdef scsi_task* start_read(lun_t* lun, part_t* part) noexcept nogil:
    """Read whole blocks: what of them is outside of the request goes where nobody looks."""
    cdef request_t* request = part.request
    cdef uint32_t block_size = lun.facts.block_size
    cdef uint64_t lba = request.offset // block_size
    cdef uint32_t before = <uint32_t>(request.offset % block_size)
    cdef uint32_t behind = <uint32_t>(-(request.offset + request.length) % block_size)
    cdef int count = 0
    if before:
        part.pieces[count].iov_base = lun.scratch
        part.pieces[count].iov_len = before
        count += 1
    part.pieces[count].iov_base = request.buffer
    part.pieces[count].iov_len = request.length
    count += 1
    if behind:
        part.pieces[count].iov_base = lun.scratch
        part.pieces[count].iov_len = behind
        count += 1
    return iscsi_read16_iov_task(
        lun.session.context, lun.session.login.lun, lba, <uint32_t>(before + request.length + behind), <int>block_size,
        0, 0, 0, 0, 0, read_done, part, part.pieces, count)


cdef request_t* release(part_t* part) noexcept nogil:
    cdef request_t* request = part.request
    part.request = NULL
    part.next = part.lun.free
    part.lun.free = part
    return request


cdef void put_back(part_t* part) noexcept nogil:
    queue_put_back(part.lun.queue, release(part))


cdef void complete(part_t* part, int64_t result) noexcept nogil:
    queue_complete(part.lun.queue, release(part), result)


cdef void read_done(iscsi_context* context, int status, void* data, void* argument) noexcept nogil:
    cdef part_t* part = <part_t*>argument
    cdef scsi_task* task = <scsi_task*>data
    if part.request == NULL:
        return
    if not succeeded(part, status, task):
        pass
    elif task.residual_status != SCSI_RESIDUAL_NO_RESIDUAL:
        fail(part, b"the target sent less, or more, than it was asked for", -1)
    else:
        prove(part.lun)
        complete(part, <int64_t>part.request.length)
    scsi_free_scsi_task(task)


cdef void prove(lun_t* lun) noexcept nogil:
    if lun.pause:  # a login is no proof: what breaks off each read may let them all pass
        lun.pause = 0
        queue_tell(lun.queue, BACK, b"the target answers again")


cdef void status_done(iscsi_context* context, int status, void* data, void* argument) noexcept nogil:
    cdef part_t* part = <part_t*>argument
    cdef scsi_task* task = <scsi_task*>data
    if part.request == NULL:
        return
    if status == SCSI_STATUS_CHECK_CONDITION and task.sense.key == SCSI_SENSE_ILLEGAL_REQUEST:
        complete(part, 1)  # it maps blocks, but does not say which: all is data
    elif succeeded(part, status, task):
        complete(part, mapped(part.request, part.lun.facts.block_size, &task.datain))
    scsi_free_scsi_task(task)


cdef bint succeeded(part_t* part, int status, scsi_task* task) noexcept nogil:
    """Return whether the command did; if not, its request was completed or put back."""
    cdef lun_t* lun = part.lun
    if status == SCSI_STATUS_GOOD:
        return True
    if status == SCSI_STATUS_CHECK_CONDITION:
        return sensed(part, task.sense.key, task.sense.ascq)
    if status in (SCSI_STATUS_BUSY, SCSI_STATUS_TASK_SET_FULL, SCSI_STATUS_ACA_ACTIVE, SCSI_STATUS_TASK_ABORTED):
        repeat(part)
    elif status == SCSI_STATUS_RESERVATION_CONFLICT:
        fail(part, b"another host has reserved the unit for itself", -2)
    else:  # the session was ended, or is of no use
        if status == SCSI_STATUS_CANCELLED:
            session_fail(&lun.session, b"the connection was lost")
        session_fail(&lun.session, iscsi_get_error(lun.session.context))
        put_back(part)
    return False


cdef bint sensed(part_t* part, int key, int ascq) noexcept nogil:
    cdef lun_t* lun = part.lun
    cdef char text[NEWS_SIZE]
    if key in (SCSI_SENSE_NO_SENSE, SCSI_SENSE_RECOVERED_ERROR):
        return True
    if ascq in (
            SCSI_SENSE_ASCQ_LOGICAL_UNIT_NOT_SUPPORTED, SCSI_SENSE_ASCQ_CAPACITY_DATA_HAS_CHANGED,
            SCSI_SENSE_ASCQ_INQUIRY_DATA_HAS_CHANGED, REPORTED_LUNS_CHANGED):
        session_fail(&lun.session, b"the target's units have changed")  # the next login looks which one this is now
        put_back(part)
    elif key in (SCSI_SENSE_UNIT_ATTENTION, SCSI_SENSE_NOT_READY, SCSI_SENSE_COMMAND_ABORTED):
        repeat(part)
    else:
        snprintf(
            text, NEWS_SIZE, b"%s, %s (%#x), at offset %#llx", scsi_sense_key_str(key), scsi_sense_ascq_str(ascq), ascq,
            <unsigned long long>part.request.offset)
        fail(part, text, ascq)
    return False


cdef void repeat(part_t* part) noexcept nogil:
    """Ask again; the first time at once, because a unit's attention costs one command."""
    cdef uint32_t tries = part.request.tries
    if tries:
        part.lun.next_take = monotonic() + (<int64_t>FIRST_PAUSE << min(tries, <uint32_t>5))
    part.request.tries += 1
    put_back(part)


cdef void fail(part_t* part, const char* why, int code) noexcept nogil:
    """Fail this range; a line in the log if the last one was of another kind."""
    if part.lun.told != code:
        part.lun.told = code
        queue_tell(part.lun.queue, FAULT, why)
    complete(part, -EIO)

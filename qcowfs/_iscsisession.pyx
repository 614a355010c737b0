# cython: language_level=3, cdivision=True
# distutils: libraries = iscsi
"""A session with an iSCSI target: connecting, logging in, asking the logical unit what it is, noticing that it is dead.

Used by `_iscsi`. libiscsi connects again by itself, but waits seconds before it does, and does not look whether it is
the same unit afterwards: here a session that failed is ended, and a new one begun. Threads: see the .pxd.
"""

from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.string cimport memcmp, memcpy, memset, strncpy
from posix.fcntl cimport FD_CLOEXEC, F_SETFD, fcntl

from qcowfs._queue cimport NEWS_SIZE, monotonic, request_t
from qcowfs.clib.libiscsi cimport *
from qcowfs.clib.poll cimport POLLIN, POLLOUT, c_poll, pollfd_t

cdef enum:
    MILLISECOND = 1000000  # ns
    SMALLEST_BLOCK = 512  # bytes
    LARGEST_BLOCK = 65536
    ATTENTIONS = 10  # unit attentions for one command before it is a failure: resets of more than that are no accident
    PAGE_SIZE = 255  # bytes asked for of an INQUIRY: old units take no more
    DISK = 0  # peripheral device type
    BINARY_NAA = 3  # designator types of SPC-4, 7.8.6
    EUI64 = 2
    T10 = 1
    SCSI_NAME = 8

cdef enum identify_step:
    INQUIRY
    DESIGNATORS
    SERIAL
    LIMITS
    CAPACITY
    IDENTIFIED

DIGESTS = {
    "": ISCSI_HEADER_DIGEST_NONE_CRC32C, "none": ISCSI_HEADER_DIGEST_NONE, "crc32c": ISCSI_HEADER_DIGEST_CRC32C,
}
cdef uint64_t LARGEST_SIZE = 0x7FFFFFFFFFFFFFFF


cdef int describe_login(login_t* login, dict words) except -1:
    cdef int i
    copy_word(login.initiator, words["initiator"])
    copy_word(login.target, words["target"])
    copy_word(login.user, words["user"])
    copy_word(login.password, words["password"])
    copy_word(login.target_user, words["target_user"])
    copy_word(login.target_password, words["target_password"])
    portals = words["portals"][:PORTALS]
    for i in range(len(portals)):
        copy_word(login.portals[i], portals[i])
    login.portal_count = <uint32_t>len(portals)
    login.lun = words["lun"]
    login.header_digest = DIGESTS[words["header_digest"]]
    return 0


cdef int copy_word(char* field, bytes word) except -1:
    if len(word) >= NAME_SIZE or b"\0" in word:
        raise ValueError("too long for libiscsi, or with a NUL")
    strncpy(field, word, NAME_SIZE)
    return 0


cdef void session_fail(session_t* session, const char* why) noexcept nogil:
    if not session.failed:  # the first reason is the one that counts
        session.failed = 1
        strncpy(session.why, why, NEWS_SIZE - 1)


cdef void session_begin(session_t* session) noexcept nogil:
    cdef login_t* login = &session.login
    session.failed = 0
    session.state = CONNECTING
    session.since = session.heard = monotonic()
    session.context = iscsi_create_context(login.initiator)
    if session.context == NULL:
        session_fail(session, b"out of memory")
        return
    iscsi_set_noautoreconnect(session.context, 1)
    iscsi_set_targetname(session.context, login.target)
    iscsi_set_session_type(session.context, ISCSI_SESSION_NORMAL)
    iscsi_set_header_digest(session.context, login.header_digest)
    if login.user[0]:
        iscsi_set_initiator_username_pwd(session.context, login.user, login.password)
    if login.target_user[0]:
        iscsi_set_target_username_pwd(session.context, login.target_user, login.target_password)
    if iscsi_full_connect_async(
            session.context, login.portals[session.portal], login.lun, connected, session) != 0:
        session_fail(session, iscsi_get_error(session.context))
        return
    fcntl(iscsi_get_fd(session.context), F_SETFD, FD_CLOEXEC)


cdef void session_end(session_t* session) noexcept nogil:
    if session.context != NULL:
        session.failed = 1  # callbacks that are called now have nothing to begin
        iscsi_destroy_context(session.context)
        session.context = NULL
    session.state = OFFLINE
    session.failed = 0


cdef void session_logout(session_t* session, int64_t deadline) noexcept nogil:
    if session.state == ONLINE and not session.failed:
        if iscsi_logout_async(session.context, logged_out, session) == 0:
            while not session.failed and monotonic() < deadline:
                session_wait(session, -1, deadline)
    session_end(session)


cdef void logged_out(iscsi_context* context, int status, void* data, void* argument) noexcept nogil:
    session_fail(<session_t*>argument, b"logged out")


cdef int session_wait(session_t* session, int wakeup, int64_t deadline) noexcept nogil:
    cdef pollfd_t descriptors[2]
    cdef int64_t left = deadline - monotonic()
    cdef int milliseconds = -1 if deadline == INT64_MAX else <int>max(0, min(left // MILLISECOND + 1, 60000))
    descriptors[0].fd = wakeup
    descriptors[0].events = POLLIN
    descriptors[0].revents = descriptors[1].revents = 0
    descriptors[1].fd = -1
    if session.context != NULL:
        descriptors[1].fd = iscsi_get_fd(session.context)
        descriptors[1].events = <short>iscsi_which_events(session.context)
    if c_poll(descriptors, 2, 0 if left <= 0 else milliseconds) <= 0:
        return 0  # the deadline, or a signal
    if descriptors[1].revents:
        if descriptors[1].revents & POLLIN:
            session.heard = monotonic()
        serve(session, descriptors[1].revents)
    return descriptors[0].revents != 0


cdef void session_send(session_t* session) noexcept nogil:
    if iscsi_which_events(session.context) & POLLOUT:
        serve(session, POLLOUT)


cdef void serve(session_t* session, int events) noexcept nogil:
    if iscsi_service(session.context, events) != 0:
        if session.state == ONLINE:
            session_fail(session, b"the connection was lost")
        else:
            session_fail(session, b"the target closed the connection during the login")


cdef int64_t session_watch(session_t* session, int64_t now) noexcept nogil:
    cdef int64_t ask = session.heard + session.silence // 3
    cdef int64_t dead = session.heard + session.silence
    if now >= dead:
        session_fail(session, b"the target does not answer")
        return now
    if session.state != ONLINE or iscsi_get_nops_in_flight(session.context):
        return dead
    if now < ask:
        return ask
    if iscsi_nop_out_async(session.context, NULL, NULL, 0, NULL) != 0:
        session_fail(session, iscsi_get_error(session.context))
    return dead


cdef void connected(iscsi_context* context, int status, void* data, void* argument) noexcept nogil:
    cdef session_t* session = <session_t*>argument
    if session.failed:
        return
    if status != SCSI_STATUS_GOOD:
        session_fail(session, iscsi_get_error(context))
        return
    memset(&session.facts, 0, sizeof(facts_t))
    session.state = IDENTIFYING
    session.step = INQUIRY
    session.attentions = 0
    ask_step(session)


cdef void ask_step(session_t* session) noexcept nogil:
    cdef iscsi_context* context = session.context
    cdef int lun = session.login.lun
    cdef scsi_task* task
    if session.step == INQUIRY:
        task = iscsi_inquiry_task(context, lun, 0, 0, PAGE_SIZE, answered, session)
    elif session.step == DESIGNATORS:
        task = iscsi_inquiry_task(context, lun, 1, 0x83, PAGE_SIZE, answered, session)
    elif session.step == SERIAL:
        task = iscsi_inquiry_task(context, lun, 1, 0x80, PAGE_SIZE, answered, session)
    elif session.step == LIMITS:
        task = iscsi_inquiry_task(context, lun, 1, 0xB0, PAGE_SIZE, answered, session)
    else:
        task = iscsi_readcapacity16_task(context, lun, answered, session)
    if task == NULL:
        session_fail(session, iscsi_get_error(context))


cdef void answered(iscsi_context* context, int status, void* data, void* argument) noexcept nogil:
    cdef session_t* session = <session_t*>argument
    cdef scsi_task* task = <scsi_task*>data
    cdef bint refused = status == SCSI_STATUS_CHECK_CONDITION and task.sense.key == SCSI_SENSE_ILLEGAL_REQUEST
    if status == SCSI_STATUS_CHECK_CONDITION and task.sense.key == SCSI_SENSE_UNIT_ATTENTION:
        session.attentions += 1
        if session.attentions > ATTENTIONS:
            session_fail(session, iscsi_get_error(context))
    elif status == SCSI_STATUS_GOOD:
        note(session, task.datain.data, <uint32_t>max(task.datain.size, 0))
        session.step += 1
    elif refused and session.step in (DESIGNATORS, SERIAL, LIMITS):  # not every unit has all pages
        session.step += 1
    else:
        session_fail(session, iscsi_get_error(context))
    scsi_free_scsi_task(task)
    if session.failed:
        return
    if session.step == IDENTIFIED:
        session.state = ONLINE
    else:
        ask_step(session)


cdef void note(session_t* session, const uint8_t* data, uint32_t size) noexcept nogil:
    if session.step == INQUIRY:
        note_type(session, data, size)
    elif session.step == DESIGNATORS:
        note_designator(&session.facts.designator, data, size)
    elif session.step == SERIAL:
        if size > 4 and data[1] == 0x80:
            copy_identity(&session.facts.serial, data + 4, <uint32_t>min(data[3], size - 4))
    elif session.step == LIMITS:
        if size >= 12 and data[1] == 0xB0:
            session.facts.largest = <uint32_t>big_endian(data + 8, 4)
    else:
        note_capacity(session, data, size)


cdef void note_type(session_t* session, const uint8_t* data, uint32_t size) noexcept nogil:
    cdef char text[NEWS_SIZE]
    if size < 1 or data[0] >> 5:  # the peripheral qualifier: there is no such unit
        session_fail(session, b"there is no such LUN")
    elif data[0] & 0x1F != DISK:
        snprintf(text, NEWS_SIZE, b"not a disk, but a device of SCSI type %#x", <int>(data[0] & 0x1F))
        session_fail(session, text)


cdef void note_capacity(session_t* session, const uint8_t* data, uint32_t size) noexcept nogil:
    cdef facts_t* facts = &session.facts
    cdef uint64_t last
    cdef char text[NEWS_SIZE]
    if size < 15:
        session_fail(session, b"the answer to READ CAPACITY(16) is too short")
        return
    last = big_endian(data, 8)
    facts.block_size = <uint32_t>big_endian(data + 8, 4)
    facts.thin = data[14] >> 6 == 3  # LBPME and LBPRZ
    if not SMALLEST_BLOCK <= facts.block_size <= LARGEST_BLOCK or facts.block_size & (facts.block_size - 1):
        snprintf(
            text, NEWS_SIZE, b"blocks of %u bytes: a power of 2 from %d to %d was expected", facts.block_size,
            SMALLEST_BLOCK, LARGEST_BLOCK)
        session_fail(session, text)
    elif last >= LARGEST_SIZE // facts.block_size:
        session_fail(session, b"it says that it has more than 2^63 bytes")
    else:
        facts.blocks = last + 1


cdef void note_designator(identity_t* identity, const uint8_t* data, uint32_t size) noexcept nogil:
    """Keep the designator of the unit (not of a port) that says most about it."""
    cdef uint32_t place = 4
    cdef uint32_t length
    cdef int rank
    cdef int best = 0
    if size < 4 or data[1] != 0x83:
        return
    size = <uint32_t>min(size, 4 + big_endian(data + 2, 2))
    while place + 4 <= size:
        length = data[place + 3]
        if place + 4 + length > size:
            return
        rank = rank_of(data[place + 1], length)
        if rank > best:
            best = rank
            copy_identity(identity, data + place, 2)
            memcpy(identity.data + 2, data + place + 4, length)  # PAGE_SIZE - 8 bytes at most
            identity.size = 2 + length
        place += 4 + length


cdef int rank_of(uint8_t kind, uint32_t length) noexcept nogil:
    cdef int of_what = kind >> 4 & 3  # the association: 0 is the logical unit
    kind &= 0xF
    if of_what or not length:
        return 0
    if kind == BINARY_NAA:
        return 4
    if kind == EUI64:
        return 3
    if kind == SCSI_NAME:
        return 2
    return 1 if kind == T10 else 0


cdef void copy_identity(identity_t* identity, const uint8_t* data, uint32_t size) noexcept nogil:
    identity.size = min(size, <uint32_t>DESIGNATOR_SIZE)
    memcpy(identity.data, data, identity.size)


cdef int same_unit(const facts_t* before, const facts_t* now) noexcept nogil:
    # A unit may grow or shrink and is the same; of one that has neither designator nor serial the size is all there is.
    if before.block_size != now.block_size:
        return 0
    if not before.designator.size and not before.serial.size and before.blocks != now.blocks:
        return 0
    return same_identity(&before.designator, &now.designator) and same_identity(&before.serial, &now.serial)


cdef int same_identity(const identity_t* before, const identity_t* now) noexcept nogil:
    return before.size == now.size and not memcmp(before.data, now.data, now.size)


cdef int mapped(request_t* request, uint32_t block_size, const scsi_data* answer) noexcept nogil:
    """Return whether the first of the blocks asked about is data (1), and cut the request to what is like it."""
    cdef uint64_t end
    if answer.size < LBA_STATUS_SIZE or big_endian(answer.data + 8, 8) > request.offset // block_size:
        return 1
    # The sum of block number and count is below 2^63 + 2^32, as the first is not above that of the request.
    end = big_endian(answer.data + 8, 8) + big_endian(answer.data + 16, 4)
    if end <= request.offset // block_size:
        return 1
    if end < (request.offset + request.length) // block_size:
        request.length = end * block_size - request.offset
    return (answer.data[20] & 0xF) != 1  # deallocated; blocks that are anchored may be anything


cdef uint64_t big_endian(const uint8_t* data, uint32_t size) noexcept nogil:
    cdef uint64_t value = 0
    cdef uint32_t i
    for i in range(size):
        value = value << 8 | data[i]
    return value

# One session with an iSCSI target, and what the logical unit says that it is.
#
# Of the one thread that serves the unit, but for the opening, which comes before that thread is started.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from qcowfs._queue cimport NEWS_SIZE, request_t
from qcowfs.clib.libiscsi cimport iscsi_context, scsi_data

cdef enum:
    NAME_SIZE = 256  # libiscsi's MAX_STRING_SIZE + 1
    PORTALS = 8
    LBA_STATUS_SIZE = 8 + 16  # bytes of an answer to GET LBA STATUS with one descriptor
    DESIGNATOR_SIZE = 256  # bytes: their length is one byte

cdef enum session_state:
    OFFLINE  # no context
    CONNECTING  # and logging in
    IDENTIFYING
    ONLINE


cdef struct login_t:  # does not change after opening; the strings end with a NUL
    char initiator[NAME_SIZE]
    char target[NAME_SIZE]
    char user[NAME_SIZE]  # empty: no CHAP
    char password[NAME_SIZE]
    char target_user[NAME_SIZE]  # empty: the target need not show who it is
    char target_password[NAME_SIZE]
    char portals[PORTALS][NAME_SIZE]  # numeric addresses with ports: resolving a name could block for long
    uint32_t portal_count
    int lun
    int header_digest


cdef struct identity_t:  # a VPD page's
    uint32_t size  # bytes; 0: the unit has none
    uint8_t data[DESIGNATOR_SIZE]


cdef struct facts_t:
    uint64_t blocks
    uint32_t block_size  # bytes, a power of 2 from 512 on
    uint32_t largest  # blocks that one command may ask for; 0: any number
    int thin  # 1: blocks that are not mapped are known, and read as zeros
    identity_t designator  # VPD 0x83: code set and type, then the designator
    identity_t serial  # VPD 0x80


cdef struct session_t:
    login_t login
    iscsi_context* context
    session_state state
    uint32_t portal  # that is tried, or was tried last
    uint32_t step  # of IDENTIFYING
    uint32_t attentions  # that the step had to be repeated for
    int failed  # 1: of no more use, to be ended; see `why`
    char why[NEWS_SIZE]
    int64_t since  # ns of monotonic(): when the attempt began
    int64_t heard  # ns: when the target sent something last
    int64_t silence  # ns of it after which the target is taken for dead; a NOP goes out after a third of that
    facts_t facts


# Fill `login` with initiator, target, user, password, target_user, target_password (bytes), portals (a list of bytes,
# "address:port"), lun (int) and header_digest ("none", "crc32c", or "": as the target likes). ValueError: too long.
cdef int describe_login(login_t* login, dict words) except -1

# Begin to connect. The rest is done by session_wait, until the state is ONLINE or `failed` is set.
cdef void session_begin(session_t* session) noexcept nogil
# Drop the connection; callbacks of what is in flight are called with SCSI_STATUS_CANCELLED.
cdef void session_end(session_t* session) noexcept nogil
# Log out, for which it waits until `deadline`, and end. Nothing may be in flight.
cdef void session_logout(session_t* session, int64_t deadline) noexcept nogil
# Wait until the target, or `wakeup` (an eventfd, or -1), has something, at most until `deadline`, and serve the target.
# Returns 1 if it was `wakeup`.
cdef int session_wait(session_t* session, int wakeup, int64_t deadline) noexcept nogil
# Send now what was submitted since.
cdef void session_send(session_t* session) noexcept nogil
# Take a target for dead that is silent for too long, and ask one that was silent for a while. Returns the next time.
cdef int64_t session_watch(session_t* session, int64_t now) noexcept nogil
cdef void session_fail(session_t* session, const char* why) noexcept nogil

cdef int same_unit(const facts_t* before, const facts_t* now) noexcept nogil
# What an answer to GET LBA STATUS says of the request, a STATUS.
cdef int mapped(request_t* request, uint32_t block_size, const scsi_data* answer) noexcept nogil

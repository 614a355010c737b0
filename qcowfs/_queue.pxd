# Reads that wait for the one thread which talks to a server: the queue between the two, patience, and news for the log.
#
# A request belongs to its reader while it is WAITING: who runs out of patience takes it out of the queue and leaves. It
# belongs to the service thread while it is HELD, because a library may be writing to its buffer: only that thread ends
# it then, which is why that thread keeps the time of what it holds (queue_deadline).
#
# "The service thread" is whoever has the wheel. While all is well that is the reader who finds it free: he sends his
# request and waits for the answer himself, which saves waking two threads for each read, and hands the wheel to another
# reader when he has what he wanted. The thread of that name looks after what nobody waits for, and takes over as soon
# as anything is wrong.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs.clib.pthread cimport pthread_cond_t, pthread_mutex_t

cdef enum:
    NEWS_SIZE = 256

cdef enum request_kind:
    READ
    STATUS

cdef enum request_state:
    WAITING
    HELD
    DONE

cdef enum news_kind:
    NO_NEWS
    TROUBLE  # the server is gone, or silent; told once, until BACK
    BACK
    FAULT  # one range cannot be read, or none any more


cdef enum:  # reader_t.awake
    ASLEEP  # in futex_wait, which waits for any other
    ANSWERED
    CALLED
    BUSY  # with something else than waiting: nobody has to wake it

cdef struct reader_t:  # gone as soon as `awake` is ANSWERED
    uint32_t awake  # atomic, a futex; ANSWERED: all requests are DONE; CALLED: it may take the wheel
    uint32_t missing  # requests that are not
    int64_t error  # -errno of the first one that failed, 0: none


cdef struct request_t:
    request_t* next  # of its list: waiting or held
    request_t* previous
    reader_t* reader
    request_kind kind
    request_state state
    char* buffer  # READ: `length` bytes
    uint64_t offset  # bytes
    uint64_t length  # bytes, > 0, within the source; STATUS: whoever answers may make it less
    int64_t deadline  # ns of monotonic()
    int64_t result  # READ: bytes, all that were asked for; STATUS: 1 data, 0 a hole; or -errno
    uint32_t tries  # the service thread's own


cdef struct request_list_t:
    request_t* first
    request_t* last


# One turn of talking to the server, from sending what waits to ending what was answered, or to the first deadline.
# False: something is wrong, and only the service thread itself may go on.
ctypedef bint (*turn_t)(void* argument) noexcept nogil


cdef struct queue_t:
    turn_t turn  # by whoever has the wheel; NULL: readers do not
    void* argument
    uint32_t wheel  # atomic; 1: somebody has it
    uint32_t led  # atomic: how often a reader had it
    uint32_t needed  # atomic, a futex; 1: the service thread shall take the wheel
    pthread_mutex_t mutex  # of all below; nothing is called with it held
    request_list_t waiting  # in the order of their deadlines
    request_list_t held
    int wakeup  # an eventfd, readable once something was queued, or when `error` was set
    int error  # errno that every read gets from now on; 0: none
    int64_t patience  # ns that one read may take
    uint64_t largest  # bytes of one request, which does not cross a multiple of it either
    pthread_cond_t told
    news_kind news  # not fetched yet
    int trouble  # 1: TROUBLE was the last word on the connection
    int ended  # 1: there will be no more news
    char text[NEWS_SIZE]


cdef int64_t monotonic() noexcept nogil  # ns

# For the service thread. queue_take returns the oldest request, HELD from now on, or NULL; queue_put_back makes one
# that is held WAITING again, at its place; each request that was taken is put back or completed.
cdef request_t* queue_take(queue_t* queue) noexcept nogil
cdef void queue_put_back(queue_t* queue, request_t* request) noexcept nogil
cdef void queue_complete(queue_t* queue, request_t* request, int64_t result) noexcept nogil
# When the oldest request that is held must be given up, in ns; INT64_MAX: none is held.
cdef int64_t queue_deadline(queue_t* queue) noexcept nogil
# The same of one that waits.
cdef int64_t queue_first_deadline(queue_t* queue) noexcept nogil
# Read the eventfd empty, after poll() said that it is readable.
cdef void queue_woken(queue_t* queue) noexcept nogil

# For any thread. Each read that waits, each later one, and each that is put back, fails with `error` at once.
cdef void queue_fail(queue_t* queue, int error) noexcept nogil
cdef int queue_failed(queue_t* queue) noexcept nogil  # that errno, or 0
cdef int queue_in_trouble(queue_t* queue) noexcept nogil  # TROUBLE was the last word on the connection
# Leave `text` for the log. TROUBLE is dropped while there is trouble, BACK while there is none.
cdef void queue_tell(queue_t* queue, news_kind kind, const char* text) noexcept nogil

# For _requests: wake who is ASLEEP, and its parts of what is above.
cdef void call(uint32_t* word, uint32_t value) noexcept nogil
cdef void insert(request_list_t* list, request_t* request) noexcept nogil
cdef void remove(request_list_t* list, request_t* request) noexcept nogil
cdef reader_t* finish(request_t* request, int64_t result) noexcept nogil
cdef void wake(reader_t* reader) noexcept nogil
cdef news_kind fetch_news(queue_t* queue, char* text) noexcept nogil
cdef void end_news(queue_t* queue) noexcept nogil

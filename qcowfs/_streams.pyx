# cython: language_level=3, cdivision=True
"""Sequential readers of remote sources, and how far ahead of each is worth reading.

Used by `_blockread`. No Python, no GIL; any thread. The window is twice what the reader has read, so a reader that
stops early has cost at most three times what it wanted; it ends where all windows together would fill what the cache
has for data that was not used yet.
"""

from libc.stdint cimport uint32_t, uint64_t

from qcowfs.clib.pthread cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

cdef enum:
    LARGEST_WINDOW = 16 << 20  # bytes: 300 MB/s from a server 50 ms away
    STEP = 1 << 20  # bytes: a large window is moved on in requests of at least this
    LARGEST_SLACK = 4 << 20  # bytes: the kernel's reads ahead come in any order, eight of 512 KiB or so at a time
    ACTIVE = 1024  # reads of others since its last one, and a stream is not counted any more


cdef void streams_init(streams_t* streams, uint64_t unit, uint64_t budget) noexcept nogil:
    cdef uint32_t number
    pthread_mutex_init(&streams.lock, NULL)
    streams.unit = unit
    streams.budget = budget
    streams.reads = 0
    for number in range(<uint32_t>STREAMS):
        streams.streams[number].source = 0
        streams.streams[number].seen = 0


cdef void streams_destroy(streams_t* streams) noexcept nogil:
    pthread_mutex_destroy(&streams.lock)


cdef bint streams_follow(
    streams_t* streams, uint32_t source, uint64_t offset, uint64_t end, uint64_t size,
    uint64_t* start, uint64_t* upto) noexcept nogil:
    cdef stream_t* stream
    cdef bint wanted = False
    pthread_mutex_lock(&streams.lock)
    streams.reads += 1
    stream = find(streams, source, offset)
    if stream == NULL:
        begin(oldest(streams), source, offset, end)
    else:
        stream.bytes += end - offset
        stream.next = max(stream.next, end)
        wanted = move(streams, stream, size, start, upto)
    if stream != NULL:
        stream.seen = streams.reads
    pthread_mutex_unlock(&streams.lock)
    return wanted


cdef stream_t* find(streams_t* streams, uint32_t source, uint64_t offset) noexcept nogil:
    cdef stream_t* stream
    cdef uint64_t slack
    cdef uint32_t number
    for number in range(<uint32_t>STREAMS):
        stream = &streams.streams[number]
        slack = min(stream.bytes, <uint64_t>LARGEST_SLACK)
        if stream.source == source and offset <= stream.next + slack and stream.next <= offset + slack:
            return stream
    return NULL


cdef stream_t* oldest(streams_t* streams) noexcept nogil:
    cdef stream_t* found = &streams.streams[0]
    cdef uint32_t number
    for number in range(1, <uint32_t>STREAMS):
        if streams.streams[number].seen < found.seen:
            found = &streams.streams[number]
    found.seen = streams.reads
    return found


cdef void begin(stream_t* stream, uint32_t source, uint64_t offset, uint64_t end) noexcept nogil:
    stream.source = source
    stream.start = offset
    stream.next = end
    stream.bytes = end - offset
    stream.ahead = 0


cdef bint move(
    streams_t* streams, stream_t* stream, uint64_t size, uint64_t* start, uint64_t* upto) noexcept nogil:
    """Move the window on; True where that means to read something."""
    cdef uint64_t window = min(2 * stream.bytes, most_ahead(streams, stream))
    cdef uint64_t goal
    if stream.bytes < (stream.next - stream.start) // 2:  # most of it is jumped over: nobody reads all of this
        begin(stream, stream.source, stream.next, stream.next)
        return False
    stream.ahead = max(stream.ahead, round_up(stream.next, streams.unit))
    goal = min(stream.next + window, size)
    if goal < size:
        goal -= goal % streams.unit
    if goal <= stream.ahead or (goal < size and goal - stream.ahead < min(window // 2, <uint64_t>STEP)):
        return False
    start[0] = stream.ahead
    upto[0] = goal
    stream.ahead = goal
    return True


cdef uint64_t most_ahead(const streams_t* streams, const stream_t* stream) noexcept nogil:
    cdef uint64_t active = 1
    cdef const stream_t* other
    cdef uint32_t number
    for number in range(<uint32_t>STREAMS):
        other = &streams.streams[number]
        if other != stream and other.ahead > other.next and streams.reads - other.seen < ACTIVE:
            active += 1
    return min(streams.budget // active, <uint64_t>LARGEST_WINDOW)


cdef inline uint64_t round_up(uint64_t offset, uint64_t unit) noexcept nogil:
    return (offset + unit - 1) // unit * unit

# Who reads remote sources from the front to the back, and how far ahead of him it is worth reading.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs.clib.pthread cimport pthread_mutex_t

cdef enum:
    STREAMS = 32  # readers that are told apart; sixteen at once are many, and random readers take places as well


cdef struct stream_t:
    uint32_t source  # its identity; 0: nobody
    uint64_t start  # where it began
    uint64_t next  # where it is expected to go on
    uint64_t bytes  # read since `start`
    uint64_t ahead  # up to here somebody reads ahead; a multiple of `unit`, or the end
    uint64_t seen  # `reads` at its last read


cdef struct streams_t:
    pthread_mutex_t lock  # guards all of this
    uint64_t unit  # bytes of a block
    uint64_t budget  # bytes that all of them together may be ahead
    uint64_t reads  # the clock
    stream_t streams[STREAMS]


cdef void streams_init(streams_t* streams, uint64_t unit, uint64_t budget) noexcept nogil
cdef void streams_destroy(streams_t* streams) noexcept nogil
# Somebody reads [offset, end) of a source of `size` bytes. True: start[0] to upto[0] should be read ahead now.
cdef bint streams_follow(
    streams_t* streams, uint32_t source, uint64_t offset, uint64_t end, uint64_t size,
    uint64_t* start, uint64_t* upto) noexcept nogil

# cython: language_level=3, cdivision=True
"""One remote source over several connections: each reader has one to himself while there is a free one.

Used by source/lanes.py. On a connection that two readers share, one waits until the other has woken him, which costs
more than the bytes of a small read. So the second connection is opened when two want to read at once, with all others,
in a thread of their own; where that does not work, one has to be enough. Any thread.
"""

import logging
import threading
from contextlib import suppress

from cython cimport no_gc_clear
from libc.errno cimport ESTALE
from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs._queue cimport queue_fail, queue_in_trouble, queue_t
from qcowfs._requests cimport QueuedSource
from qcowfs._source cimport Source, source_t
from qcowfs.errors import QcowfsError
from qcowfs.clib.atomic cimport atomic_add, atomic_exchange, atomic_load, atomic_store

cdef enum:
    REST = 60  # seconds between two attempts to have more: the server may be away, or may want no more
    LANES = 4  # as many as QEMU's nbdcopy and Linux' NBD clients take

logger = logging.getLogger("qcowfs.source")


cdef struct lane_t:
    const source_t* source
    queue_t* queue
    uint32_t busy  # atomic; 1: a reader has it


cdef struct lanes_t:
    lane_t lanes[LANES]
    uint32_t count  # atomic: those that may be used
    uint32_t wanted  # atomic; 1: somebody found no free one, and no other attempt is to be made now
    uint32_t reviving  # atomic; 1: those that were given up are being tried, or were just now
    uint32_t turn  # atomic: whose connection is shared next
    void* owner


@no_gc_clear  # `first` and `others` are read through until this is gone
cdef class LanesSource(Source):
    """`first`, and further connections once two readers want to read at once.

    Args:
        first: belongs to this object from now on.
        another: called without arguments, in a thread of its own; returns a source of the same bytes, or raises
            OSError or QcowfsError: there is none to be had now.
    """

    cdef lanes_t lanes
    cdef QueuedSource first
    cdef list others
    cdef object another
    cdef object lock
    cdef object closed

    def __init__(self, QueuedSource first not None, another):
        self.name = first.name
        self.first = first
        self.others = []
        self.another = another
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.lanes.owner = <void*>self
        add(&self.lanes, first)
        self.c.state = &self.lanes
        self.c.pread = lanes_pread
        self.c.status = lanes_status
        self.c.end = lanes_end

    @property
    def connections(self):
        """How many there are."""
        return atomic_load(&self.lanes.count)

    def place(self):
        return self.first.place()

    def open_others(self):
        """Open the further connections, as many as can be had."""
        try:
            while len(self.others) + 1 < LANES and not self.closed.is_set():
                self.keep(self.another())
        except (OSError, QcowfsError) as error:
            logger.debug("%s: no connection but %d: %s", self.name, len(self.others) + 1, error)
            if not self.closed.wait(REST):
                atomic_store(&self.lanes.wanted, 0)

    def revive(self):
        """Read over each connection that nobody is sent to any more; where that goes well it is used again."""
        for other in list(self.others):
            if queue_in_trouble(&(<QueuedSource>other).queue):
                with suppress(OSError):
                    other.read_at(0, 1)
        if not self.closed.wait(REST):
            atomic_store(&self.lanes.reviving, 0)

    cdef int keep(self, QueuedSource other) except -1:
        with self.lock:
            if not self.closed.is_set():
                self.others.append(other)
                add(&self.lanes, other)
                return 0
        other.close()
        return 0

    def close(self):
        with self.lock:
            self.closed.set()
        for source in (self.first, *self.others):
            source.close()


cdef void add(lanes_t* lanes, QueuedSource source) noexcept:
    cdef lane_t* lane = &lanes.lanes[lanes.count]
    lane.source = &source.c
    lane.queue = &source.queue
    atomic_add(&lanes.count, 1)  # after the lane was made: readers look at `count` first


cdef int64_t lanes_pread(const source_t* source, void* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    cdef lanes_t* lanes = <lanes_t*>source.state
    cdef lane_t* lane = free_lane(lanes)
    cdef bint alone = lane != NULL
    cdef int64_t got
    if not alone:
        want_more(lanes)
        lane = shared_lane(lanes)
    got = lane.source.pread(lane.source, buffer, length, offset)
    if alone:
        atomic_store(&lane.busy, 0)
    if got == -ESTALE:
        fail(lanes, ESTALE)  # what one connection knows is so for all: never a mixture
    return got


cdef lane_t* free_lane(lanes_t* lanes) noexcept nogil:
    """Return a connection that is this reader's until he gives it back, or NULL."""
    cdef uint32_t number
    for number in range(atomic_load(&lanes.count)):
        if is_usable(lanes, number) and not atomic_exchange(&lanes.lanes[number].busy, 1):
            return &lanes.lanes[number]
    return NULL


cdef void want_more(lanes_t* lanes) noexcept nogil:
    if not atomic_exchange(&lanes.wanted, 1):
        begin(lanes, False)
    if is_worth_reviving(lanes) and not atomic_exchange(&lanes.reviving, 1):
        begin(lanes, True)


cdef lane_t* shared_lane(lanes_t* lanes) noexcept nogil:
    cdef uint32_t number = atomic_add(&lanes.turn, 1) % atomic_load(&lanes.count)
    return &lanes.lanes[number if is_usable(lanes, number) else 0]


cdef bint is_usable(lanes_t* lanes, uint32_t number) noexcept nogil:
    """Return whether somebody may be sent there. The first one waits for its server as long as it takes."""
    return number == 0 or not queue_in_trouble(lanes.lanes[number].queue)


cdef bint is_worth_reviving(lanes_t* lanes) noexcept nogil:
    """Return whether the server is there, as far as the first one knows, and another one was given up."""
    cdef uint32_t number
    if queue_in_trouble(lanes.lanes[0].queue):
        return False
    for number in range(1, atomic_load(&lanes.count)):
        if queue_in_trouble(lanes.lanes[number].queue):
            return True
    return False


cdef void fail(lanes_t* lanes, int error) noexcept nogil:
    cdef uint32_t number
    for number in range(atomic_load(&lanes.count)):
        queue_fail(lanes.lanes[number].queue, error)


cdef void begin(lanes_t* lanes, bint reviving) noexcept with gil:
    owner = <object>lanes.owner
    work = owner.revive if reviving else owner.open_others
    threading.Thread(target=work, name="qcowfs-lanes", daemon=True).start()


cdef int lanes_status(const source_t* source, uint64_t offset, uint64_t* length) noexcept nogil:
    cdef const source_t* first = (<lanes_t*>source.state).lanes[0].source
    return first.status(first, offset, length)


cdef int64_t lanes_end(const source_t* source) noexcept nogil:
    cdef const source_t* first = (<lanes_t*>source.state).lanes[0].source
    return first.end(first)

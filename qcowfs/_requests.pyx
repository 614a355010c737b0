# cython: language_level=3, cdivision=True
"""Reads that wait for whoever talks to a server: one thread at a time.

Used by the rooms of protocols whose library is not made for many threads, or that keep many reads in flight on one
connection. Readers are any number of threads; who talks to the server, a reader or the service thread, runs no Python
meanwhile. See _queue.pxd for who owns a request when, and who has the wheel.
"""

import os

from libc.errno cimport EBADF, EIO, ETIMEDOUT, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.time cimport timespec

from qcowfs._queue cimport (
    ANSWERED, ASLEEP, BACK, BUSY, CALLED, FAULT, NEWS_SIZE, NO_NEWS, READ, STATUS, TROUBLE, WAITING, call, end_news,
    fetch_news, finish, insert, monotonic, news_kind, queue_fail, queue_failed, queue_t, reader_t, remove, request_kind,
    request_t, turn_t, wake,
)
from qcowfs._source cimport Source, source_t
from qcowfs._threads cimport thread_start, thread_stop
from qcowfs.clib.atomic cimport atomic_add, atomic_exchange, atomic_load, atomic_store
from qcowfs.clib.futex cimport futex_wait
from qcowfs.clib.poll cimport EFD_CLOEXEC, EFD_NONBLOCK, eventfd, eventfd_write
from qcowfs.clib.pthread cimport (
    pthread_cond_destroy, pthread_cond_init, pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock,
    pthread_mutex_unlock,
)
from qcowfs.clib.unistd cimport c_close

cdef enum:
    PARTS = 16  # requests that one read has in the queue at once
    SECOND = 1000000000  # ns
    LED_NS = 50000000  # without a reader who had the wheel, and the service thread takes it


cdef class QueuedSource(Source):
    """Bytes that a thread of this object's own gets from a server. An abstract base.

    Args:
        name: for messages.
        patience: seconds that one read may take.
        largest: bytes that one request may ask the server for, a multiple of its blocks.

    The subclass sets `c.room`, the size as of opening, before the first read, and calls `serve`.
    """

    def __init__(self, str name, double patience, uint64_t largest):
        cdef int event = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if event < 0:
            raise OSError(errno, os.strerror(errno), name)
        self.name = name
        self.queue.wakeup = event
        self.queue.patience = <int64_t>(patience * SECOND)
        self.queue.largest = largest
        pthread_mutex_init(&self.queue.mutex, NULL)
        pthread_cond_init(&self.queue.told, NULL)
        self.ready = True
        self.c.state = &self.queue
        self.c.pread = queued_pread
        self.c.status = queued_status
        self.c.end = queued_end

    cdef int serve(self, void (*work)(void*) noexcept nogil, turn_t turn, void* argument) except -1:
        cdef int status
        self.queue.turn = turn
        self.queue.argument = argument
        self.queue.wheel = 1
        status = thread_start(&self.thread, work, argument)
        if status:
            raise OSError(status, os.strerror(status), self.name)
        self.running = True
        return 0

    def news(self):
        """Wait for something to say in the log; return it with "trouble", "back" or "fault" before it, or None: closed.

        One thread fetches them; what comes before it did replaces what was there.
        """
        cdef news_kind kind
        cdef char text[NEWS_SIZE]
        with nogil:
            kind = fetch_news(&self.queue, text)
        if kind == NO_NEWS:
            return None
        return {TROUBLE: "trouble", BACK: "back", FAULT: "fault"}[kind], text.decode("utf-8", "replace")

    def fail(self, int error):
        """Let every read fail with `error`, an errno, those that wait and those to come."""
        queue_fail(&self.queue, error)

    def close(self):
        """Let every read fail that waits, and end the thread."""
        if self.ready:
            self.stop()
            end_news(&self.queue)

    cdef void stop(self) noexcept:
        with nogil:
            queue_fail(&self.queue, EBADF)
            if self.running:
                thread_stop(&self.thread)
        self.running = False

    def __dealloc__(self):
        if not self.ready:
            return
        self.stop()
        c_close(self.queue.wakeup)
        pthread_cond_destroy(&self.queue.told)
        pthread_mutex_destroy(&self.queue.mutex)


cdef int64_t queued_pread(const source_t* source, void* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    if offset >= source.room:
        return 0
    return queue_read(<queue_t*>source.state, <char*>buffer, min(length, source.room - offset), offset)


cdef int queued_status(const source_t* source, uint64_t offset, uint64_t* length) noexcept nogil:
    if offset >= source.room:
        return 0
    length[0] = min(length[0], source.room - offset)
    return 1


cdef int64_t queued_end(const source_t* source) noexcept nogil:
    return <int64_t>source.room


cdef int64_t queue_read(queue_t* queue, char* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    cdef request_t parts[PARTS]
    cdef int64_t deadline = monotonic() + queue.patience
    cdef uint64_t done = 0
    cdef uint64_t size
    cdef int64_t error
    cdef uint32_t count
    while done < length:
        count = 0
        while done < length and count < PARTS:
            size = min(length - done, queue.largest - (offset + done) % queue.largest)
            describe(&parts[count], READ, offset + done, size, deadline)
            parts[count].buffer = buffer + done
            done += size
            count += 1
        error = ask(queue, parts, count)
        if error:
            return error
    return <int64_t>length


cdef int queue_status(queue_t* queue, uint64_t offset, uint64_t* length) noexcept nogil:
    cdef request_t request
    cdef int64_t error
    describe(&request, STATUS, offset, length[0], monotonic() + queue.patience)
    request.buffer = NULL
    error = ask(queue, &request, 1)
    if error:
        return <int>error
    length[0] = min(length[0], request.length)
    return <int>request.result


cdef void describe(
    request_t* request, request_kind kind, uint64_t offset, uint64_t length, int64_t deadline,
) noexcept nogil:
    request.kind = kind
    request.offset = offset
    request.length = length
    request.deadline = deadline
    request.tries = 0


cdef int64_t ask(queue_t* queue, request_t* requests, uint32_t count) noexcept nogil:
    """Queue the requests, which have one deadline, and wait until all are DONE. Returns 0 or -errno."""
    cdef reader_t reader
    cdef uint32_t i
    cdef bint first
    cdef int error
    reader.awake = BUSY
    reader.missing = count
    reader.error = 0
    pthread_mutex_lock(&queue.mutex)
    error = queue.error
    first = queue.waiting.first == NULL
    if not error:
        for i in range(count):
            requests[i].reader = &reader
            requests[i].state = WAITING
            insert(&queue.waiting, &requests[i])
    pthread_mutex_unlock(&queue.mutex)
    if error:
        return -error
    if not lead(queue, &reader):
        if first:
            eventfd_write(queue.wakeup, 1)  # not with the mutex, which is the first thing that the other side wants
        wait(queue, &reader, requests, count)
    return -EIO if reader.error == -ETIMEDOUT else reader.error


cdef void wait(queue_t* queue, reader_t* reader, request_t* requests, uint32_t count) noexcept nogil:
    """Wait for the requests; those that still are WAITING after their deadline leave the queue."""
    cdef timespec until
    cdef const timespec* limit = &until
    until.tv_sec = requests[0].deadline // SECOND
    until.tv_nsec = requests[0].deadline % SECOND
    while not is_answered(queue, reader):
        if futex_wait(&reader.awake, limit) < 0 and errno == ETIMEDOUT:
            withdraw(queue, requests, count)
            limit = NULL  # what is left is HELD, and who holds it knows the deadline


cdef bint is_answered(queue_t* queue, reader_t* reader) noexcept nogil:
    cdef uint32_t awake = atomic_exchange(&reader.awake, ASLEEP)
    return awake == ANSWERED or (awake == CALLED and lead(queue, reader))


cdef bint lead(queue_t* queue, reader_t* reader) noexcept nogil:
    """Talk to the server until the reader has its answer; False: somebody else does, or has to."""
    cdef bint well = True
    cdef bint answered
    if queue.turn == NULL or atomic_exchange(&queue.wheel, 1):
        return False
    answered = atomic_exchange(&reader.awake, BUSY) == ANSWERED
    while well and not answered:
        well = not queue_failed(queue) and queue.turn(queue.argument)
        answered = atomic_load(&reader.awake) == ANSWERED
    atomic_add(&queue.led, 1)
    atomic_store(&queue.wheel, 0)
    if not well:
        call(&queue.needed, 1)
    else:
        call_reader(queue)  # after `wheel` was given back: who found it taken has queued before
    return answered


cdef void call_reader(queue_t* queue) noexcept nogil:
    """Wake one of those that still wait for something: somebody has to have the wheel."""
    cdef request_t* request
    pthread_mutex_lock(&queue.mutex)
    request = queue.waiting.first if queue.held.first == NULL else queue.held.first
    if request != NULL:  # its reader is there, and gets ANSWERED after the mutex, if at all
        call(&request.reader.awake, CALLED)
    pthread_mutex_unlock(&queue.mutex)


cdef void queue_pass(queue_t* queue) noexcept nogil:
    cdef uint32_t led
    if is_wanted(queue):
        return
    atomic_store(&queue.wheel, 0)
    if not is_wanted(queue):  # who found the wheel taken has queued before
        led = atomic_load(&queue.led) - 1
        while atomic_load(&queue.led) != led:
            led = atomic_load(&queue.led)
            if is_called(queue):
                break
    while atomic_exchange(&queue.wheel, 1):
        is_called(queue)


cdef bint is_wanted(queue_t* queue) noexcept nogil:
    cdef bint wanted
    pthread_mutex_lock(&queue.mutex)
    wanted = queue.waiting.first != NULL or queue.held.first != NULL or queue.error
    pthread_mutex_unlock(&queue.mutex)
    return wanted


cdef bint is_called(queue_t* queue) noexcept nogil:
    """Wait for a while, or until this thread is called."""
    cdef int64_t deadline = monotonic() + LED_NS
    cdef timespec until
    until.tv_sec = deadline // SECOND
    until.tv_nsec = deadline % SECOND
    futex_wait(&queue.needed, &until)
    return atomic_exchange(&queue.needed, 0) == 1


cdef void withdraw(queue_t* queue, request_t* requests, uint32_t count) noexcept nogil:
    cdef uint32_t i
    pthread_mutex_lock(&queue.mutex)
    for i in range(count):
        if requests[i].state == WAITING:
            remove(&queue.waiting, &requests[i])
            wake(finish(&requests[i], -ETIMEDOUT))
    pthread_mutex_unlock(&queue.mutex)

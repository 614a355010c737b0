# cython: language_level=3, cdivision=True
"""The queue between readers and whoever talks to a server; see the .pxd for who owns a request when.

Used by `_requests`, the readers' side, and by the rooms of protocols, the other side. No Python; any thread.
"""

from libc.errno cimport EBADF, ETIMEDOUT
from libc.stdint cimport INT64_MAX, int64_t, uint32_t, uint64_t
from libc.string cimport strncpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from qcowfs.clib.atomic cimport atomic_exchange
from qcowfs.clib.futex cimport futex_wake
from qcowfs.clib.poll cimport eventfd_read, eventfd_write
from qcowfs.clib.pthread cimport (
    pthread_cond_broadcast, pthread_cond_wait, pthread_mutex_lock, pthread_mutex_unlock,
)

cdef enum:
    SECOND = 1000000000  # ns


cdef int64_t monotonic() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * SECOND + now.tv_nsec


cdef void insert(request_list_t* list, request_t* request) noexcept nogil:
    """Put `request` behind those of the same deadline or an earlier one: nearly always at the end."""
    cdef request_t* before = list.last
    while before != NULL and before.deadline > request.deadline:
        before = before.previous
    request.previous = before
    request.next = list.first if before == NULL else before.next
    if before == NULL:
        list.first = request
    else:
        before.next = request
    if request.next == NULL:
        list.last = request
    else:
        request.next.previous = request


cdef void remove(request_list_t* list, request_t* request) noexcept nogil:
    if request.previous == NULL:
        list.first = request.next
    else:
        request.previous.next = request.next
    if request.next == NULL:
        list.last = request.previous
    else:
        request.next.previous = request.previous


cdef reader_t* finish(request_t* request, int64_t result) noexcept nogil:
    """End a request that is in no list any more; the caller has the mutex. Returns the reader to wake, or NULL."""
    cdef reader_t* reader = request.reader
    request.result = result
    request.state = DONE
    if result < 0 and not reader.error:
        reader.error = result
    reader.missing -= 1
    return NULL if reader.missing else reader


cdef void call(uint32_t* word, uint32_t value) noexcept nogil:
    if atomic_exchange(word, value) == ASLEEP:
        futex_wake(word)


cdef void wake(reader_t* reader) noexcept nogil:
    """Let the reader go, if there is one, and its requests with it. The faster without the mutex."""
    if reader != NULL:
        call(&reader.awake, ANSWERED)


cdef request_t* queue_take(queue_t* queue) noexcept nogil:
    cdef request_t* request
    pthread_mutex_lock(&queue.mutex)
    request = queue.waiting.first
    if request != NULL:
        remove(&queue.waiting, request)
        insert(&queue.held, request)
        request.state = HELD
    pthread_mutex_unlock(&queue.mutex)
    return request


cdef void queue_put_back(queue_t* queue, request_t* request) noexcept nogil:
    cdef reader_t* reader = NULL
    pthread_mutex_lock(&queue.mutex)
    remove(&queue.held, request)
    if queue.error:
        reader = finish(request, -queue.error)
    elif request.deadline <= monotonic():  # its reader waits without a deadline of its own since then
        reader = finish(request, -ETIMEDOUT)
    else:
        request.state = WAITING
        insert(&queue.waiting, request)
    pthread_mutex_unlock(&queue.mutex)
    wake(reader)


cdef void queue_complete(queue_t* queue, request_t* request, int64_t result) noexcept nogil:
    cdef reader_t* reader
    pthread_mutex_lock(&queue.mutex)
    remove(&queue.held, request)
    reader = finish(request, result)
    pthread_mutex_unlock(&queue.mutex)
    wake(reader)


cdef int64_t queue_deadline(queue_t* queue) noexcept nogil:
    return deadline_of(queue, &queue.held)


cdef int64_t queue_first_deadline(queue_t* queue) noexcept nogil:
    return deadline_of(queue, &queue.waiting)


cdef int64_t deadline_of(queue_t* queue, request_list_t* list) noexcept nogil:
    cdef int64_t deadline = INT64_MAX
    pthread_mutex_lock(&queue.mutex)
    if list.first != NULL:
        deadline = list.first.deadline
    pthread_mutex_unlock(&queue.mutex)
    return deadline


cdef void queue_woken(queue_t* queue) noexcept nogil:
    cdef uint64_t value
    eventfd_read(queue.wakeup, &value)


cdef void queue_fail(queue_t* queue, int error) noexcept nogil:
    cdef request_t* request
    pthread_mutex_lock(&queue.mutex)
    if queue.error != EBADF:  # the thread waits for that one to end
        queue.error = error
    while queue.waiting.first != NULL:
        request = queue.waiting.first
        remove(&queue.waiting, request)
        wake(finish(request, -error))
    eventfd_write(queue.wakeup, 1)
    call(&queue.needed, 1)
    pthread_mutex_unlock(&queue.mutex)


cdef int queue_failed(queue_t* queue) noexcept nogil:
    cdef int error
    pthread_mutex_lock(&queue.mutex)
    error = queue.error
    pthread_mutex_unlock(&queue.mutex)
    return error


cdef int queue_in_trouble(queue_t* queue) noexcept nogil:
    cdef int trouble
    pthread_mutex_lock(&queue.mutex)
    trouble = queue.trouble
    pthread_mutex_unlock(&queue.mutex)
    return trouble


cdef void queue_tell(queue_t* queue, news_kind kind, const char* text) noexcept nogil:
    pthread_mutex_lock(&queue.mutex)
    if kind == FAULT or (kind == TROUBLE) != queue.trouble:
        if kind != FAULT:
            queue.trouble = kind == TROUBLE
        queue.news = kind
        strncpy(queue.text, text, NEWS_SIZE - 1)
        pthread_cond_broadcast(&queue.told)
    pthread_mutex_unlock(&queue.mutex)


cdef news_kind fetch_news(queue_t* queue, char* text) noexcept nogil:
    cdef news_kind kind
    pthread_mutex_lock(&queue.mutex)
    while queue.news == NO_NEWS and not queue.ended:
        pthread_cond_wait(&queue.told, &queue.mutex)
    kind = queue.news
    queue.news = NO_NEWS
    strncpy(text, queue.text, NEWS_SIZE)
    pthread_mutex_unlock(&queue.mutex)
    return kind


cdef void end_news(queue_t* queue) noexcept nogil:
    pthread_mutex_lock(&queue.mutex)
    queue.ended = 1
    pthread_cond_broadcast(&queue.told)
    pthread_mutex_unlock(&queue.mutex)

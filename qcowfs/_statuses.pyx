# cython: language_level=3, cdivision=True
"""Answers of remote sources to "is this data or a hole?".

Used by `_blockread`. No Python, no GIL; any thread. A question costs a way to the server and back, whatever its length,
so more is asked than is wanted, and what was answered is remembered.
"""

from libc.errno cimport EIO
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from qcowfs._source cimport source_t
from qcowfs.clib.pthread cimport pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock

cdef enum:
    QUESTION = 1 << 30  # bytes asked about at once: NBD takes less than 4 GiB, and a server may have to search


cdef void statuses_init(statuses_t* statuses) noexcept nogil:
    memset(statuses.answers, 0, sizeof(statuses.answers))
    pthread_mutex_init(&statuses.lock, NULL)
    statuses.next = statuses.forgotten = 0


cdef void statuses_destroy(statuses_t* statuses) noexcept nogil:
    pthread_mutex_destroy(&statuses.lock)


cdef int statuses_ask(
    statuses_t* statuses, const source_t* base, uint64_t size, uint64_t offset, uint64_t* length) noexcept nogil:
    cdef answer_t answer
    cdef uint32_t forgotten
    cdef uint64_t run
    if offset >= size:
        return 0
    pthread_mutex_lock(&statuses.lock)
    forgotten = statuses.forgotten
    answer = find(statuses, offset)
    pthread_mutex_unlock(&statuses.lock)
    if answer.end == 0:
        run = min(max(length[0], <uint64_t>QUESTION), size - offset)
        answer.data = base.status(base, offset, &run)
        if answer.data < 0:
            return answer.data
        if run == 0:
            return -EIO
        answer.start = offset
        answer.end = offset + run
        remember(statuses, &answer, forgotten)
    length[0] = min(length[0], answer.end - offset)
    return answer.data


cdef answer_t find(const statuses_t* statuses, uint64_t offset) noexcept nogil:
    cdef answer_t none
    cdef uint32_t number
    for number in range(<uint32_t>ANSWERS):
        if statuses.answers[number].start <= offset < statuses.answers[number].end:
            return statuses.answers[number]
    none.start = none.end = 0
    none.data = 0
    return none


cdef void remember(statuses_t* statuses, const answer_t* answer, uint32_t forgotten) noexcept nogil:
    pthread_mutex_lock(&statuses.lock)
    if statuses.forgotten == forgotten:
        statuses.answers[statuses.next] = answer[0]
        statuses.next = (statuses.next + 1) % ANSWERS
    pthread_mutex_unlock(&statuses.lock)


cdef void statuses_forget(statuses_t* statuses) noexcept nogil:
    pthread_mutex_lock(&statuses.lock)
    memset(statuses.answers, 0, sizeof(statuses.answers))
    statuses.forgotten += 1
    pthread_mutex_unlock(&statuses.lock)

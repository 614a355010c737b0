# What a remote source said is data and what a hole, as long as it is true.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._source cimport source_t
from qcowfs.clib.pthread cimport pthread_mutex_t

cdef enum:
    ANSWERS = 64  # that are remembered; cp and qemu-img convert go from the front to the back, a few at a time


cdef struct answer_t:
    uint64_t start
    uint64_t end  # 0: there is none
    int data


cdef struct statuses_t:
    pthread_mutex_t lock  # guards all of this; never held while a source is asked
    answer_t answers[ANSWERS]
    uint32_t next  # the one that is replaced next
    uint32_t forgotten  # how often: an answer from before is not remembered


cdef void statuses_init(statuses_t* statuses) noexcept nogil
cdef void statuses_destroy(statuses_t* statuses) noexcept nogil
# As source_t.status of `base`, which has `size` bytes.
cdef int statuses_ask(
    statuses_t* statuses, const source_t* base, uint64_t size, uint64_t offset, uint64_t* length) noexcept nogil
cdef void statuses_forget(statuses_t* statuses) noexcept nogil

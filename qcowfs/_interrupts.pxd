# cython: language_level=3

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from qcowfs.clib.fuse_kernel cimport fuse_in_header

cdef enum:
    MOST_HOLDERS = 96  # threads that hold a request each
    PASSED_ON = 64  # the last requests that somebody else has
    EARLY = 64  # the last interrupts of requests that nobody had


cdef struct interrupts_t:
    bint wanted  # requests may wait so long that a signal has to end them
    uint64_t held[MOST_HOLDERS]  # atomic; the request of each thread, if it may be interrupted; else 0
    uint64_t passed_on[PASSED_ON]  # atomic; the same, a ring
    uint32_t count  # atomic; of `passed_on`
    uint64_t early[EARLY]  # atomic; requests that were interrupted before they were noted here, if at all; a ring
    uint32_t early_count  # atomic


# True: the request was interrupted already, and answered so.
cdef bint interrupts_hold(
    interrupts_t* interrupts, uint32_t holder, int device, const fuse_in_header* request) noexcept nogil
cdef void interrupts_pass_on(interrupts_t* interrupts, const fuse_in_header* request) noexcept nogil
cdef void interrupts_answer(
    interrupts_t* interrupts, int device, fuse_in_header* request, size_t length) noexcept nogil

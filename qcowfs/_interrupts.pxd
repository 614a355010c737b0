# cython: language_level=3

from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t

from qcowfs.clib.fuse_kernel cimport fuse_in_header

cdef enum:
    MOST_HOLDERS = 96  # threads that hold a request each
    PASSED_ON = 64  # the last requests that somebody else has


cdef struct interrupts_t:
    bint wanted  # requests may wait so long that a signal has to end them
    uint64_t held[MOST_HOLDERS]  # atomic; the request of each thread, if it may be interrupted; else 0
    uint64_t passed_on[PASSED_ON]  # atomic; the same, a ring
    uint32_t count  # atomic; of `passed_on`


cdef void interrupts_hold(interrupts_t* interrupts, uint32_t holder, const fuse_in_header* request) noexcept nogil
cdef void interrupts_pass_on(interrupts_t* interrupts, const fuse_in_header* request) noexcept nogil
cdef void interrupts_answer(
    interrupts_t* interrupts, int device, fuse_in_header* request, size_t length) noexcept nogil

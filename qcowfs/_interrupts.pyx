# cython: language_level=3, cdivision=True
"""What FUSE_INTERRUPT does: whoever waits for a server, and has a signal, need not wait for it any longer.

Used by `_dataplane`. The kernel lets nobody go who waits for an answer, not even from SIGKILL, so the request is
answered with EINTR while somebody is still busy with it. The answer that comes later is refused by the kernel. No GIL,
any number of threads at once.
"""

from libc.errno cimport EINTR
from libc.stdint cimport uint32_t, uint64_t

from qcowfs._reply cimport device_reply
from qcowfs.clib.atomic cimport atomic_add, atomic_load_64, atomic_store_64
from qcowfs.clib.fuse_kernel cimport (
    FUSE_GETATTR, FUSE_LOOKUP, FUSE_LSEEK, FUSE_READ, FUSE_READDIR, FUSE_READDIRPLUS, fuse_in_header, fuse_interrupt_in,
)


cdef bint is_harmless(const fuse_in_header* request) noexcept nogil:
    """Tell whether it does no harm if the kernel never gets the answer: no file stays open by that.

    A name that it does not learn to know is no loss, since no node goes away.
    """
    return (
        request.opcode == FUSE_READ or request.opcode == FUSE_LSEEK or request.opcode == FUSE_LOOKUP
        or request.opcode == FUSE_GETATTR or request.opcode == FUSE_READDIR or request.opcode == FUSE_READDIRPLUS)


cdef void interrupts_hold(interrupts_t* interrupts, uint32_t holder, const fuse_in_header* request) noexcept nogil:
    """Note that a thread has `request` now; what it had before it has answered."""
    if interrupts.wanted:
        atomic_store_64(&interrupts.held[holder], request.unique if is_harmless(request) else 0)


cdef void interrupts_pass_on(interrupts_t* interrupts, const fuse_in_header* request) noexcept nogil:
    """Note that somebody else gets `request`, who does not say when he has answered it."""
    if interrupts.wanted and is_harmless(request):
        atomic_store_64(
            &interrupts.passed_on[atomic_add(&interrupts.count, 1) % <uint32_t>PASSED_ON], request.unique)


cdef void interrupts_answer(
        interrupts_t* interrupts, int device, fuse_in_header* request, size_t length) noexcept nogil:
    """Answer the request that `request`, a FUSE_INTERRUPT, is about. The protocol allows to do nothing."""
    cdef uint64_t unique
    cdef uint32_t number
    cdef bint known = False
    if not interrupts.wanted or length < sizeof(fuse_in_header) + sizeof(fuse_interrupt_in):
        return
    unique = (<fuse_interrupt_in*>(request + 1)).unique
    for number in range(<uint32_t>MOST_HOLDERS):
        known = known or atomic_load_64(&interrupts.held[number]) == unique
    for number in range(<uint32_t>PASSED_ON):
        known = known or atomic_load_64(&interrupts.passed_on[number]) == unique
    if known:
        request.unique = unique
        device_reply(device, request, EINTR, NULL, 0)

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


cdef bint interrupts_hold(
        interrupts_t* interrupts, uint32_t holder, int device, const fuse_in_header* request) noexcept nogil:
    """Note that a thread has `request` now; what it had before it has answered."""
    cdef bint harmless
    if not interrupts.wanted:
        return False
    harmless = is_harmless(request)
    atomic_store_64(&interrupts.held[holder], request.unique if harmless else 0)
    # Another thread may have been quicker with its FUSE_INTERRUPT, which the kernel does not send again.
    if not harmless or not has(interrupts.early, EARLY, request.unique):
        return False
    device_reply(device, request, EINTR, NULL, 0)
    return True


cdef void interrupts_pass_on(interrupts_t* interrupts, const fuse_in_header* request) noexcept nogil:
    """Note that somebody else gets `request`, who does not say when he has answered it."""
    if interrupts.wanted and is_harmless(request):
        atomic_store_64(
            &interrupts.passed_on[atomic_add(&interrupts.count, 1) % <uint32_t>PASSED_ON], request.unique)


cdef void interrupts_answer(
        interrupts_t* interrupts, int device, fuse_in_header* request, size_t length) noexcept nogil:
    """Answer the request that `request`, a FUSE_INTERRUPT, is about. The protocol allows to do nothing."""
    cdef uint64_t unique
    if not interrupts.wanted or length < sizeof(fuse_in_header) + sizeof(fuse_interrupt_in):
        return
    unique = (<fuse_interrupt_in*>(request + 1)).unique
    if not is_known(interrupts, unique):
        atomic_store_64(&interrupts.early[atomic_add(&interrupts.early_count, 1) % <uint32_t>EARLY], unique)
        if not is_known(interrupts, unique):  # whoever notes it from now on finds it there
            return
    request.unique = unique
    device_reply(device, request, EINTR, NULL, 0)


cdef bint is_known(const interrupts_t* interrupts, uint64_t unique) noexcept nogil:
    return has(interrupts.held, MOST_HOLDERS, unique) or has(interrupts.passed_on, PASSED_ON, unique)


cdef bint has(const uint64_t* requests, uint32_t count, uint64_t unique) noexcept nogil:
    cdef uint32_t number
    for number in range(count):
        if atomic_load_64(&requests[number]) == unique:
            return True
    return False

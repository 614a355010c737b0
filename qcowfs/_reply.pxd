# One answer to the kernel, by whichever thread has it.

from libc.stdint cimport int64_t, uint64_t

from qcowfs.clib.fuse_kernel cimport fuse_in_header


# `error` is 0 or an errno; with an error there is no data.
cdef void device_reply(
    int device, const fuse_in_header* request, int error, const void* data, uint64_t length) noexcept nogil
# `got` bytes of `data`, or the error -`got`.
cdef void device_result(int device, const fuse_in_header* request, int64_t got, const void* data) noexcept nogil

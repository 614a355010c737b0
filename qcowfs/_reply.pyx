# cython: language_level=3, cdivision=True
"""One answer to the kernel, written to the FUSE device. Used by `_dataplane` and `_treeplane`; any thread."""

from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs.clib.fuse_device cimport iovec, writev
from qcowfs.clib.fuse_kernel cimport fuse_in_header, fuse_out_header


cdef void device_reply(
    int device, const fuse_in_header* request, int error, const void* data, uint64_t length) noexcept nogil:
    # Nobody may want the answer any more (ENOENT), or the mount may be gone (ENODEV): both are no concern of ours.
    cdef fuse_out_header header
    cdef iovec parts[2]
    header.len = <uint32_t>(sizeof(header) + length)
    header.error = -error
    header.unique = request.unique
    parts[0].iov_base = &header
    parts[0].iov_len = sizeof(header)
    parts[1].iov_base = <void*>data
    parts[1].iov_len = length
    writev(device, parts, 2 if length else 1)


cdef void device_result(int device, const fuse_in_header* request, int64_t got, const void* data) noexcept nogil:
    """Answer with `got` bytes of `data`, or with the error -`got`."""
    if got < 0:
        device_reply(device, request, <int>-got, NULL, 0)
    else:
        device_reply(device, request, 0, data, <uint64_t>got)

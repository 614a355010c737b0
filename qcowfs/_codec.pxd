# Decompression of one cluster, without the GIL. Both return 0, or -1 if the data is not what QEMU would accept.

from libc.stdint cimport uint64_t

cdef int codec_inflate(const void* data, uint64_t length, void* cluster, uint64_t cluster_size) noexcept nogil
cdef int codec_zstd(const void* data, uint64_t length, void* cluster, uint64_t cluster_size) noexcept nogil

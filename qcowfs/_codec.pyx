# cython: language_level=3, cdivision=True
# distutils: libraries = deflate z zstd
"""Decompression of one compressed cluster, raw deflate and zstd; and compression by zstd, which Python 3.11 has not.

Used by `_core`, and by export/ for what it writes. Any number of threads; contexts of decompression wait in two small
pools between calls. Output is bounded by the cluster and input by its descriptor, so nothing in the data can make a
call take more.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport uint64_t
from libc.string cimport memset

from qcowfs._spares cimport spares_give, spares_init, spares_t, spares_take
from qcowfs.clib.deflate cimport (
    LIBDEFLATE_SUCCESS, libdeflate_alloc_decompressor, libdeflate_decompressor, libdeflate_deflate_decompress_ex,
    libdeflate_free_decompressor, libdeflate_result,
)
from qcowfs.clib.zlib cimport Z_BUF_ERROR, Z_FINISH, Z_OK, Z_STREAM_END, inflate, inflateEnd, inflateInit2, z_stream
from qcowfs.clib.zstd cimport (
    ZSTD_compress, ZSTD_createDCtx, ZSTD_DCtx, ZSTD_decompressDCtx, ZSTD_findFrameCompressedSize, ZSTD_freeDCtx,
    ZSTD_isError,
)

cdef enum:
    DEFLATE_WINDOW_BITS = -12  # raw deflate with the window that QEMU writes
    ZSTD_LEVEL = 3  # zstd's own default, and QEMU's


cdef spares_t deflate_pool
cdef spares_t zstd_pool
spares_init(&deflate_pool)
spares_init(&zstd_pool)


cdef int codec_inflate(const void* data, uint64_t length, void* cluster, uint64_t cluster_size) noexcept nogil:
    # libdeflate is twice as fast, but wants the stream's end: a stream that goes on after the cluster is full is
    # legal here, and zlib takes it.
    cdef libdeflate_decompressor* context = <libdeflate_decompressor*>spares_take(&deflate_pool)
    cdef libdeflate_result result
    cdef size_t used = 0
    cdef size_t made = 0
    if context == NULL:
        context = libdeflate_alloc_decompressor()
    if context == NULL:
        return inflate_unfinished(data, length, cluster, cluster_size)
    result = libdeflate_deflate_decompress_ex(context, data, length, cluster, cluster_size, &used, &made)
    if not spares_give(&deflate_pool, context):
        libdeflate_free_decompressor(context)
    if result == LIBDEFLATE_SUCCESS and made == cluster_size:
        return 0
    return inflate_unfinished(data, length, cluster, cluster_size)


cdef int inflate_unfinished(const void* data, uint64_t length, void* cluster, uint64_t cluster_size) noexcept nogil:
    cdef z_stream stream
    cdef int result
    memset(&stream, 0, sizeof(stream))
    stream.next_in = <unsigned char*>data  # zlib reads it only; older headers lack the const
    stream.avail_in = <unsigned int>length
    stream.next_out = <unsigned char*>cluster
    stream.avail_out = <unsigned int>cluster_size
    if inflateInit2(&stream, DEFLATE_WINDOW_BITS) != Z_OK:
        return -1
    result = inflate(&stream, Z_FINISH)
    inflateEnd(&stream)
    if stream.avail_out == 0 and (result == Z_STREAM_END or result == Z_BUF_ERROR):
        return 0
    return -1


cdef int codec_zstd(const void* data, uint64_t length, void* cluster, uint64_t cluster_size) noexcept nogil:
    # Frame by frame into the cluster itself: the streaming interface would first allocate the window that a frame's
    # header asks for, up to 128 MiB. What follows the frame that fills the cluster is the tail of a sector.
    cdef ZSTD_DCtx* context = <ZSTD_DCtx*>spares_take(&zstd_pool)
    cdef int result
    if context == NULL:
        context = ZSTD_createDCtx()
    if context == NULL:
        return -1
    result = decompress_frames(context, <const char*>data, length, <char*>cluster, cluster_size)
    if not spares_give(&zstd_pool, context):
        ZSTD_freeDCtx(context)
    return result


cdef int decompress_frames(
    ZSTD_DCtx* context, const char* data, uint64_t length, char* cluster, uint64_t cluster_size) noexcept nogil:
    cdef uint64_t used = 0
    cdef uint64_t made = 0
    cdef size_t frame, got
    while made < cluster_size:
        frame = ZSTD_findFrameCompressedSize(data + used, length - used)
        if ZSTD_isError(frame) or frame == 0:
            return -1
        got = ZSTD_decompressDCtx(context, cluster + made, cluster_size - made, data + used, frame)
        if ZSTD_isError(got):
            return -1
        used += frame
        made += got
    return 0


def compress_zstd(const unsigned char[::1] cluster not None):
    """Return `cluster` as one zstd frame, compressed without the GIL; None if that is not shorter."""
    cdef size_t length = <size_t>cluster.shape[0]
    cdef size_t made
    cdef bytes room
    if length == 0:
        return None
    room = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length - 1)
    cdef char* output = PyBytes_AS_STRING(room)
    with nogil:
        made = ZSTD_compress(output, length - 1, &cluster[0], length, ZSTD_LEVEL)
    return None if ZSTD_isError(made) else room[:<Py_ssize_t>made]

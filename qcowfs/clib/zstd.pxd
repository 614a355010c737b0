# zstd.h: decompression frame by frame, and compression of one buffer.

cdef extern from "<zstd.h>" nogil:
    ctypedef struct ZSTD_DCtx:
        pass

    ZSTD_DCtx* ZSTD_createDCtx()
    size_t ZSTD_freeDCtx(ZSTD_DCtx* context)
    size_t ZSTD_decompressDCtx(
        ZSTD_DCtx* context, void* output, size_t output_room, const void* input, size_t input_length)
    size_t ZSTD_findFrameCompressedSize(const void* input, size_t input_length)
    size_t ZSTD_compress(
        void* output, size_t output_room, const void* input, size_t input_length, int level)
    unsigned int ZSTD_isError(size_t code)
    # ...

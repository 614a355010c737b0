# libdeflate.h: whole-buffer decompression of raw deflate.

cdef extern from "<libdeflate.h>" nogil:
    struct libdeflate_decompressor:
        pass
    enum libdeflate_result:
        LIBDEFLATE_SUCCESS
        LIBDEFLATE_BAD_DATA
        LIBDEFLATE_SHORT_OUTPUT
        LIBDEFLATE_INSUFFICIENT_SPACE

    libdeflate_decompressor* libdeflate_alloc_decompressor()
    void libdeflate_free_decompressor(libdeflate_decompressor* decompressor)
    libdeflate_result libdeflate_deflate_decompress_ex(
        libdeflate_decompressor* decompressor,
        const void* input, size_t input_length,
        void* output, size_t output_room,
        size_t* input_used, size_t* output_used)
    # ...

# zlib.h: streaming inflate.

cdef extern from "<zlib.h>" nogil:
    enum:
        Z_OK
        Z_STREAM_END
        Z_BUF_ERROR
        Z_FINISH

    ctypedef struct z_stream:
        unsigned char* next_in
        unsigned int avail_in
        unsigned char* next_out
        unsigned int avail_out
        # ...

    int inflateInit2(z_stream* stream, int window_bits)
    int inflate(z_stream* stream, int flush)
    int inflateEnd(z_stream* stream)
    # ...

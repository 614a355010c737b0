# unistd.h, with 64-bit offsets on every platform that is supported.

from libc.stdint cimport int64_t

cdef extern from "<unistd.h>" nogil:
    enum:
        SEEK_DATA
        SEEK_HOLE
        SEEK_END

    Py_ssize_t c_pread "pread"(int fd, void* buffer, size_t length, int64_t offset)
    int64_t c_lseek "lseek"(int fd, int64_t offset, int whence)
    Py_ssize_t c_pwrite "pwrite"(int fd, const void* buffer, size_t length, int64_t offset)
    int c_close "close"(int fd)
    # ...

cdef extern from "<fcntl.h>" nogil:
    enum:
        FALLOC_FL_KEEP_SIZE
        FALLOC_FL_PUNCH_HOLE

    int c_fallocate "fallocate"(int fd, int mode, int64_t offset, int64_t length)
    # ...

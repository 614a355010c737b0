# fcntl.h: open file description locks, which QEMU takes too.

from libc.stdint cimport int64_t

cdef extern from "<fcntl.h>" nogil:
    enum:
        F_OFD_GETLK
        F_WRLCK
        F_UNLCK
        SEEK_SET

    ctypedef struct flock_t "struct flock":
        short l_type
        short l_whence
        int64_t l_start
        int64_t l_len
        int l_pid

    int c_fcntl_lock "fcntl"(int fd, int command, flock_t* lock)
    # ...

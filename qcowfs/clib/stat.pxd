# sys/stat.h: when a file was last written.

from posix.time cimport timespec

cdef extern from "<sys/stat.h>" nogil:
    ctypedef struct stat_t "struct stat":
        timespec st_mtim
        # ...

    int c_fstat "fstat"(int fd, stat_t* status)
    # ...

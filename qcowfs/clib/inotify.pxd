# sys/inotify.h

from libc.stdint cimport uint32_t

cdef extern from "<sys/inotify.h>" nogil:
    enum:
        IN_CLOEXEC
        IN_NONBLOCK
        IN_MODIFY
        IN_CLOSE_WRITE
        IN_CREATE
        IN_MOVED_TO
        IN_ONLYDIR

    int inotify_init1(int flags)
    int inotify_add_watch(int fd, const char* path, uint32_t mask)
    # ...

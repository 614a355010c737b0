# poll.h and sys/eventfd.h: what waits for a socket and for other threads at the same time.

from libc.stdint cimport uint64_t

cdef extern from "<poll.h>" nogil:
    ctypedef struct pollfd_t "struct pollfd":
        int fd
        short events
        short revents
    enum:
        POLLIN
        POLLOUT
        POLLERR
        POLLHUP

    int c_poll "poll"(pollfd_t* descriptors, unsigned long count, int milliseconds)
    # ...

cdef extern from "<sys/eventfd.h>" nogil:
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK

    int eventfd(unsigned int value, int flags)
    int eventfd_read(int fd, uint64_t* value)
    int eventfd_write(int fd, uint64_t value)

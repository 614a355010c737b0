# The system calls of the data plane: the FUSE device, the socket to pyfuse3, and how the end is told.

from libc.stdint cimport uint64_t

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len

    Py_ssize_t writev(int fd, const iovec* parts, int count)

cdef extern from "<sys/socket.h>" nogil:
    enum:
        MSG_NOSIGNAL
        SHUT_RDWR

    Py_ssize_t send(int fd, const void* message, size_t length, int flags)
    Py_ssize_t recv(int fd, void* message, size_t room, int flags)
    int shutdown(int fd, int how)

cdef extern from "<sys/eventfd.h>" nogil:
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK

    int eventfd(unsigned int count, int flags)
    int eventfd_write(int fd, uint64_t count)

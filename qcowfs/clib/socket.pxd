# sys/socket.h, and what netinet/tcp.h adds to it: options of a socket.

cdef extern from "<sys/socket.h>" nogil:
    enum:
        SOL_SOCKET
        SO_KEEPALIVE

    int setsockopt(int fd, int level, int option, const void* value, unsigned int size)
    # ...

cdef extern from "<netinet/in.h>" nogil:
    enum:
        IPPROTO_TCP

cdef extern from "<netinet/tcp.h>" nogil:
    enum:
        TCP_KEEPIDLE
        TCP_KEEPINTVL
        TCP_USER_TIMEOUT

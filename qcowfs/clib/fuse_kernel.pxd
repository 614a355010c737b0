# linux/fuse.h: what the data plane reads from the FUSE device and writes to it.

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

cdef extern from "<linux/fuse.h>" nogil:
    enum:
        FUSE_READ
        FUSE_INIT
        FUSE_READDIR
        FUSE_INTERRUPT
        FUSE_READDIRPLUS
        FUSE_LSEEK

        FUSE_AUTO_INVAL_DATA
        FUSE_MAX_PAGES

    struct fuse_in_header:
        uint32_t len
        uint32_t opcode
        uint64_t unique
        # ...

    struct fuse_out_header:
        uint32_t len
        int32_t error
        uint64_t unique

    struct fuse_read_in:  # of READ, READDIR and READDIRPLUS
        uint64_t fh
        uint64_t offset
        uint32_t size
        # ...

    struct fuse_lseek_in:
        uint64_t fh
        uint64_t offset
        uint32_t whence
        # ...

    struct fuse_lseek_out:
        uint64_t offset

    struct fuse_init_out:
        uint32_t major
        uint32_t minor
        uint32_t max_readahead
        uint32_t flags
        uint16_t max_background
        uint16_t congestion_threshold
        uint32_t max_write
        uint32_t time_gran
        uint16_t max_pages
        # ...

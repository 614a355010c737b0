# linux/fuse.h: what the data plane reads from the FUSE device and writes to it.

from libc.stdint cimport int32_t, uint16_t, uint32_t, uint64_t

cdef extern from "<linux/fuse.h>" nogil:
    enum:
        FUSE_FORGET
        FUSE_LOOKUP
        FUSE_GETATTR
        FUSE_OPEN
        FUSE_READ
        FUSE_RELEASE
        FUSE_GETXATTR
        FUSE_LISTXATTR
        FUSE_FLUSH
        FUSE_INIT
        FUSE_OPENDIR
        FUSE_READDIR
        FUSE_RELEASEDIR
        FUSE_INTERRUPT
        FUSE_BATCH_FORGET
        FUSE_READDIRPLUS
        FUSE_LSEEK

        FUSE_AUTO_INVAL_DATA
        FUSE_READDIRPLUS_AUTO
        FUSE_MAX_PAGES

        FOPEN_KEEP_CACHE
        FOPEN_CACHE_DIR

    struct fuse_in_header:
        uint32_t len
        uint32_t opcode
        uint64_t unique
        uint64_t nodeid
        # ...

    struct fuse_out_header:
        uint32_t len
        int32_t error
        uint64_t unique

    struct fuse_attr:
        uint64_t ino
        uint64_t size
        uint64_t blocks
        uint64_t atime
        uint64_t mtime
        uint64_t ctime
        uint32_t atimensec
        uint32_t mtimensec
        uint32_t ctimensec
        uint32_t mode
        uint32_t nlink
        uint32_t uid
        uint32_t gid
        uint32_t rdev
        uint32_t blksize
        # ...

    struct fuse_attr_out:
        uint64_t attr_valid
        fuse_attr attr
        # ...

    struct fuse_entry_out:
        uint64_t nodeid
        uint64_t entry_valid
        uint64_t attr_valid
        fuse_attr attr
        # ...

    struct fuse_dirent:
        uint64_t ino
        uint64_t off
        uint32_t namelen
        uint32_t type
        char name[0]

    struct fuse_open_in:  # of OPEN and OPENDIR
        uint32_t flags
        # ...

    struct fuse_open_out:
        uint64_t fh
        uint32_t open_flags
        # ...

    struct fuse_release_in:  # of RELEASE and RELEASEDIR
        uint64_t fh
        # ...

    struct fuse_getxattr_in:  # of GETXATTR and LISTXATTR
        uint32_t size
        # ...

    struct fuse_getxattr_out:
        uint32_t size
        # ...

    struct fuse_interrupt_in:
        uint64_t unique  # of the request that is not wanted any more

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

# The bytes in which a worker tells of inodes and directory entries; qcowfs/inside/record.py says what they mean.

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t


cdef packed struct inode_record_t:
    uint64_t ino
    uint64_t size
    uint64_t blocks
    int64_t atime
    int64_t mtime
    int64_t ctime
    uint32_t atime_ns
    uint32_t mtime_ns
    uint32_t ctime_ns
    uint32_t mode
    uint32_t nlink
    uint32_t uid
    uint32_t gid
    uint32_t rdev
    uint32_t flags
    uint32_t error


cdef packed struct entry_record_t:
    uint64_t cookie
    uint16_t name_length
    uint16_t extents
    uint32_t length


cdef packed struct extent_record_t:
    uint64_t start
    uint64_t length
    uint64_t offset


cdef enum:
    RECORD_NO_XATTRS = 1
    RECORD_UNMAPPED = 0xFFFF

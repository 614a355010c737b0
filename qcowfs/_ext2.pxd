# An ext2, ext3 or ext4 that is open; _extmap and _extdir go on from it.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from qcowfs._records cimport inode_record_t
from qcowfs.clib.ext2fs cimport errcode_t, ext2_filsys


# Where the fields of a stored inode are.
cdef enum:
    INODE_FLAGS = 32
    INODE_BLOCK = 40
    INODE_BLOCK_SIZE = 60

cdef enum:
    NOKEY_BYTES = 149  # of an encrypted name that stand in its name without the key
    NOKEY_HASHES = 8  # bytes before them
    NOKEY_DIGEST = 32  # bytes after them, of the rest of the name

cdef enum:
    FLAG_ENCRYPTED = 0x800
    FLAG_EXTENTS = 0x80000
    FLAG_INLINE_DATA = 0x10000000


cdef inline uint16_t le16(const uint8_t *at) noexcept nogil:
    return <uint16_t>(at[0] | at[1] << 8)


cdef inline uint32_t le32(const uint8_t *at) noexcept nogil:
    return at[0] | <uint32_t>at[1] << 8 | <uint32_t>at[2] << 16 | <uint32_t>at[3] << 24


cdef class Filesystem:
    cdef ext2_filsys fs
    cdef object device
    cdef uint8_t *raw  # the inode that `load` found last, as stored
    cdef uint32_t inode_size
    cdef uint64_t blocks  # whole blocks of the device: what lies behind them is not there
    cdef uint64_t[::1] suspects  # start and end of what may be other bytes in another state of the volume, in order
    cdef bint met_suspect  # whether a block of them was read
    cdef uint64_t[::1] covered  # blocks that are stored elsewhere, in rising order: those of a recovered journal

    cdef const char *load(self, uint32_t ino, inode_record_t *told) noexcept
    cdef void tell_size(self, inode_record_t *told) noexcept
    cdef const char *tell_extra(self, inode_record_t *told) noexcept
    cdef int read(self, uint32_t ino, inode_record_t *told) except -1
    cdef int read_block(self, uint64_t block, void *data) except -1
    cdef bint is_covered(self, uint64_t block, uint64_t length) noexcept
    cdef bint is_suspect(self, uint64_t offset, uint64_t length) noexcept
    cdef bint is_suspect_inode(self, uint32_t ino) noexcept

cdef int check(errcode_t code, str what) except -1

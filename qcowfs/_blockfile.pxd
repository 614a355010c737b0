# A file that keeps blocks of one remote image from one mount to the next, and is shared by all that read the image.
#
#   records  one record_t for each block of the image
#   blocks   from `data`, block n at n * BLOCK; those that are not kept are holes
#
# Nobody locks it to read or write: all that write a block write the same bytes, because the file belongs to one version
# of the image, and a record whose checksum does not agree with the block is as none. A block is written before its
# record, and a record is zeroed before the block is punched out, so whoever is killed in between leaves at worst a
# block that is fetched again.

from libc.stdint cimport int64_t, uint32_t, uint64_t

cdef enum:
    BLOCK = 64 << 10  # bytes


cdef struct record_t:
    uint32_t checksum  # CRC-32C of the file's seed, the block's number, and its bytes
    uint32_t used  # when, in seconds since the epoch; 0: there is no block


cdef struct allowance_t:
    uint64_t left  # bytes that may be written until somebody looks how much there is; only the writer's thread uses it
    uint32_t stopped  # atomic; 1: nothing is written any more


cdef struct blockfile_t:
    int fd
    uint32_t seed
    int64_t data
    allowance_t* allowance


cdef class Allowance:
    cdef allowance_t c


cdef class BlockFile:
    cdef blockfile_t c
    cdef Allowance allowance


# Read the whole block `number` into `payload` (`length` bytes: less than BLOCK for the last); False: it is not there.
cdef bint blockfile_read(
    const blockfile_t* blocks, uint64_t number, unsigned char* payload, uint64_t length) noexcept nogil
# Keep the block, if that is allowed. Returns 0 or an errno; EAGAIN: the allowance is used up.
cdef int blockfile_write(
    const blockfile_t* blocks, uint64_t number, const unsigned char* payload, uint64_t length) noexcept nogil

# cython: language_level=3, cdivision=True
"""A file with blocks of one remote image, and how its oldest are let go.

Used by `_blockread` (reads, without the GIL from any number of threads at once; writes, from one) and by
source/cachedir, which opens the files and decides how much has to go. What is in a file is believed only as far as a
checksum says so.
"""

from array import array

from libc.errno cimport EAGAIN, EINTR, EIO, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from qcowfs._crc32c cimport crc32c_update
from qcowfs.clib.atomic cimport atomic_exchange
from qcowfs.clib.unistd cimport (
    FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, SEEK_DATA, c_close, c_fallocate, c_lseek, c_pread, c_pwrite,
)

cdef enum:
    PAGE = 4096  # bytes that one more record may take, at worst
    RECORDS = 512  # that are looked at in one go: a page
    USE_SECONDS = 600  # a use is written down if the one before is older: a reader shall not write all the time
    AGES = 256  # classes of age, eight for each doubling of it

BLOCK_BYTES = BLOCK


cdef class Allowance:
    """What all files of a directory may grow by, until somebody looks how large they are."""

    def grant(self, uint64_t left):
        """Allow `left` bytes more. Only from the thread that writes."""
        self.c.left = left

    def stop(self):
        """Allow nothing any more; returns whether this is the first time."""
        return atomic_exchange(&self.c.stopped, 1) == 0


cdef class BlockFile:
    """The file behind `fd`, which belongs to this object from now on.

    Args:
        size: of the image, in bytes.
        seed: a number that no other image has, as good as that goes: a file under another's name is as an empty one.
        allowance: shared with all files of the directory.
    """

    def __cinit__(self, *args, **kwargs):
        self.c.fd = -1

    def __init__(self, int fd, uint64_t size, uint32_t seed, Allowance allowance not None):
        self.allowance = allowance
        self.c.fd = fd
        self.c.seed = seed
        self.c.data = <int64_t>data_start(block_count(size))
        self.c.allowance = &allowance.c

    def close(self):
        """Give the descriptor back; no read or write may be under way."""
        if self.c.fd >= 0:
            c_close(self.c.fd)
            self.c.fd = -1

    def __dealloc__(self):
        if self.c.fd >= 0:
            c_close(self.c.fd)


cdef inline uint64_t block_count(uint64_t size) noexcept nogil:
    return size // BLOCK + (size % BLOCK != 0)


cdef inline uint64_t data_start(uint64_t blocks) noexcept nogil:
    return (blocks * sizeof(record_t) + BLOCK - 1) // BLOCK * BLOCK


cdef uint32_t checksum(uint32_t seed, uint64_t number, const unsigned char* payload, uint64_t length) noexcept nogil:
    cdef uint64_t head[2]
    head[0] = seed
    head[1] = number
    return crc32c_update(crc32c_update(0xFFFFFFFF, <const uint8_t*>head, sizeof(head)), payload, length)


cdef uint32_t seconds_now() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_REALTIME, &now)
    return max(<uint32_t>now.tv_sec, <uint32_t>1)


cdef bint blockfile_read(
    const blockfile_t* blocks, uint64_t number, unsigned char* payload, uint64_t length) noexcept nogil:
    cdef record_t record
    cdef int64_t place = <int64_t>(number * sizeof(record_t))
    cdef uint32_t now
    if not get(blocks.fd, &record, sizeof(record), place) or record.used == 0:
        return False
    if not get(blocks.fd, payload, length, blocks.data + <int64_t>(number * BLOCK)):
        return False
    if checksum(blocks.seed, number, payload, length) != record.checksum:
        return False
    now = seconds_now()
    if record.used > now or now - record.used > USE_SECONDS:
        record.used = now
        put(blocks.fd, &record, sizeof(record), place)  # that it cannot be written does not hurt
    return True


cdef int blockfile_write(
    const blockfile_t* blocks, uint64_t number, const unsigned char* payload, uint64_t length) noexcept nogil:
    cdef record_t record
    cdef int failure
    if blocks.allowance.left < BLOCK + PAGE:
        return EAGAIN
    blocks.allowance.left -= BLOCK + PAGE
    failure = put(blocks.fd, payload, length, blocks.data + <int64_t>(number * BLOCK))
    if failure:
        return failure
    record.checksum = checksum(blocks.seed, number, payload, length)
    record.used = seconds_now()
    return put(blocks.fd, &record, sizeof(record), <int64_t>(number * sizeof(record_t)))


cdef bint get(int fd, void* buffer, uint64_t length, int64_t offset) noexcept nogil:
    """Read all of it; False: it is not there, or cannot be read, which is the same."""
    cdef uint64_t done = 0
    cdef Py_ssize_t got
    while done < length:
        got = c_pread(fd, <char*>buffer + done, length - done, offset + <int64_t>done)
        if got > 0:
            done += <uint64_t>got
        elif got == 0 or errno != EINTR:
            return False
    return True


cdef int put(int fd, const void* buffer, uint64_t length, int64_t offset) noexcept nogil:
    cdef uint64_t done = 0
    cdef Py_ssize_t got
    while done < length:
        got = c_pwrite(fd, <const char*>buffer + done, length - done, offset + <int64_t>done)
        if got > 0:
            done += <uint64_t>got
        elif got == 0:
            return EIO
        elif errno != EINTR:
            return errno
    return 0


cdef inline uint32_t age_class(uint32_t used, uint32_t now) noexcept nogil:
    """Return 0 for what was used just now, and more for what is older; less than AGES."""
    cdef uint32_t age = now - used if now > used else 0
    cdef uint32_t octave = 1
    if age < 16:
        return age
    while age >> octave >= 16:
        octave += 1
    return 8 * octave + (age >> octave)  # 16 to 23, then 24 to 31, and so on


def survey(int fd, uint64_t size):
    """Return how many blocks the file of an image of `size` bytes has, by their age: the last are the oldest.

    Raises:
        OSError: it cannot be read.
    """
    counts = array("Q", bytes(8 * AGES))
    cdef uint64_t[::1] view = counts
    cdef uint64_t* first = &view[0]
    cdef int failure
    with nogil:
        failure = walk(fd, block_count(size), first, 0, NULL)
    if failure:
        raise OSError(failure, "cannot be surveyed")
    return counts


def drop(int fd, uint64_t size, uint32_t youngest, uint64_t most):
    """Let go of blocks of the age class `youngest` or older, but of `most` at most; returns how many these are.

    Raises:
        OSError: this file system has no holes, or the file cannot be read or written.
    """
    cdef uint64_t left = most
    cdef int failure
    with nogil:
        failure = walk(fd, block_count(size), NULL, youngest, &left)
    if failure:
        raise OSError(failure, "cannot be made smaller")
    return most - left


cdef int walk(int fd, uint64_t blocks, uint64_t* counts, uint32_t youngest, uint64_t* left) noexcept nogil:
    """Count all blocks into `counts`, or let go of up to `left[0]` that are at least as old as `youngest`."""
    cdef record_t records[RECORDS]
    cdef uint64_t end = blocks * sizeof(record_t)
    cdef int64_t place = 0
    cdef uint64_t length
    cdef int failure
    while True:
        place = c_lseek(fd, place, SEEK_DATA)
        if place < 0 or <uint64_t>place >= end:  # ENXIO: nothing but a hole
            return 0
        place -= place % <int64_t>sizeof(records)
        length = min(sizeof(records), end - <uint64_t>place)
        memset(records, 0, sizeof(records))
        if not get(fd, records, length, place):
            return 0  # the file was cut
        if counts != NULL:
            count(records, counts)
        else:
            failure = let_go(fd, blocks, <uint64_t>place // sizeof(record_t), records, youngest, left)
            if failure or left[0] == 0:
                return failure
        place += <int64_t>sizeof(records)


cdef void count(const record_t* records, uint64_t* counts) noexcept nogil:
    cdef uint32_t now = seconds_now()
    cdef uint32_t number
    for number in range(<uint32_t>RECORDS):
        if records[number].used:
            counts[age_class(records[number].used, now)] += 1


cdef int let_go(
    int fd, uint64_t blocks, uint64_t first, const record_t* records, uint32_t youngest,
    uint64_t* left) noexcept nogil:
    cdef record_t none
    cdef uint32_t now = seconds_now()
    cdef uint32_t number
    cdef int failure
    none.checksum = none.used = 0
    for number in range(<uint32_t>RECORDS):
        if left[0] == 0:
            break
        if records[number].used == 0 or age_class(records[number].used, now) < youngest:
            continue
        failure = put(fd, &none, sizeof(none), <int64_t>((first + number) * sizeof(record_t)))
        if failure:
            return failure
        if c_fallocate(
                fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                <int64_t>(data_start(blocks) + (first + number) * BLOCK), BLOCK):
            return errno
        left[0] -= 1
    return 0

# cython: language_level=3
"""The check of a worker's directory entries: a listing has a thousand of them, and each breaks a rule or none.

Used by inside/answer.py, which says what the rules are for.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memchr, memcpy

from qcowfs._records cimport RECORD_UNMAPPED, entry_record_t, extent_record_t, inode_record_t

cdef enum:
    LONGEST_NAME = 255
    LAST_NANOSECOND = 999999999
    LAST_ERRNO = 4095
    INODE_BITS = 40
    TYPES = 0x1556  # a bit for each S_IFMT >> 12 that there is: fifo, chr, dir, blk, reg, lnk, sock


cdef const char* wrong_inode(const inode_record_t* inode) noexcept nogil:
    if inode.ino == 0 or inode.ino >> INODE_BITS or inode.size >> 63 or inode.blocks >> 54:
        return "an inode's number or size"
    if inode.atime_ns > LAST_NANOSECOND or inode.mtime_ns > LAST_NANOSECOND or inode.ctime_ns > LAST_NANOSECOND:
        return "an inode's nanoseconds"
    if inode.mode > 0xFFFF or not (<uint32_t>TYPES >> (inode.mode >> 12)) & 1 or inode.error > LAST_ERRNO:
        return "an inode's mode or error"
    return NULL


cdef const char* wrong_extents(const char* at, uint32_t count, uint64_t end, uint64_t volume_size) noexcept nogil:
    cdef extent_record_t extent
    cdef uint64_t before = 0
    cdef uint32_t number
    for number in range(count):
        memcpy(&extent, at + number * sizeof(extent), sizeof(extent))
        if extent.length == 0 or extent.start < before or extent.start > end or extent.length > end - extent.start:
            return "an extent's place in its file"
        if extent.offset > volume_size or extent.length > volume_size - extent.offset:
            return "an extent's place in the volume"
        before = extent.start + extent.length
    return NULL


cdef const char* wrong_name(const char* name, size_t length) noexcept nogil:
    cdef bint dots = name[0] == b"." and (length == 1 or (length == 2 and name[1] == b"."))
    if length > LONGEST_NAME or dots or memchr(name, b"/", length) != NULL or memchr(name, 0, length) != NULL:
        return "a name that no file can have"
    return NULL


cdef const char* wrong_entry(
    const char* at, uint64_t room, uint64_t* cookie, uint64_t volume_size, uint64_t* length
) noexcept nogil:
    cdef entry_record_t entry
    cdef inode_record_t inode
    cdef const char* wrong
    if room < sizeof(entry) + sizeof(inode):
        return "an entry that is cut off"
    memcpy(&entry, at, sizeof(entry))
    memcpy(&inode, at + sizeof(entry), sizeof(inode))
    cdef uint32_t count = 0 if entry.extents == RECORD_UNMAPPED else entry.extents
    cdef uint64_t name = sizeof(entry) + sizeof(inode) + count * sizeof(extent_record_t)
    cdef uint64_t used = name + entry.name_length
    if entry.length % 8 or entry.length > room or used > entry.length or entry.length > used + 7:
        return "an entry's length"
    if entry.name_length == 0:
        return "a name that no file can have"
    if entry.cookie <= cookie[0] or entry.cookie >> 63:
        return "an entry's cookie"
    cookie[0] = entry.cookie
    length[0] = entry.length
    wrong = wrong_inode(&inode)
    if wrong == NULL:
        wrong = wrong_extents(at + sizeof(entry) + sizeof(inode), count, inode.size, volume_size)
    return wrong if wrong != NULL else wrong_name(at + name, entry.name_length)


def check_entries(bytes body, uint64_t cookie, uint64_t volume_size):
    """Raise ValueError unless `body` is nothing but entries, all within the volume.

    Each cookie has to be larger than the one before it, the first one than `cookie`, so that a listing comes nearer to
    an end; and none larger than loff_t, in which the kernel keeps it.
    """
    cdef const char* at = body
    cdef uint64_t place = 0
    cdef uint64_t end = <uint64_t>len(body)
    cdef uint64_t length = 0
    cdef const char* wrong
    while place < end:
        wrong = wrong_entry(at + place, end - place, &cookie, volume_size, &length)
        if wrong != NULL:
            raise ValueError((<bytes>wrong).decode())
        place += length

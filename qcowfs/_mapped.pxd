# A file whose bytes are runs of disks: a partition, a logical volume, a file inside of one. Read without the GIL.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._records cimport extent_record_t
from qcowfs._resolve cimport disk_t
from qcowfs._tables cimport fault_t


cdef enum:
    LITERAL = 0xFFFFFFFF  # instead of a disk's number: the bytes are in `literal`


cdef struct run_t:
    uint64_t start  # in the file
    uint64_t length  # > 0
    uint64_t offset  # in the disk, or in `literal`
    uint32_t disk


cdef struct mapped_t:
    uint64_t size
    uint64_t count
    run_t* runs  # by `start`, none overlaps another; what is in none reads as zeros
    disk_t** disks  # somebody else's
    uint32_t disk_count
    const char* literal


# Fill `buffer` with `length` bytes at `offset`, all within the file. Returns 0, or -1 with `fault` and the number of
# the disk that it is of.
cdef int mapped_read(
    const mapped_t* mapped, char* buffer, uint64_t offset, uint64_t length, fault_t* fault,
    uint32_t* number) noexcept nogil

# As `disk_seek`.
cdef int mapped_seek(const mapped_t* mapped, uint64_t offset, bint data, uint64_t* found) noexcept nogil

# Put into `part` the file that `extents` of `volume` make; its runs are malloc'ed. Returns 0, EINVAL if the extents are
# not in order or not within the volume and the file, or ENOMEM.
cdef int mapped_part(
    const mapped_t* volume, uint64_t size, const extent_record_t* extents, uint64_t count, const char* literal,
    uint64_t literal_size, mapped_t* part) noexcept nogil

# Was something found that nobody was warned of? Then it is for Mapped.warn, with the GIL.
cdef bint mapped_has_warning(const mapped_t* mapped) noexcept nogil


cdef class Mapped:
    cdef mapped_t c
    cdef tuple disks  # of Disk, kept alive
    cdef bytes literal

    cdef object read_fault(self, const fault_t* fault, uint32_t number)
    cdef int warn(self) except -1

# Data and holes of a disk, without the GIL.

from libc.stdint cimport int64_t, uint64_t

from qcowfs._resolve cimport disk_t, resolved_t
from qcowfs._tables cimport fault_t


cdef enum:
    SEEK_TIME_MS = 1000  # a seek gives up after it


# The first data (or hole) at `offset` or after it, as lseek(2) has it of a file that is the disk up to `end`, where a
# hole is. Returns 0 with `found`, or ENXIO. What cannot be resolved counts as data, so that reading it is an error and
# not a hole.
cdef int disk_seek(disk_t* disk, uint64_t offset, uint64_t end, bint data, uint64_t* found) noexcept nogil

# Does the range at `offset` hold data? `length` says up to where, `end` at most. What cannot be resolved
# counts as data.
cdef bint holds_data(const disk_t* disk, uint64_t offset, uint64_t end, uint64_t* length) noexcept nogil

# A raw layer's zeros are the holes of its file: cut the mapping to the hole or the data at `offset`. Returns 0, or -1
# with `fault`.
cdef int find_hole(resolved_t* resolved, uint64_t offset, fault_t* fault) noexcept nogil

cdef int64_t monotonic_ms() noexcept nogil

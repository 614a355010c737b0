# cython: language_level=3, cdivision=True
"""Where data and holes are: lseek(2) of a disk.

Used by `_core`, `_mapped`, `_compare` and `_dataplane`. Without the GIL; any number of threads.
"""

from libc.errno cimport ENXIO
from libc.stdint cimport int64_t, uint32_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from qcowfs._resolve cimport disk_check, disk_resolve, disk_t, resolved_t
from qcowfs._tables cimport (
    COMPRESSED, LAYER_RAW, NORMAL, RULE_READ_FAILED, ZERO_ALLOCATED, fault_t, layer_fault,
)

cdef enum:
    SECTOR_SIZE = 512
    SEEK_STEPS = 64  # extents between two looks at the clock


cdef int find_hole(resolved_t* resolved, uint64_t offset, fault_t* fault) noexcept nogil:
    """A raw layer's zeros are the holes of its file: cut the mapping to the hole or the data at `offset`."""
    cdef int status
    if resolved.layer == NULL or resolved.layer.kind != LAYER_RAW:
        return 0
    status = resolved.layer.data.status(resolved.layer.data, offset, &resolved.mapping.length)
    if status < 0:
        return layer_fault(fault, resolved.layer, RULE_READ_FAILED, -status, offset, offset)
    if status == 0:
        resolved.mapping.type = ZERO_ALLOCATED
    return 0


cdef int disk_seek(disk_t* disk, uint64_t offset, uint64_t end, bint data, uint64_t* found) noexcept nogil:
    cdef fault_t ignored
    cdef int status = seek_unguarded(disk, offset, end, data, found)
    if offset < end and disk_check(disk, &ignored) < 0:  # as what cannot be resolved
        found[0] = offset if data else end
        return 0
    return status


cdef int seek_unguarded(
    const disk_t* disk, uint64_t offset, uint64_t end, bint data, uint64_t* found) noexcept nogil:
    cdef int64_t deadline = monotonic_ms() + SEEK_TIME_MS
    cdef uint32_t step = 0
    cdef uint64_t length
    if offset >= end:
        return ENXIO
    while offset < end:  # length is > 0
        if holds_data(disk, offset, end, &length) == data:
            found[0] = offset
            return 0
        offset += length
        step += 1
        if step % SEEK_STEPS == 0 and offset < end and monotonic_ms() > deadline:
            # A hole that is called data is only slow; so the search may end anywhere, and a hostile image cannot make
            # it last.
            found[0] = offset if data else end
            return 0
    found[0] = end
    return ENXIO if data else 0


cdef bint holds_data(const disk_t* disk, uint64_t offset, uint64_t end, uint64_t* length) noexcept nogil:
    cdef resolved_t resolved
    cdef fault_t ignored
    if disk_resolve(disk, offset, end - offset, &resolved, &ignored) < 0 or (
            find_hole(&resolved, offset, &ignored) < 0):
        length[0] = min(SECTOR_SIZE - offset % SECTOR_SIZE, end - offset)
        return True
    length[0] = resolved.mapping.length
    return resolved.mapping.type == NORMAL or resolved.mapping.type == COMPRESSED


cdef int64_t monotonic_ms() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000 + now.tv_nsec // 1000000

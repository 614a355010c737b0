# cython: language_level=3, cdivision=True
"""Where two disks differ: proved equal from their tables where that can be, else read and compared.

Used by `blockdiff`. `candidates` walks the tables from the start to the end and reads no data; `compare` reads what is
left over, on any number of threads, without the GIL.

What proves a range equal, the cheapest first: the rest of both chains is the same; both L1 entries name the same L2
table over the same rest, or two that have the same entries there; both say the same host bytes, the same compressed
stream, or zeros, and holes of the host's files are zeros, too. A range that is proved equal is not read, so nobody
hears that it cannot be.
"""

from typing import NamedTuple

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcmp, memset
from cpython.bytes cimport PyBytes_FromStringAndSize

from qcowfs._core cimport Disk, disk_has_warning, disk_read
from qcowfs._pair cimport (
    is_zero, pair_equal_entries, pair_free, pair_make, pair_same_place, pair_shares, pair_t, tables_t,
)
from qcowfs._resolve cimport disk_resolve, disk_t, resolve_by_layers, resolved_t
from qcowfs._source cimport source_t
from qcowfs._tables cimport (
    LAYER_RAW, NORMAL, UNALLOCATED, ZERO_ALLOCATED, fault_t, layer_l2_table, layer_map, layer_t, mapping_t,
)

cdef uint64_t ALL = <uint64_t>1 << 62  # more than any file has

cdef enum:
    BUFFER = 256 << 10  # bytes of each disk that are compared at once: both are in the processor's cache meanwhile
    LARGEST_BLOCK = 64 << 10  # within which nobody asks where the difference is, however coarse the answer may be
    PAGE = 4096  # equal ones are passed over at once, where blocks are smaller
    MOST_RANGES = 4096  # of one call of `candidates`
    MOST_STEPS = 1 << 17  # of one call of `candidates`, which takes some 50 ms then: a person may interrupt between two


cdef struct range_t:
    uint64_t start
    uint64_t end


cdef struct host_run_t:
    # What a file said last: data or a hole from one host offset to another. Asked of each cluster, lseek would cost
    # more than reading the small ones.
    const source_t* source
    range_t range
    bint hole


cdef struct failure_t:
    range_t range
    bint of_new
    fault_t fault


cdef struct found_t:
    range_t* ranges
    uint64_t count
    uint64_t room
    failure_t* failures
    uint64_t failure_count
    uint64_t failure_room
    bint no_memory


class Batch(NamedTuple):
    """What one call found.

    `ranges` has the start and the end of each range, as native uint64; `faults` (start, end, ReadFault) of what cannot
    be read, in order; `end` is how far the call got.
    """

    ranges: bytes
    faults: list
    end: int


cdef class Comparison:
    """Two disks and what they share.

    Args:
        old, new: of one cache or of two.

    Raises:
        OSError: the status of a file cannot be had.
    """

    cdef pair_t c
    cdef Disk old
    cdef Disk new

    def __init__(self, Disk old not None, Disk new not None):
        self.old = old
        self.new = new
        pair_make(&self.c, old, new)

    def __dealloc__(self):
        pair_free(&self.c)

    @property
    def end(self):
        """Bytes of the larger disk; past its end the smaller one counts as zeros, as for `qemu-img compare`."""
        return self.c.end

    def candidates(self, uint64_t offset, uint64_t most_bytes, uint64_t end=ALL):
        """Return a Batch of the ranges from `offset` to `end` that are not proved equal, `most_bytes` of them at most.

        Raises:
            MemoryError: there is no memory.
        """
        cdef found_t found
        memset(&found, 0, sizeof(found))
        try:
            with nogil:
                offset = walk(&self.c, offset, min(end, self.c.end), most_bytes, &found)
            return self.batch(&found, offset)
        finally:
            free(found.ranges)
            free(found.failures)

    def compare(self, bytes ranges not None, uint64_t block):
        """Return a Batch of the blocks that differ, of `ranges` as in a Batch. Any number of threads.

        Args:
            block: bytes of what is told apart, a power of two; within LARGEST_BLOCK nobody looks where more is asked.

        Raises:
            MemoryError: there is no memory.
        """
        cdef const range_t* wanted = <const range_t*><const char*>ranges
        cdef uint64_t count = <uint64_t>len(ranges) // sizeof(range_t)
        cdef char* buffers = <char*>malloc(2 * BUFFER)
        cdef uint64_t number
        cdef found_t found
        memset(&found, 0, sizeof(found))
        try:
            if buffers == NULL:
                raise MemoryError()
            with nogil:
                for number in range(count):
                    compare_range(&self.c, &wanted[number], min(block, <uint64_t>LARGEST_BLOCK), buffers, &found)
            return self.batch(&found, wanted[count - 1].end if count else 0)
        finally:
            free(buffers)
            free(found.ranges)
            free(found.failures)

    cdef object batch(self, const found_t* found, uint64_t end):
        cdef uint64_t number
        cdef list faults = []
        cdef Disk disk
        if found.no_memory:
            raise MemoryError()
        for disk in (self.old, self.new):
            if disk_has_warning(&disk.c):
                disk.warn_past_end()
        for number in range(found.failure_count):
            disk = self.new if found.failures[number].of_new else self.old
            faults.append((found.failures[number].range.start, found.failures[number].range.end,
                           disk.read_fault(&found.failures[number].fault)))
        ranges = PyBytes_FromStringAndSize(<char*>found.ranges, <Py_ssize_t>(found.count * sizeof(range_t)))
        return Batch(ranges, faults, end)


cdef uint64_t walk(const pair_t* pair, uint64_t offset, uint64_t end, uint64_t most, found_t* found) noexcept nogil:
    """Return how far it got: to the end, or until one of the limits is reached."""
    cdef uint64_t limit = most
    cdef uint64_t asked = offset  # whether something is shared is known up to here: it is not
    cdef uint64_t length
    cdef uint32_t steps = 0
    cdef tables_t tables
    cdef host_run_t runs[2]
    memset(runs, 0, sizeof(runs))
    while offset < end and limit > 0 and steps < MOST_STEPS and not found.no_memory:  # all lengths are > 0
        steps += 1
        if offset >= asked:
            length = end - offset
            if pair_shares(pair, offset, &length, &tables):
                offset += length
                continue
            asked = offset + length
        length = min(min(asked, end) - offset, pair_equal_entries(pair, &tables, offset)) if tables.old != 0 else 0
        if length > 0:
            offset += length
            continue
        offset += take_step(pair, runs, offset, end, &limit, found)
        if found.count >= MOST_RANGES or found.failure_count >= MOST_RANGES:
            break
    return offset


cdef uint64_t take_step(
    const pair_t* pair, host_run_t* runs, uint64_t offset, uint64_t end, uint64_t* limit, found_t* found
) noexcept nogil:
    """Go on over one answer of both; a range that is not proved equal is appended, and taken from `limit`."""
    cdef resolved_t old, new
    cdef fault_t fault
    cdef uint64_t length = end - offset
    if resolve_side(pair.old, offset, length, &old, &fault) < 0:
        return take_fault(pair, False, offset, &fault, found)
    if resolve_side(pair.new, offset, length, &new, &fault) < 0:
        return take_fault(pair, True, offset, &fault, found)
    length = min(old.mapping.length, new.mapping.length)
    if pair_same_place(pair, &old, &new):
        return length
    look_for_hole(&old, &runs[0])
    look_for_hole(&new, &runs[1])
    length = min(old.mapping.length, new.mapping.length)
    if is_zero(&old) and is_zero(&new):
        return length
    length = min(length, limit[0])
    limit[0] -= length
    append(found, offset, offset + length)
    return length


cdef void look_for_hole(resolved_t* resolved, host_run_t* run) noexcept nogil:
    """Take a hole of the host's file for the zeros that it reads as: raw and preallocated images are full of them."""
    cdef const source_t* source
    cdef uint64_t offset = resolved.mapping.host_offset
    cdef uint64_t length = ALL
    cdef int status
    if resolved.mapping.type != NORMAL:
        return
    source = resolved.layer.data
    if run.source != source or not run.range.start <= offset < run.range.end:
        status = source.status(source, offset, &length)
        if status < 0:  # then it is data, and whoever reads it learns more
            return
        run.source = source
        run.range.start = offset
        run.range.end = offset + length
        run.hole = status == 0
    resolved.mapping.length = min(resolved.mapping.length, run.range.end - offset)
    if run.hole:
        resolved.mapping.type = ZERO_ALLOCATED


cdef int resolve_side(
    const disk_t* disk, uint64_t offset, uint64_t length, resolved_t* resolved, fault_t* fault) noexcept nogil:
    if offset >= disk.virtual_size:
        resolved.layer = NULL
        resolved.mapping.type = UNALLOCATED
        resolved.mapping.length = length
        return 0
    return resolve_by_layers(disk, offset, min(length, disk.virtual_size - offset), resolved, fault)


cdef uint64_t take_fault(
    const pair_t* pair, bint of_new, uint64_t offset, const fault_t* fault, found_t* found) noexcept nogil:
    """Append what a faulty table entry makes unreadable, and return its length."""
    cdef const disk_t* disk = pair.new if of_new else pair.old
    cdef uint64_t length = fault_reach(disk, offset, fault)
    append_failure(found, of_new, offset, offset + length, fault)
    return length


cdef uint64_t fault_reach(const disk_t* disk, uint64_t offset, const fault_t* fault) noexcept nogil:
    """Bytes from `offset` to the end of what is behind the entry (a cluster, or an L2 table) and no layer above has."""
    cdef uint64_t length = disk.virtual_size - offset
    cdef uint64_t within, l2_offset
    cdef const layer_t* layer
    cdef uint32_t number
    cdef mapping_t above
    cdef fault_t ignored
    for number in range(disk.count):
        layer = disk.layers[number]
        if layer.depth == fault.depth:
            if layer.kind == LAYER_RAW:
                return min(length, BUFFER - offset % BUFFER)
            if layer_l2_table(layer, disk.cache, offset, &length, &l2_offset, &ignored) < 0:
                return length
            within = offset & ((<uint64_t>1 << layer.cluster_bits) - 1)
            return min(length, (<uint64_t>1 << layer.cluster_bits) - within)
        if layer_map(layer, disk.cache, offset, length, &above, &ignored) == 0:
            length = min(length, above.length)
    return length


cdef void compare_range(
    const pair_t* pair, const range_t* wanted, uint64_t block, char* buffers, found_t* found) noexcept nogil:
    cdef uint64_t offset = wanted.start
    cdef uint64_t end
    cdef fault_t ignored
    cdef bint of_new
    while offset < wanted.end and not found.no_memory:
        end = min(wanted.end, offset + BUFFER - offset % BUFFER)  # no block lies in two pieces
        if not compare_piece(pair, offset, end, block, buffers, found, &of_new, &ignored):
            compare_by_answers(pair, offset, end, block, buffers, found)
        offset = end


cdef bint compare_piece(
    const pair_t* pair, uint64_t start, uint64_t end, uint64_t block, char* buffers, found_t* found,
    bint* of_new, fault_t* fault) noexcept nogil:
    """False, with the fault and whose it is, if some of it cannot be read."""
    cdef uint64_t length = end - start
    of_new[0] = False
    if read_side(pair.old, buffers, start, length, fault) < 0:
        return False
    of_new[0] = True
    if read_side(pair.new, buffers + BUFFER, start, length, fault) < 0:
        return False
    compare_bytes(buffers, buffers + BUFFER, start, end, block, found)
    return True


cdef void compare_by_answers(
    const pair_t* pair, uint64_t offset, uint64_t end, uint64_t block, char* buffers, found_t* found) noexcept nogil:
    """Compare a piece with a fault in it: what the tables have one answer for is read by itself, and may fail alone."""
    cdef uint64_t length
    cdef bint of_new
    cdef fault_t fault
    while offset < end and not found.no_memory:  # length is > 0
        length = min(answer_length(pair.old, offset, end - offset), answer_length(pair.new, offset, end - offset))
        if not compare_piece(pair, offset, offset + length, block, buffers, found, &of_new, &fault):
            append_failure(found, of_new, offset, offset + length, &fault)
        offset += length


cdef uint64_t answer_length(const disk_t* disk, uint64_t offset, uint64_t length) noexcept nogil:
    cdef resolved_t resolved
    cdef fault_t fault
    if offset >= disk.virtual_size:
        return length
    length = min(length, disk.virtual_size - offset)
    if disk_resolve(disk, offset, length, &resolved, &fault) < 0:
        return min(length, fault_reach(disk, offset, &fault))
    if resolved.mapping.type == NORMAL:  # clusters that follow each other in the file need not fail together
        return min(resolved.mapping.length, LARGEST_BLOCK - offset % LARGEST_BLOCK)
    return resolved.mapping.length


cdef int read_side(disk_t* disk, char* buffer, uint64_t offset, uint64_t length, fault_t* fault) noexcept nogil:
    cdef uint64_t there = min(length, disk.virtual_size - offset) if offset < disk.virtual_size else 0
    if there > 0 and disk_read(disk, buffer, offset, there, fault) < 0:
        return -1
    memset(buffer + there, 0, length - there)
    return 0


cdef void compare_bytes(
    const char* old, const char* new, uint64_t start, uint64_t end, uint64_t block, found_t* found) noexcept nogil:
    cdef uint64_t offset = start
    cdef uint64_t page
    while offset < end:
        page = min(end, (offset // max(block, <uint64_t>PAGE) + 1) * max(block, <uint64_t>PAGE))
        if memcmp(old + (offset - start), new + (offset - start), page - offset) != 0:
            compare_page(old + (offset - start), new + (offset - start), offset, page, block, found)
        offset = page


cdef void compare_page(
    const char* old, const char* new, uint64_t start, uint64_t end, uint64_t block, found_t* found) noexcept nogil:
    cdef uint64_t offset = start
    cdef uint64_t following, place
    while offset < end:
        following = min(end, (offset // block + 1) * block)
        place = offset - start
        if old[place] != new[place] or memcmp(old + place, new + place, following - offset) != 0:
            append(found, offset, following)
        offset = following


cdef void append(found_t* found, uint64_t start, uint64_t end) noexcept nogil:
    """Append a range, or make the last one longer that it continues."""
    cdef range_t* ranges
    if found.count and found.ranges[found.count - 1].end == start:
        found.ranges[found.count - 1].end = end
        return
    if found.count == found.room:
        found.room = found.room * 2 if found.room else 64
        ranges = <range_t*>realloc(found.ranges, found.room * sizeof(range_t))
        if ranges == NULL:
            found.no_memory = True
            return
        found.ranges = ranges
    found.ranges[found.count].start = start
    found.ranges[found.count].end = end
    found.count += 1


cdef void append_failure(
    found_t* found, bint of_new, uint64_t start, uint64_t end, const fault_t* fault) noexcept nogil:
    cdef failure_t* failures
    if found.failure_count == found.failure_room:
        found.failure_room = found.failure_room * 2 if found.failure_room else 16
        failures = <failure_t*>realloc(found.failures, found.failure_room * sizeof(failure_t))
        if failures == NULL:
            found.no_memory = True
            return
        found.failures = failures
    found.failures[found.failure_count].range.start = start
    found.failures[found.failure_count].range.end = end
    found.failures[found.failure_count].of_new = of_new
    found.failures[found.failure_count].fault = fault[0]
    found.failure_count += 1

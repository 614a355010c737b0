# cython: language_level=3, cdivision=True
"""Which layer of a chain decides, and what it says: resolved once, remembered for whole ranges.

Used by `_core`. Without the GIL; any number of threads. A chain of one layer has nothing to remember: its tables are in
the cache already. What was not remembered (a range behind a damaged table) is asked of the layers each time.
"""

from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy

from qcowfs._cache cimport (
    KIND_RANGE, STATE_LOADING, cache_acquire, cache_find, cache_publish, cache_release, entry_t,
)
from qcowfs._guard cimport guard_check
from qcowfs._tables cimport (
    COMPRESSED, LAYER_RAW, NORMAL, UNALLOCATED, ZERO_ALLOCATED, fault_t, layer_map, layer_t, mapping_t, mapping_type,
    unit_bits,
)
from qcowfs.clib.atomic cimport atomic_store

cdef enum:
    UNITS_BITS = 6  # 64 units of the finest layer in one range: 4 MiB with clusters of 64 KiB, 1 to 2 KiB in the cache
    MOST_SPANS = 64 + 256  # a span ends with a unit, or with a layer (limits.MAX_CHAIN_DEPTH)


cdef struct span_t:
    # A part of a range with one answer; it ends where the next one starts.
    uint64_t start  # guest offset
    uint64_t host_offset
    uint64_t descriptor
    uint32_t host_length
    uint16_t number  # as in resolved_t
    uint16_t type  # mapping_type; UNALLOCATED: no layer decides


cdef struct range_t:
    uint32_t count
    span_t spans[MOST_SPANS + 1]  # the one after the last only says where the last one ends


cdef int disk_resolve(
    const disk_t* disk, uint64_t offset, uint64_t length, resolved_t* resolved, fault_t* fault) noexcept nogil:
    if disk.count > 1 and resolve_remembered(disk, offset, length, resolved):
        return 0
    return resolve_by_layers(disk, offset, length, resolved, fault)


cdef uint32_t range_bits_of(layer_t** layers, uint32_t count) noexcept nogil:
    cdef uint32_t finest = 21
    cdef uint32_t number
    for number in range(count):
        if layers[number].kind != LAYER_RAW:
            finest = min(finest, unit_bits(layers[number]))
    return finest + UNITS_BITS


cdef int resolve_by_layers(
    const disk_t* disk, uint64_t offset, uint64_t length, resolved_t* resolved, fault_t* fault) noexcept nogil:
    cdef uint32_t number
    cdef layer_t* layer
    resolved.number = 0
    for number in range(disk.count):
        layer = disk.layers[number]
        if offset >= layer.virtual_size:  # shorter than the layer above: zeros, whatever lies below
            break
        length = min(length, layer.virtual_size - offset)
        resolved.number = number
        if layer_map(layer, disk.cache, offset, length, &resolved.mapping, fault) < 0:
            return -1
        length = min(length, resolved.mapping.length)
        if resolved.mapping.type != UNALLOCATED:
            resolved.layer = layer
            resolved.mapping.length = length
            return 0
    resolved.layer = NULL
    resolved.mapping.type = UNALLOCATED
    resolved.mapping.length = length
    return 0


cdef bint resolve_remembered(
    const disk_t* disk, uint64_t offset, uint64_t length, resolved_t* resolved) noexcept nogil:
    """Answer from the cache, after putting the answer there; False where that cannot be done."""
    cdef uint64_t place = offset >> disk.range_bits
    cdef entry_t* entry = cache_find(disk.cache, KIND_RANGE, disk.identity, place)
    cdef bint known
    if entry == NULL:
        entry = remember_range(disk, place)
        if entry == NULL:
            return False
    known = find_span(disk, <const span_t*>entry.payload, entry.valid // sizeof(span_t) - 1, offset, length, resolved)
    cache_release(disk.cache, entry)
    return known


cdef entry_t* remember_range(const disk_t* disk, uint64_t place) noexcept nogil:
    # Two threads may both resolve a new range: that costs less than to make one of them wait.
    cdef range_t found
    cdef uint64_t size
    cdef entry_t* entry
    resolve_range(disk, place, &found)
    if found.count == 0:
        return NULL
    size = (found.count + 1) * sizeof(span_t)
    entry = cache_acquire(disk.cache, KIND_RANGE, disk.identity, place, size)
    if entry != NULL and entry.state == STATE_LOADING:
        memcpy(entry.payload, found.spans, size)
        cache_publish(disk.cache, entry, size)
    return entry


cdef void resolve_range(const disk_t* disk, uint64_t place, range_t* found) noexcept nogil:
    """Ask the layers for a whole range; a fault ends it early."""
    cdef uint64_t offset = place << disk.range_bits
    cdef uint64_t end = min(disk.virtual_size, offset + (<uint64_t>1 << disk.range_bits))
    cdef resolved_t resolved
    cdef fault_t ignored
    found.count = 0
    while offset < end and found.count < MOST_SPANS:
        if resolve_by_layers(disk, offset, end - offset, &resolved, &ignored) < 0:
            break  # its own fault, when somebody reads it
        if found.count == 0 or not continues_span(&found.spans[found.count - 1], &resolved, offset):
            add_span(found, &resolved, offset)
        offset += resolved.mapping.length
    found.spans[found.count].start = offset


cdef inline bint continues_span(const span_t* last, const resolved_t* resolved, uint64_t offset) noexcept nogil:
    if last.type != <uint16_t>resolved.mapping.type or last.number != resolved.number:
        return False
    if last.type == NORMAL or last.type == ZERO_ALLOCATED:
        return last.host_offset + (offset - last.start) == resolved.mapping.host_offset
    return last.type != COMPRESSED  # two clusters never share a stream


cdef inline void add_span(range_t* found, const resolved_t* resolved, uint64_t offset) noexcept nogil:
    cdef span_t* span = &found.spans[found.count]
    span.start = offset
    span.host_offset = resolved.mapping.host_offset
    span.descriptor = resolved.mapping.descriptor
    span.host_length = <uint32_t>resolved.mapping.host_length
    span.number = <uint16_t>resolved.number
    span.type = <uint16_t>resolved.mapping.type
    found.count += 1


cdef bint find_span(
    const disk_t* disk, const span_t* spans, uint64_t count, uint64_t offset, uint64_t length,
    resolved_t* resolved) noexcept nogil:
    """Find the last span that starts at `offset` or before it; False if the range ends before `offset`."""
    cdef uint64_t low = 0
    cdef uint64_t high = count
    cdef uint64_t middle
    if offset >= spans[count].start:
        return False
    while high - low > 1:  # spans[low].start <= offset < spans[high].start
        middle = (low + high) // 2
        if spans[middle].start <= offset:
            low = middle
        else:
            high = middle
    take_span(disk, &spans[low], min(length, spans[low + 1].start - offset), offset, resolved)
    return True


cdef inline void take_span(
    const disk_t* disk, const span_t* span, uint64_t length, uint64_t offset, resolved_t* resolved) noexcept nogil:
    cdef mapping_t* mapping = &resolved.mapping
    mapping.type = <mapping_type>span.type
    mapping.length = length
    mapping.host_offset = span.host_offset
    mapping.host_length = span.host_length
    mapping.descriptor = span.descriptor
    if span.type == NORMAL or span.type == ZERO_ALLOCATED:
        mapping.host_offset += offset - span.start
    resolved.number = span.number
    resolved.layer = NULL if span.type == UNALLOCATED else disk.layers[span.number]


cdef int disk_check(disk_t* disk, fault_t* fault) noexcept nogil:
    cdef uint32_t number
    for number in range(disk.guard_count):
        if guard_check(disk.guards[number], fault) < 0:
            atomic_store(&disk.warned, 1)  # what seemed to lie past the end of a file never did
            return -1
    return 0

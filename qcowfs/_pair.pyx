# cython: language_level=3, cdivision=True
"""What two disks share, known from their tables alone.

Used by `_compare`. Without the GIL, but for making a pair; any number of threads. A proof reads no data, so it holds
also where the data cannot be read; where there is none, nothing is said.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from qcowfs._cache cimport KIND_TABLE, cache_release, entry_t
from qcowfs._core cimport Disk
from qcowfs._resolve cimport disk_t, resolved_t
from qcowfs._tables cimport (
    COMPRESSED, LAYER_QCOW2, LAYER_RAW, NORMAL, SLICE_SIZE, LayerMap, fault_t, layer_l2_table, layer_t, table_slice,
)

cdef uint64_t COPIED = <uint64_t>1 << 63


cdef int pair_make(pair_t* pair, Disk old, Disk new) except -1:
    cdef dict numbers = {}
    pair.old = &old.c
    pair.new = &new.c
    pair.end = max(old.c.virtual_size, new.c.virtual_size)
    pair_free(pair)
    pair.old_files = number_files(old, numbers)
    pair.new_files = number_files(new, numbers)
    find_tail(pair)
    return 0


cdef void pair_free(pair_t* pair) noexcept nogil:
    free(pair.old_files)
    free(pair.new_files)
    pair.old_files = pair.new_files = NULL


cdef files_t* number_files(Disk disk, dict numbers) except NULL:
    cdef files_t* files = <files_t*>calloc(disk.c.count, sizeof(files_t))
    cdef uint32_t number
    cdef LayerMap layer
    if files == NULL:
        raise MemoryError()
    try:
        for number, layer in enumerate(disk.layers):
            files[number].source = numbers.setdefault(layer.source.place(), len(numbers))
            files[number].data = numbers.setdefault(layer.data.place(), len(numbers))
    except BaseException:
        free(files)
        raise
    return files


cdef void find_tail(pair_t* pair) noexcept nogil:
    cdef uint32_t most = min(pair.old.count, pair.new.count)
    cdef uint32_t old, new
    pair.tail = 0
    pair.kin = False
    while pair.tail < most:
        old = pair.old.count - pair.tail - 1
        new = pair.new.count - pair.tail - 1
        pair.kin = same_geometry(pair, old, new)
        if not pair.kin or not same_state(pair.old.layers[old], pair.new.layers[new]):
            return
        pair.tail += 1
        pair.kin = False


cdef bint same_geometry(const pair_t* pair, uint32_t old, uint32_t new) noexcept nogil:
    """Do equal tables of the two layers say the same?"""
    cdef const layer_t* a = pair.old.layers[old]
    cdef const layer_t* b = pair.new.layers[new]
    return (pair.old_files[old].source == pair.new_files[new].source
            and pair.old_files[old].data == pair.new_files[new].data
            and a.kind == b.kind and a.version == b.version and a.cluster_bits == b.cluster_bits
            and a.l2_bits == b.l2_bits and a.extended_l2 == b.extended_l2 and a.external_data == b.external_data
            and a.zstd == b.zstd)


cdef bint same_state(const layer_t* a, const layer_t* b) noexcept nogil:
    return a.virtual_size == b.virtual_size and a.l1_offset == b.l1_offset and a.l1_entries == b.l1_entries


cdef bint pair_shares(const pair_t* pair, uint64_t offset, uint64_t* length, tables_t* tables) noexcept nogil:
    cdef uint64_t old_table, new_table
    cdef uint32_t old_rest, new_rest
    tables.old = tables.new = 0
    if offset >= pair.old.virtual_size or offset >= pair.new.virtual_size:
        return False
    length[0] = min(length[0], min(pair.old.virtual_size, pair.new.virtual_size) - offset)
    old_rest = rest_at(pair.old, pair.tail, offset, length, &old_table)
    new_rest = rest_at(pair.new, pair.tail, offset, length, &new_table)
    if old_rest == new_rest and old_rest <= pair.tail:
        return True
    if old_rest != new_rest or old_rest > pair.tail + 1 or not pair.kin or old_table == 0 or new_table == 0:
        return False
    if old_table == new_table:
        return True
    tables.old = old_table
    tables.new = new_table
    return False


cdef uint64_t pair_equal_entries(const pair_t* pair, const tables_t* tables, uint64_t offset) noexcept nogil:
    # Slices begin at the same places of both tables, so an entry has the same index in both.
    cdef const layer_t* layer = pair.old.layers[pair.old.count - pair.tail - 1]
    cdef const layer_t* other = pair.new.layers[pair.new.count - pair.tail - 1]
    cdef uint32_t entry_words = 2 if layer.extended_l2 else 1
    cdef uint64_t cluster = offset >> layer.cluster_bits
    cdef uint64_t byte = (cluster & ((<uint64_t>1 << layer.l2_bits) - 1)) * 8 * entry_words
    cdef uint64_t start = byte & ~<uint64_t>(SLICE_SIZE - 1)
    cdef uint64_t last = min(<uint64_t>SLICE_SIZE, ((<uint64_t>8 * entry_words) << layer.l2_bits) - start) // 8
    cdef uint64_t found
    cdef fault_t ignored
    cdef entry_t* old = table_slice(layer.source, pair.old.cache, KIND_TABLE, tables.old + start, &ignored)
    cdef entry_t* new
    if old == NULL:
        return 0
    new = table_slice(other.source, pair.new.cache, KIND_TABLE, tables.new + start, &ignored)
    if new == NULL:
        cache_release(pair.old.cache, old)
        return 0
    last = min(last, min(old.valid, new.valid) // 8)
    found = equal_words(layer, <const uint64_t*>old.payload, <const uint64_t*>new.payload, (byte - start) // 8, last)
    cache_release(pair.old.cache, old)
    cache_release(pair.new.cache, new)
    found //= entry_words
    return ((cluster + found) << layer.cluster_bits) - offset if found else 0


cdef uint64_t equal_words(
    const layer_t* layer, const uint64_t* old, const uint64_t* new, uint64_t index, uint64_t last) noexcept nogil:
    """How many words from `index` on are equal. Whether a cluster has other references as well is no difference."""
    cdef uint64_t start = index
    cdef uint64_t mask = ~<uint64_t>0
    if layer.kind == LAYER_QCOW2 and not layer.external_data and not layer.extended_l2:
        mask = ~COPIED
    while index < last and (old[index] ^ new[index]) & mask == 0:
        index += 1
    return index - start


cdef uint32_t rest_at(
    const disk_t* disk, uint32_t tail, uint64_t offset, uint64_t* length, uint64_t* l2_offset) noexcept nogil:
    """How many layers are left at `offset` when those without an L2 table are gone; `l2_offset` is the first's table.

    It goes no deeper than to the layers of the tail. None are left where a layer ends before `offset`: zeros.
    """
    cdef uint32_t number
    cdef const layer_t* layer
    cdef fault_t ignored
    l2_offset[0] = 0
    for number in range(disk.count - tail):
        layer = disk.layers[number]
        if offset >= layer.virtual_size:
            return 0
        length[0] = min(length[0], layer.virtual_size - offset)
        if layer.kind == LAYER_RAW:
            return disk.count - number
        if layer_l2_table(layer, disk.cache, offset, length, l2_offset, &ignored) < 0:
            l2_offset[0] = 0
            return disk.count - number
        if l2_offset[0] != 0:
            return disk.count - number
    return tail


cdef bint is_zero(const resolved_t* resolved) noexcept nogil:
    return resolved.mapping.type != NORMAL and resolved.mapping.type != COMPRESSED


cdef bint pair_same_place(const pair_t* pair, const resolved_t* old, const resolved_t* new) noexcept nogil:
    cdef const layer_t* a = old.layer
    cdef const layer_t* b = new.layer
    if is_zero(old) or is_zero(new):
        return is_zero(old) and is_zero(new)
    if old.mapping.type != new.mapping.type:
        return False
    if old.mapping.type == NORMAL:
        return (old.mapping.host_offset == new.mapping.host_offset
                and pair.old_files[old.number].data == pair.new_files[new.number].data)
    return (old.mapping.descriptor == new.mapping.descriptor
            and pair.old_files[old.number].source == pair.new_files[new.number].source
            and a.kind == b.kind and a.cluster_bits == b.cluster_bits and a.zstd == b.zstd)

# cython: language_level=3, cdivision=True
"""What two disks share, known from their tables alone.

Used by `_compare`. Without the GIL, but for making a pair; any number of threads. A proof reads no data, so it holds
also where the data cannot be read; where there is none, nothing is said.
"""

from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from qcowfs._core cimport Disk
from qcowfs._resolve cimport disk_t, resolved_t
from qcowfs._tables cimport COMPRESSED, LAYER_RAW, NORMAL, LayerMap, fault_t, layer_l2_table, layer_t


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


cdef bint pair_shares(const pair_t* pair, uint64_t offset, uint64_t* length) noexcept nogil:
    cdef uint64_t old_table, new_table
    cdef uint32_t old_rest, new_rest
    if offset >= pair.old.virtual_size or offset >= pair.new.virtual_size:
        return False
    length[0] = min(length[0], min(pair.old.virtual_size, pair.new.virtual_size) - offset)
    old_rest = rest_at(pair.old, pair.tail, offset, length, &old_table)
    new_rest = rest_at(pair.new, pair.tail, offset, length, &new_table)
    if old_rest != new_rest:
        return False
    if old_rest <= pair.tail:
        return True
    return old_rest == pair.tail + 1 and pair.kin and old_table == new_table and old_table != 0


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

# cython: language_level=3, cdivision=True
"""L1 and L2 tables, subclusters, compressed descriptors: one layer's answer for a guest offset.

Used by `_core` (reads, extents) and `_usage` (sizes). Without the GIL; any number of threads. Tables are read on demand
in slices of 1 KiB through the cache, so that neither opening a point nor a random read depends on the table's size.
The rules are those of the qcow2 specification, section "Cluster mapping", in the order in which QEMU applies them.
"""

from libc.errno cimport EIO, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs._cache cimport (
    KIND_TABLE, STATE_FAILED, STATE_LOADING, cache_abandon, cache_acquire, cache_publish, cache_release,
    cache_t, entry_kind, entry_t,
)
from qcowfs._source cimport Source, source_t
from qcowfs.clib.endian cimport be64toh

cdef uint64_t OFFSET_MASK = <uint64_t>0x00FFFFFFFFFFFE00  # bits 9 to 55 of an L1 or L2 entry
cdef uint64_t COPIED = <uint64_t>1 << 63  # inaccurate in inactive tables: means nothing but "data" at host offset 0
cdef uint64_t COMPRESSED_FLAG = <uint64_t>1 << QCOW2_COMPRESSED_BIT
cdef uint64_t QCOW1_COMPRESSED_FLAG = <uint64_t>1 << QCOW1_COMPRESSED_BIT
cdef uint64_t LOW_HALF = <uint64_t>0xFFFFFFFF
cdef uint64_t LARGEST_TABLE_OFFSET = <uint64_t>1 << 62  # so that no sum with a table's size wraps round

cdef enum:
    SECTOR_SIZE = 512


cdef struct place_t:
    # Where one entry of a table is: its slice, and its index in it.
    uint64_t slice
    uint64_t index


cdef class LayerMap:
    """One layer in one state, made of numbers that the parsers have checked. Keeps its sources alive."""

    @staticmethod
    def qcow2(Source source not None, Source data not None, *, uint32_t depth, uint64_t virtual_size, uint32_t version,
              uint32_t cluster_bits, bint extended_l2, bint external_data, bint zstd, uint64_t l1_offset,
              uint64_t l1_entries):
        """Return a layer of qcow2 (version 2 or 3): the active state, or an internal snapshot by its own L1 table.

        Args:
            source: the image file, which holds the tables and compressed clusters.
            data: what standard clusters are read from: the same source, or the external data file.
            virtual_size: bytes of the disk in this state.
            l1_offset, l1_entries: this state's L1 table, in bytes and in entries.
        """
        cdef LayerMap layer = LayerMap.__new__(LayerMap)
        layer.use(LAYER_QCOW2, source, data, depth, virtual_size)
        layer.c.version = version
        layer.c.cluster_bits = cluster_bits
        layer.c.l2_bits = <uint32_t>(cluster_bits - (4 if extended_l2 else 3))
        layer.c.extended_l2 = extended_l2
        layer.c.external_data = external_data
        layer.c.zstd = zstd
        layer.c.l1_offset = l1_offset
        layer.c.l1_entries = l1_entries
        return layer

    @staticmethod
    def qcow1(Source source not None, *, uint32_t depth, uint64_t virtual_size, uint32_t cluster_bits,
              uint32_t l2_bits, uint64_t l1_offset):
        """Return a layer of qcow version 1. Its L1 table is as long as its virtual size needs."""
        cdef LayerMap layer = LayerMap.__new__(LayerMap)
        cdef uint64_t reach = <uint64_t>1 << (cluster_bits + l2_bits)
        layer.use(LAYER_QCOW1, source, source, depth, virtual_size)
        layer.c.cluster_bits = cluster_bits
        layer.c.l2_bits = l2_bits
        layer.c.l1_offset = l1_offset
        layer.c.l1_entries = (virtual_size + reach - 1) // reach
        return layer

    @staticmethod
    def raw(Source source not None, *, uint32_t depth, uint64_t virtual_size):
        """Return a raw layer: guest offsets are host offsets."""
        cdef LayerMap layer = LayerMap.__new__(LayerMap)
        layer.use(LAYER_RAW, source, source, depth, virtual_size)
        return layer

    cdef void use(self, layer_kind kind, Source source, Source data, uint32_t depth, uint64_t virtual_size):
        self.source = source
        self.data = data
        self.c.kind = kind
        self.c.source = &source.c
        self.c.data = &data.c
        self.c.depth = depth
        self.c.virtual_size = virtual_size


cdef int layer_map(
    const layer_t* layer, cache_t* cache, uint64_t offset, uint64_t length,
    mapping_t* mapping, fault_t* fault) noexcept nogil:
    fault.depth = layer.depth
    fault.guest_offset = offset
    if layer.kind == LAYER_RAW:
        mapping.type = NORMAL
        mapping.host_offset = offset
        mapping.length = length
        return 0
    return map_through_l1(layer, cache, offset, length, mapping, fault)


cdef int map_through_l1(
    const layer_t* layer, cache_t* cache, uint64_t offset, uint64_t length,
    mapping_t* mapping, fault_t* fault) noexcept nogil:
    cdef uint64_t l2_offset
    mapping.length = length
    if layer_l2_table(layer, cache, offset, &mapping.length, &l2_offset, fault) < 0:
        return -1
    if l2_offset == 0:
        mapping.type = UNALLOCATED
        return 0
    return map_through_l2(layer, cache, l2_offset, offset, mapping, fault)


cdef int layer_l2_table(
    const layer_t* layer, cache_t* cache, uint64_t offset, uint64_t* length, uint64_t* l2_offset,
    fault_t* fault) noexcept nogil:
    cdef uint32_t reach_bits = layer.cluster_bits + layer.l2_bits  # one L1 entry covers this many bits of offset
    cdef uint64_t index = offset >> reach_bits
    cdef uint64_t run = 1
    l2_offset[0] = 0
    if index >= layer.l1_entries:  # a snapshot's L1 may be shorter than its disk: the rest is unallocated
        return 0
    run = empty_l1_run(layer, cache, index, l2_offset, fault)
    length[0] = min(length[0], ((index + max(run, <uint64_t>1)) << reach_bits) - offset)
    return 0 if run > 0 else -1


cdef uint64_t empty_l1_run(
    const layer_t* layer, cache_t* cache, uint64_t index, uint64_t* l2_offset, fault_t* fault) noexcept nogil:
    """Entries from `index` on that share one answer: 1 with an L2 table, any number without; 0 is a fault."""
    cdef place_t place = place_of(layer.l1_offset, index * 8, SLICE_SIZE)
    cdef entry_t* slice = table_slice(layer.source, cache, KIND_TABLE, place.slice, fault)
    cdef uint64_t run = 0
    cdef uint64_t last = min(<uint64_t>SLICE_ENTRIES, layer.l1_entries - index + place.index)
    cdef const uint64_t* entries
    if slice == NULL:
        return 0
    entries = <const uint64_t*>slice.payload
    last = min(last, slice.valid // 8)
    if place.index >= last:
        fail(fault, RULE_L1_PAST_END, EIO, place.slice + place.index * 8)
    else:
        run = 1
        l2_offset[0] = l2_table_offset(layer, entries[place.index])
        if l2_offset[0] == 0:
            while place.index + run < last and l2_table_offset(layer, entries[place.index + run]) == 0:
                run += 1
        elif l2_offset[0] > LARGEST_TABLE_OFFSET:  # qcow version 1 stores all 64 bits
            fail(fault, RULE_L2_PAST_END, EIO, place.slice + place.index * 8)
            run = 0
        elif layer.kind == LAYER_QCOW2 and l2_offset[0] & ((<uint64_t>1 << layer.cluster_bits) - 1):
            fail(fault, RULE_L1_UNALIGNED, EIO, place.slice + place.index * 8)
            run = 0
    cache_release(cache, slice)
    return run


cdef inline uint64_t l2_table_offset(const layer_t* layer, uint64_t entry) noexcept nogil:
    return entry & OFFSET_MASK if layer.kind == LAYER_QCOW2 else entry


cdef int map_through_l2(
    const layer_t* layer, cache_t* cache, uint64_t l2_offset, uint64_t offset,
    mapping_t* mapping, fault_t* fault) noexcept nogil:
    cdef uint64_t index = (offset >> layer.cluster_bits) & ((<uint64_t>1 << layer.l2_bits) - 1)
    cdef uint32_t entry_words = 2 if layer.extended_l2 else 1
    cdef uint64_t table_size = (<uint64_t>8 * entry_words) << layer.l2_bits
    cdef place_t place = place_of(l2_offset, index * 8 * entry_words, table_size)
    cdef entry_t* slice = table_slice(layer.source, cache, KIND_TABLE, place.slice, fault)
    cdef uint64_t last
    cdef int status = -1
    if slice == NULL:
        return -1
    last = min(min(<uint64_t>SLICE_SIZE, l2_offset + table_size - place.slice), slice.valid) // 8
    if place.index + entry_words > last:
        fail(fault, RULE_L2_PAST_END, EIO, place.slice + place.index * 8)
    else:
        status = map_run(layer, <const uint64_t*>slice.payload, place.index, last, offset, mapping, fault)
        if status < 0:
            fault.host_offset = place.slice + place.index * 8
    cache_release(cache, slice)
    return status


cdef int map_run(
    const layer_t* layer, const uint64_t* words, uint64_t index, uint64_t last, uint64_t offset,
    mapping_t* mapping, fault_t* fault) noexcept nogil:
    """Map `offset` by the entry at words[index], and go on over the entries that continue it in the file."""
    cdef uint64_t unit = <uint64_t>1 << unit_bits(layer)
    cdef uint64_t start = offset & ~(unit - 1)
    cdef uint64_t within = offset - start
    cdef uint64_t limit = within + mapping.length
    cdef uint64_t length = unit
    cdef uint64_t entry_words = 2 if layer.extended_l2 else 1
    cdef mapping_t following
    cdef fault_t ignored
    if map_unit(layer, words, index, start, mapping, fault) < 0:
        return -1
    if mapping.type == COMPRESSED:  # the whole cluster, whatever its subclusters; two clusters never share a stream
        mapping.length = min(mapping.length, cluster_end(layer, offset) - offset)
        return 0
    while length < limit:  # length grows by one unit a turn
        if (start + length) & ((<uint64_t>1 << layer.cluster_bits) - 1) == 0:
            index += entry_words
        if index + entry_words > last:
            break
        if map_unit(layer, words, index, start + length, &following, &ignored) < 0:
            break  # its own fault, when somebody reads it
        if not continues(mapping, &following, length):
            break
        length += unit
    mapping.length = min(length, limit) - within
    if mapping.type == NORMAL or mapping.type == ZERO_ALLOCATED:
        mapping.host_offset += within
    return 0


cdef inline bint continues(const mapping_t* first, const mapping_t* following, uint64_t length) noexcept nogil:
    if first.type != following.type:
        return False
    if first.type == NORMAL or first.type == ZERO_ALLOCATED:
        return following.host_offset == first.host_offset + length
    return True


cdef uint32_t unit_bits(const layer_t* layer) noexcept nogil:
    return layer.cluster_bits - (<uint32_t>5 if layer.extended_l2 else <uint32_t>0)


cdef inline uint64_t cluster_end(const layer_t* layer, uint64_t offset) noexcept nogil:
    return ((offset >> layer.cluster_bits) + 1) << layer.cluster_bits


cdef inline int map_unit(
    const layer_t* layer, const uint64_t* words, uint64_t index, uint64_t offset,
    mapping_t* mapping, fault_t* fault) noexcept nogil:
    if layer.kind == LAYER_QCOW1:
        return map_qcow1(layer, words[index], mapping, fault)
    if words[index] & COMPRESSED_FLAG:
        if layer.external_data:
            return fail(fault, RULE_COMPRESSED_IN_DATA_FILE, EIO, 0)
        parse_compressed(layer, words[index], mapping)
        return 0
    if layer.extended_l2:
        return map_subcluster(layer, words[index], words[index + 1], offset, mapping, fault)
    return map_cluster(layer, words[index], offset, mapping, fault)


cdef inline int map_qcow1(
    const layer_t* layer, uint64_t entry, mapping_t* mapping, fault_t* fault) noexcept nogil:
    if entry == 0:
        mapping.type = UNALLOCATED
    elif entry & QCOW1_COMPRESSED_FLAG:
        parse_compressed(layer, entry, mapping)
    elif entry & (SECTOR_SIZE - 1):  # QEMU asks no more of version 1 than a sector's alignment
        return fail(fault, RULE_SECTOR_UNALIGNED, EIO, 0)
    else:
        mapping.type = NORMAL
        mapping.host_offset = entry
    return 0


cdef void parse_compressed(const layer_t* layer, uint64_t entry, mapping_t* mapping) noexcept nogil:
    cdef uint32_t offset_bits
    cdef uint64_t sectors
    mapping.type = COMPRESSED
    if layer.kind == LAYER_QCOW1:  # the length is in bytes
        offset_bits = QCOW1_COMPRESSED_BIT - layer.cluster_bits
        mapping.descriptor = entry & ~QCOW1_COMPRESSED_FLAG
        mapping.host_offset = entry & ((<uint64_t>1 << offset_bits) - 1)
        mapping.host_length = mapping.descriptor >> offset_bits
        return
    offset_bits = QCOW2_COMPRESSED_BIT - (layer.cluster_bits - 8)
    mapping.descriptor = entry & (COMPRESSED_FLAG - 1)
    mapping.host_offset = entry & ((<uint64_t>1 << offset_bits) - 1)
    sectors = (mapping.descriptor >> offset_bits) + 1
    mapping.host_length = sectors * 512 - (mapping.host_offset & 511)


cdef inline int map_cluster(
    const layer_t* layer, uint64_t entry, uint64_t offset, mapping_t* mapping, fault_t* fault) noexcept nogil:
    cdef uint64_t host_offset = entry & OFFSET_MASK
    if entry & 1:  # bit 0: reads as zeros
        if layer.version < 3:
            return fail(fault, RULE_ZERO_IN_VERSION_2, EIO, 0)
        mapping.type = ZERO_ALLOCATED if host_offset else ZERO
    elif host_offset == 0 and not (layer.external_data and entry & COPIED):
        mapping.type = UNALLOCATED
        return 0
    else:
        mapping.type = NORMAL
    mapping.host_offset = host_offset
    return 0 if mapping.type == ZERO else check_host_offset(layer, host_offset, offset, fault)


cdef int map_subcluster(
    const layer_t* layer, uint64_t entry, uint64_t bits, uint64_t offset,
    mapping_t* mapping, fault_t* fault) noexcept nogil:
    # bits 0 to 31: the subcluster is allocated; bits 32 to 63: it reads as zeros. Rows as in QEMU's
    # qcow2_get_subcluster_type: host cluster | allocated | zero -> answer
    #   yes | any subcluster with both bits -> corrupt      no | any subcluster allocated -> corrupt
    #   yes | no  | yes -> ZERO_ALLOCATED                    no | no | yes -> ZERO
    #   yes | yes | no  -> NORMAL                            no | no | no  -> UNALLOCATED
    #   yes | no  | no  -> UNALLOCATED
    cdef uint64_t in_cluster = offset & ((<uint64_t>1 << layer.cluster_bits) - 1)
    cdef uint64_t number = in_cluster >> (layer.cluster_bits - 5)
    cdef uint64_t host_offset = entry & OFFSET_MASK
    cdef bint has_cluster = host_offset != 0 or (layer.external_data and entry & COPIED)
    if has_cluster and (bits >> 32) & bits:
        return fail(fault, RULE_SUBCLUSTER_BOTH, EIO, 0)
    if not has_cluster and bits & LOW_HALF:
        return fail(fault, RULE_SUBCLUSTER_WITHOUT_CLUSTER, EIO, 0)
    mapping.host_offset = host_offset + in_cluster
    if (bits >> (32 + number)) & 1:
        mapping.type = ZERO_ALLOCATED if has_cluster else ZERO
    else:
        mapping.type = NORMAL if (bits >> number) & 1 else UNALLOCATED
    return check_host_offset(layer, host_offset, offset - in_cluster, fault) if has_cluster else 0


cdef inline int check_host_offset(
    const layer_t* layer, uint64_t host_offset, uint64_t offset, fault_t* fault) noexcept nogil:
    if host_offset & ((<uint64_t>1 << layer.cluster_bits) - 1):
        return fail(fault, RULE_L2_UNALIGNED, EIO, 0)
    if layer.external_data and host_offset != offset:
        return fail(fault, RULE_DATA_FILE_OFFSET, EIO, 0)
    return 0


cdef inline place_t place_of(uint64_t table, uint64_t byte, uint64_t table_size) noexcept nogil:
    """The slice of `table` that holds its `byte`; a table smaller than a slice is a slice of its own."""
    cdef place_t place
    place.slice = table + (byte & ~<uint64_t>(SLICE_SIZE - 1))
    place.index = (byte & (SLICE_SIZE - 1)) // 8
    return place


cdef inline int fail(fault_t* fault, rule_t rule, int error, uint64_t host_offset) noexcept nogil:
    fault.rule = rule
    fault.error = error
    fault.host_offset = host_offset
    return -1


cdef int layer_fault(
    fault_t* fault, const layer_t* layer, rule_t rule, int error, uint64_t offset, uint64_t host_offset) noexcept nogil:
    fault.depth = layer.depth
    fault.guest_offset = offset
    return fail(fault, rule, error, host_offset)


cdef entry_t* table_slice(
    const source_t* source, cache_t* cache, entry_kind kind, uint64_t place, fault_t* fault) noexcept nogil:
    cdef entry_t* slice = cache_acquire(cache, kind, source.identity, place, SLICE_SIZE)
    if slice == NULL:
        fail(fault, RULE_NO_MEMORY, ENOMEM, place)
        return NULL
    if slice.state == STATE_LOADING:
        load_slice(source, cache, slice)
    if slice.state == STATE_FAILED:
        fail(fault, RULE_READ_FAILED, slice.failure, place)
        cache_release(cache, slice)
        return NULL
    return slice


cdef void load_slice(const source_t* source, cache_t* cache, entry_t* slice) noexcept nogil:
    cdef int64_t got = source.pread(source, slice.payload, SLICE_SIZE, slice.place)
    cdef uint64_t* words = <uint64_t*>slice.payload
    cdef uint64_t index
    if got < 0:
        cache_abandon(cache, slice, <int>-got)
        return
    if slice.kind == KIND_TABLE:  # big-endian is converted once, here
        for index in range(<uint64_t>got // 8):
            words[index] = be64toh(words[index])
    cache_publish(cache, slice, <uint64_t>got)

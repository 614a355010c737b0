# cython: language_level=3, cdivision=True
"""How many bytes of its file a point allocates, and how many of them nobody else uses.

Used by `snapshot`. Walks L2 tables, so it is asked for only when somebody wants a size; every walk is bounded by a
budget of table bytes, and a table that several points share is counted once. One thread for each object.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc, qsort, realloc

from qcowfs._cache cimport KIND_BYTES, Cache, cache_release, cache_t, entry_t
from qcowfs._source cimport source_t
from qcowfs._tables cimport (
    LAYER_QCOW1, QCOW1_COMPRESSED_BIT, QCOW2_COMPRESSED_BIT, SLICE_SIZE, LayerMap, fault_t, layer_t, mapping_t,
    parse_compressed, table_slice,
)
from qcowfs.clib.endian cimport be64toh

cdef uint64_t OFFSET_MASK = <uint64_t>0x00FFFFFFFFFFFE00

cdef enum:
    PIECE = 4096  # bytes of an L1 table that are read at once
    ENTRY_COST = 64  # bytes that an L1 entry takes from the budget: looking at one in Python takes as long
    MOST_SHARED_CLUSTERS = 8 << 20  # host clusters with compressed data that one point may hold to be counted: 64 MiB


cdef struct clusters_t:
    # Host clusters that compressed streams of the point lie in, one item for each stream and cluster.
    uint64_t* items
    uint64_t count
    uint64_t room


cdef struct refcounts_t:
    const source_t* source
    cache_t* cache
    uint64_t table_offset
    uint64_t table_entries
    uint32_t order
    uint32_t cluster_bits


cdef class Budget:
    """Bytes of tables that may still be read; shared by the walks of one mount or one command."""

    cdef readonly int64_t left

    def __init__(self, int64_t size):
        self.left = size


cdef class Allocation:
    """Counts what states of one file allocate.

    Args:
        budget: the walk stops counting when it is used up; what is left over is then taken as fully allocated.

    Tables are remembered by their host offset: internal snapshots share most of them.
    """

    cdef dict counts
    cdef Budget budget

    def __init__(self, Budget budget not None):
        self.counts = {}
        self.budget = budget

    def count(self, LayerMap layer not None):
        """Return the bytes of clusters that `layer`'s disk allocates, an upper bound once the budget is used up."""
        cdef uint64_t reach = <uint64_t>1 << (layer.c.cluster_bits + layer.c.l2_bits)
        cdef uint64_t needed = (layer.c.virtual_size + reach - 1) // reach  # VM state lies past the disk
        cdef uint64_t entries = min(needed, layer.c.l1_entries)
        cdef uint64_t total = 0
        if self.budget.left <= 0 or not self.affords(layer, entries):
            return min(layer.c.virtual_size, <uint64_t>layer.source.size)
        for offset in l2_tables(layer, entries):
            known = self.counts.get(offset)
            if known is None:
                known = self.counts[offset] = self.count_table(layer, offset)
            total += known
        return min(total, layer.c.virtual_size)

    cdef bint affords(self, LayerMap layer, uint64_t entries) except -1:
        """Is there enough left for all tables that were not counted yet? If not, none is read: 12 TiB cost 60 ms."""
        cdef int64_t size = <int64_t>(16 if layer.c.extended_l2 else 8) << layer.c.l2_bits
        cdef int64_t wanted = 0
        self.budget.left -= <int64_t>entries * 8
        for offset in l2_tables(layer, entries):
            self.budget.left -= ENTRY_COST
            if offset not in self.counts:
                wanted += size
            if wanted > self.budget.left:
                return False
        return True

    cdef object count_table(self, LayerMap layer, uint64_t offset):
        cdef uint64_t total = 0
        cdef uint64_t index, words
        cdef uint64_t* table = read_table(layer, offset, &words, self.budget)
        try:
            with nogil:
                index = 0
                while index < words:
                    total += allocated_by(&layer.c, table[index])
                    index += 2 if layer.c.extended_l2 else 1
        finally:
            free(table)
        return total


cdef class Exclusive:
    """Counts the clusters that only one state of a qcow2 file uses: what deleting it would free.

    Args:
        cache: for refcount blocks.
        refcount_table_offset, refcount_table_clusters, refcount_order: as in the header.
        budget: bytes of tables that may be read.
    """

    cdef refcounts_t refcounts
    cdef Cache cache
    cdef Budget budget
    cdef clusters_t shared

    def __init__(self, Cache cache not None, Budget budget not None, *, uint64_t refcount_table_offset,
                 uint64_t refcount_table_clusters, uint32_t refcount_order):
        self.cache = cache
        self.budget = budget
        self.refcounts.cache = &cache.c
        self.refcounts.table_offset = refcount_table_offset
        self.refcounts.table_entries = refcount_table_clusters  # in clusters until count() knows their size
        self.refcounts.order = refcount_order

    def __dealloc__(self):
        free(self.shared.items)

    def count(self, LayerMap layer not None):
        """Return the bytes in clusters of `layer`'s state (disk, VM state, tables) that nothing else references.

        Returns:
            None if the budget or the memory for it is used up.

        A cluster is exclusive if its refcount equals the references from this state; an L2 table with a refcount of
        more than one is shared, and then all under it is.
        """
        cdef uint64_t cluster_size = <uint64_t>1 << layer.c.cluster_bits
        cdef refcounts_t refcounts = self.refcounts
        cdef uint64_t clusters = 0
        cdef uint64_t cluster, end, references
        refcounts.source = layer.c.source
        refcounts.cluster_bits = layer.c.cluster_bits
        refcounts.table_entries = self.refcounts.table_entries * (cluster_size // 8)
        self.shared.count = 0
        end = (layer.c.l1_offset + layer.c.l1_entries * 8 + cluster_size - 1) >> layer.c.cluster_bits
        with nogil:  # here and below: the source may be one that needs the GIL in another thread
            for cluster in range(layer.c.l1_offset >> layer.c.cluster_bits, end):
                clusters += refcount_of(&refcounts, cluster) == 1
        self.budget.left -= <int64_t>layer.c.l1_entries * 8
        for offset in l2_tables(layer, layer.c.l1_entries):
            self.budget.left -= ENTRY_COST
            if self.budget.left <= 0:
                return None
            cluster = <uint64_t>offset >> layer.c.cluster_bits
            with nogil:
                references = refcount_of(&refcounts, cluster)
            if references != 1:
                continue
            found = self.count_table(layer, offset, &refcounts)
            if found < 0:
                return None
            clusters += 1 + <uint64_t>found
        with nogil:
            clusters += exclusive_streams(&self.shared, &refcounts)
        return clusters * cluster_size

    cdef int64_t count_table(self, LayerMap layer, uint64_t offset, const refcounts_t* refcounts) except -2:
        cdef uint64_t words
        cdef int64_t found
        cdef uint64_t* table = read_table(layer, offset, &words, self.budget)
        with nogil:
            found = exclusive_clusters(&layer.c, table, words, refcounts, &self.shared)
        free(table)
        return found


def l2_tables(LayerMap layer not None, uint64_t entries):
    """Yield the host offsets of the L2 tables that the first `entries` of the L1 table name, in order."""
    cdef uint64_t index, place
    cdef uint64_t offset
    for index in range(0, entries, PIECE // 8):
        place = layer.c.l1_offset + index * 8
        words = layer.source.read_at(place, min(<uint64_t>PIECE, (entries - index) * 8))
        if not any(words):
            continue
        for offset in memory_words(words):
            if layer.c.kind != LAYER_QCOW1:
                offset &= OFFSET_MASK
            if offset:
                yield offset
        if len(words) < PIECE:
            return  # the end of the table, or of a truncated file


cdef list memory_words(bytes data):
    cdef const uint64_t* words = <const uint64_t*><const char*>data
    cdef Py_ssize_t index
    return [be64toh(words[index]) for index in range(len(data) // 8)]


cdef uint64_t* read_table(LayerMap layer, uint64_t offset, uint64_t* words, Budget budget) except NULL:
    """Return the L2 table at `offset` in native words; the caller frees it."""
    cdef uint64_t size = <uint64_t>(16 if layer.c.extended_l2 else 8) << layer.c.l2_bits
    cdef uint64_t* table = <uint64_t*>malloc(size)
    cdef int64_t got
    cdef uint64_t index
    if table == NULL:
        raise MemoryError()
    budget.left -= <int64_t>size
    with nogil:
        got = layer.c.source.pread(layer.c.source, table, size, offset)
        words[0] = <uint64_t>got // 8 if got > 0 else 0  # an unreadable table allocates nothing that can be read
        if layer.c.extended_l2:
            words[0] &= ~<uint64_t>1
        for index in range(words[0]):
            table[index] = be64toh(table[index])
    return table


cdef inline bint is_compressed(const layer_t* layer, uint64_t entry) noexcept nogil:
    return (entry >> (QCOW1_COMPRESSED_BIT if layer.kind == LAYER_QCOW1 else QCOW2_COMPRESSED_BIT)) & 1


cdef inline uint64_t allocated_by(const layer_t* layer, uint64_t entry) noexcept nogil:
    """Bytes of the file that one L2 entry stands for."""
    cdef mapping_t mapping
    if is_compressed(layer, entry):
        parse_compressed(layer, entry, &mapping)
        return mapping.host_length
    if layer.kind != LAYER_QCOW1:
        entry &= (OFFSET_MASK | <uint64_t>1 << 63) if layer.external_data else OFFSET_MASK
    return <uint64_t>1 << layer.cluster_bits if entry else 0


cdef int64_t exclusive_clusters(
    const layer_t* layer, const uint64_t* table, uint64_t words, const refcounts_t* refcounts, clusters_t* shared
) noexcept nogil:
    """Standard clusters of one table with a refcount of 1; streams go to `shared`. -1: too many of them."""
    cdef uint64_t index = 0
    cdef uint64_t host_offset
    cdef int64_t found = 0
    while index < words:
        host_offset = table[index] & OFFSET_MASK
        if is_compressed(layer, table[index]):
            if not remember_stream(layer, table[index], shared):
                return -1
        elif host_offset and refcount_of(refcounts, host_offset >> layer.cluster_bits) == 1:
            found += 1
        index += 2 if layer.extended_l2 else 1
    return found


cdef bint remember_stream(const layer_t* layer, uint64_t entry, clusters_t* shared) noexcept nogil:
    cdef mapping_t mapping
    cdef uint64_t cluster
    parse_compressed(layer, entry, &mapping)
    for cluster in range(mapping.host_offset >> layer.cluster_bits,
                         ((mapping.host_offset + mapping.host_length - 1) >> layer.cluster_bits) + 1):
        if not append(shared, cluster):
            return False
    return True


cdef bint append(clusters_t* clusters, uint64_t cluster) noexcept nogil:
    cdef uint64_t* items
    if clusters.count == clusters.room:
        if clusters.room >= MOST_SHARED_CLUSTERS:
            return False
        clusters.room = clusters.room * 2 if clusters.room else 1024
        items = <uint64_t*>realloc(clusters.items, clusters.room * sizeof(uint64_t))
        if items == NULL:
            clusters.room = clusters.count
            return False
        clusters.items = items
    clusters.items[clusters.count] = cluster
    clusters.count += 1
    return True


cdef int compare(const void* left, const void* right) noexcept nogil:
    cdef uint64_t a = (<const uint64_t*>left)[0]
    cdef uint64_t b = (<const uint64_t*>right)[0]
    return (a > b) - (a < b)


cdef uint64_t exclusive_streams(clusters_t* shared, const refcounts_t* refcounts) noexcept nogil:
    """Host clusters whose refcount is the number of the point's own streams in them."""
    cdef uint64_t start = 0
    cdef uint64_t end
    cdef uint64_t found = 0
    if shared.count == 0:
        return 0
    qsort(shared.items, shared.count, sizeof(uint64_t), compare)
    while start < shared.count:
        end = start + 1
        while end < shared.count and shared.items[end] == shared.items[start]:
            end += 1
        found += refcount_of(refcounts, shared.items[start]) == end - start
        start = end
    return found


cdef uint64_t refcount_of(const refcounts_t* refcounts, uint64_t cluster) noexcept nogil:
    """The refcount of a host cluster; 0 where there is none, or where it cannot be read."""
    cdef uint32_t block_bits = refcounts.cluster_bits + 3 - refcounts.order  # log2 of the refcounts of one block
    cdef uint64_t index = cluster >> block_bits
    cdef uint64_t block
    if index >= refcounts.table_entries:
        return 0
    block = file_word(refcounts, refcounts.table_offset + index * 8, 64) & ~<uint64_t>511
    if block == 0:
        return 0
    index = cluster & ((<uint64_t>1 << block_bits) - 1)
    return block_refcount(refcounts, block, index)


cdef uint64_t block_refcount(const refcounts_t* refcounts, uint64_t block, uint64_t index) noexcept nogil:
    cdef uint32_t bits = <uint32_t>1 << refcounts.order
    cdef uint64_t byte
    if bits >= 8:
        return file_word(refcounts, block + index * <uint64_t>(bits // 8), bits)
    byte = file_word(refcounts, block + index * bits // 8, 8)  # narrow refcounts fill a byte from its lowest bit
    return (byte >> (index * bits % 8)) & ((<uint64_t>1 << bits) - 1)


cdef uint64_t file_word(const refcounts_t* refcounts, uint64_t offset, uint32_t bits) noexcept nogil:
    """A big-endian word of 8 to 64 bits at `offset`, through the cache; 0 past the end of the file."""
    cdef fault_t ignored
    cdef uint64_t within = offset & (SLICE_SIZE - 1)
    cdef uint64_t word = 0
    cdef uint32_t byte
    cdef entry_t* slice = table_slice(refcounts.source, refcounts.cache, KIND_BYTES, offset - within, &ignored)
    if slice == NULL:
        return 0
    if within + <uint64_t>(bits // 8) <= slice.valid:
        for byte in range(bits // 8):
            word = word << 8 | slice.payload[within + byte]
    cache_release(refcounts.cache, slice)
    return word

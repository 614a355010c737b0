# Compressed clusters, decompressed once for everybody who wants them, through the cache.

from libc.stdint cimport uint64_t

from qcowfs._cache cimport cache_t
from qcowfs._tables cimport fault_t, layer_t, mapping_t


# Fill `buffer` with mapping.length bytes at guest `offset`, all in the cluster that `mapping` (COMPRESSED) is about;
# waits for whoever is decompressing it. Returns 0, or -1 with `fault`.
cdef int cluster_read(
    cache_t* cache, const layer_t* layer, const mapping_t* mapping, char* buffer, uint64_t offset,
    fault_t* fault) noexcept nogil

# Decompress the cluster into the cache, unless it is there or somebody is at it. Was there something to do?
cdef bint cluster_preload(cache_t* cache, const layer_t* layer, const mapping_t* mapping) noexcept nogil

# cython: language_level=3, cdivision=True
"""Compressed clusters: read, decompressed into the cache, and copied from there.

Used by `_core`. Without the GIL; any number of threads. Who finds a cluster missing decompresses it, and all others
that want it wait for that: no cluster is decompressed twice while it is in the cache.
"""

from libc.errno cimport EIO, ENOMEM
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from qcowfs._cache cimport (
    KIND_CLUSTER, STATE_FAILED, STATE_LOADING, cache_abandon, cache_acquire, cache_begin, cache_publish, cache_release,
    cache_t, entry_t,
)
from qcowfs._codec cimport codec_inflate, codec_zstd
from qcowfs._tables cimport (
    RULE_BAD_STREAM, RULE_NO_MEMORY, RULE_READ_FAILED, fault_t, layer_fault, layer_t, mapping_t,
)

cdef enum:
    STREAM_IS_BAD = -1  # an abandoned cluster's failure; errno values are positive


cdef int cluster_read(
    cache_t* cache, const layer_t* layer, const mapping_t* mapping, char* buffer, uint64_t offset,
    fault_t* fault) noexcept nogil:
    cdef uint64_t cluster_size = <uint64_t>1 << layer.cluster_bits
    cdef entry_t* cluster = cache_acquire(
        cache, KIND_CLUSTER, layer.source.identity, mapping.descriptor, cluster_size)
    cdef int failure = 0
    if cluster == NULL:
        return layer_fault(fault, layer, RULE_NO_MEMORY, ENOMEM, offset, mapping.host_offset)
    if cluster.state == STATE_LOADING:
        load_cluster(cache, layer, mapping, cluster)
    if cluster.state == STATE_FAILED:
        failure = cluster.failure
    else:
        memcpy(buffer, cluster.payload + (offset & (cluster_size - 1)), mapping.length)
    cache_release(cache, cluster)
    if failure == 0:
        return 0
    if failure == STREAM_IS_BAD:
        return layer_fault(fault, layer, RULE_BAD_STREAM, EIO, offset, mapping.host_offset)
    return layer_fault(fault, layer, RULE_READ_FAILED, failure, offset, mapping.host_offset)


cdef bint cluster_preload(cache_t* cache, const layer_t* layer, const mapping_t* mapping) noexcept nogil:
    cdef entry_t* cluster = cache_begin(
        cache, KIND_CLUSTER, layer.source.identity, mapping.descriptor, <uint64_t>1 << layer.cluster_bits)
    if cluster == NULL:
        return False
    load_cluster(cache, layer, mapping, cluster)
    cache_release(cache, cluster)
    return True


cdef void load_cluster(
    cache_t* cache, const layer_t* layer, const mapping_t* mapping, entry_t* cluster) noexcept nogil:
    cdef char* stream = <char*>malloc(mapping.host_length + 1)
    cdef int64_t got
    cdef int status
    if stream == NULL:
        cache_abandon(cache, cluster, ENOMEM)
        return
    # The stream's last sector may lie past the end of the file: a short read is legal.
    got = layer.source.pread(layer.source, stream, mapping.host_length, mapping.host_offset)
    if got < 0:
        cache_abandon(cache, cluster, <int>-got)
    else:
        if layer.zstd:
            status = codec_zstd(stream, <uint64_t>got, cluster.payload, cluster.capacity)
        else:
            status = codec_inflate(stream, <uint64_t>got, cluster.payload, cluster.capacity)
        if status < 0:
            cache_abandon(cache, cluster, STREAM_IS_BAD)
        else:
            cache_publish(cache, cluster, cluster.capacity)
    free(stream)

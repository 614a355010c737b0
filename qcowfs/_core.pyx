# cython: language_level=3, cdivision=True
"""A Disk: one point in time, read as raw bytes through its backing chain.

Used by the mount, the commands and the data plane. `disk_resolve` and `disk_read` run without the GIL on any number of
threads; the border to Python is `Disk`'s methods. A point never changes, so nothing here needs to be told of changes.
"""

import logging
import os
from typing import NamedTuple

from libc.errno cimport EIO, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from qcowfs._cache cimport (
    KIND_CLUSTER, STATE_FAILED, STATE_LOADING, Cache, cache_abandon, cache_acquire, cache_publish, cache_release,
    cache_t, entry_t,
)
from qcowfs._codec cimport codec_inflate, codec_zstd
from qcowfs._tables cimport (
    COMPRESSED, LAYER_RAW, NORMAL, RULE_BAD_STREAM, RULE_COMPRESSED_IN_DATA_FILE, RULE_DATA_FILE_OFFSET,
    RULE_L1_PAST_END, RULE_L1_UNALIGNED, RULE_L2_PAST_END, RULE_L2_UNALIGNED, RULE_NO_MEMORY, RULE_READ_FAILED,
    RULE_REFCOUNT_PAST_END, RULE_SECTOR_UNALIGNED, RULE_SUBCLUSTER_BOTH, RULE_SUBCLUSTER_WITHOUT_CLUSTER,
    RULE_ZERO_IN_VERSION_2, UNALLOCATED, ZERO, ZERO_ALLOCATED, LayerMap, fault_t, layer_map, layer_t, mapping_t, mapping_type, rule_t,
)

from qcowfs.errors import ReadFault

cdef enum:
    SECTOR_SIZE = 512
    STREAM_IS_BAD = -1  # an abandoned cluster's failure; errno values are positive

RULES = {
    RULE_L1_UNALIGNED: "the L1 entry names an L2 table that is not aligned to a cluster",
    RULE_L2_UNALIGNED: "the L2 entry names a host cluster that is not aligned to a cluster",
    RULE_SECTOR_UNALIGNED: "the L2 entry names a host cluster that is not aligned to a sector",
    RULE_L1_PAST_END: "the L1 table lies past the end of the file: the image is truncated",
    RULE_L2_PAST_END: "the L2 table lies past the end of the file: the image is truncated",
    RULE_ZERO_IN_VERSION_2: "the L2 entry has the zero flag, which version 2 does not have",
    RULE_COMPRESSED_IN_DATA_FILE: "the L2 entry is compressed, in an image with an external data file",
    RULE_DATA_FILE_OFFSET: "the L2 entry's host offset differs from the guest offset, in an external data file",
    RULE_SUBCLUSTER_BOTH: "the L2 entry has a subcluster that is both allocated and zero",
    RULE_SUBCLUSTER_WITHOUT_CLUSTER: "the L2 entry has an allocated subcluster but no host cluster",
    RULE_BAD_STREAM: "the compressed cluster cannot be decompressed",
    RULE_READ_FAILED: "the read failed",
    RULE_REFCOUNT_PAST_END: "the refcount structures lie past the end of the file: the image is truncated",
    RULE_NO_MEMORY: "no memory",
}

logger = logging.getLogger("qcowfs.core")


class Extent(NamedTuple):
    """A range with one answer, in the words of `qemu-img map`.

    `depth` is the layer that decides (where none does, the last that was asked), `present` whether one does, `data`
    whether bytes are stored, `zero` whether it reads as zeros, `offset` the host offset, None for compressed data and
    where nothing is stored.
    Offsets and lengths are in bytes.
    """

    start: int
    length: int
    depth: int
    present: bool
    zero: bool
    data: bool
    compressed: bool
    offset: int | None


cdef class Disk:
    """One point in time as raw bytes.

    Args:
        layers: LayerMap objects, from the point's own state down to the base.
        virtual_size: bytes.
        cache: shared by all points of a mount.

    Making one reads nothing.
    """

    def __init__(self, layers, uint64_t virtual_size, Cache cache not None):
        cdef uint32_t number
        cdef LayerMap layer
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("a disk has at least one layer")
        self.cache = cache
        free(self.c.layers)
        self.c.layers = <layer_t**>calloc(<size_t>len(self.layers), sizeof(layer_t*))
        if self.c.layers == NULL:
            raise MemoryError()
        for number, layer in enumerate(self.layers):
            self.c.layers[number] = &layer.c
        self.c.count = <uint32_t>len(self.layers)
        self.c.virtual_size = virtual_size
        self.c.cache = &cache.c

    def __dealloc__(self):
        free(self.c.layers)

    @property
    def virtual_size(self):
        """Bytes of the disk at this point in time."""
        return self.c.virtual_size

    def pread(self, uint64_t offset, uint64_t length):
        """Return `length` bytes at `offset`, fewer only where the disk ends.

        Raises:
            ReadFault: some of the range cannot be read right; its errno says how.
        """
        if offset >= self.c.virtual_size:
            return b""
        length = min(length, self.c.virtual_size - offset)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)
        cdef char* buffer = PyBytes_AS_STRING(data)
        cdef fault_t fault
        cdef int status
        with nogil:
            status = disk_read(&self.c, buffer, offset, length, &fault)
        if self.c.past_end != NULL and not self.warned:
            self.warn_past_end()
        if status < 0:
            raise self.read_fault(&fault)
        return data

    def extents(self, uint64_t offset, uint64_t length, Py_ssize_t limit):
        """Return the extents from `offset` on, merged, at most `limit` of them (and at least one).

        A caller goes on where the last one ends. Only tables are read, and the host's map of holes for raw layers.

        Raises:
            ReadFault: a table at `offset` itself cannot be read; later ones end the list instead.
        """
        cdef list found = []
        cdef uint64_t end
        if offset >= self.c.virtual_size:
            return found
        end = offset + min(length, self.c.virtual_size - offset)
        while offset < end:
            try:
                extent = self.extent_at(offset, end - offset)
            except ReadFault:
                if found:
                    break
                raise
            if found and _continues(found[-1], extent):
                found[-1] = found[-1]._replace(length=found[-1].length + extent.length)
            elif len(found) < limit:
                found.append(extent)
            else:
                break
            offset += extent.length
        return found

    cdef object extent_at(self, uint64_t offset, uint64_t length):
        cdef resolved_t resolved
        cdef fault_t fault
        cdef int status
        with nogil:
            status = disk_resolve(&self.c, offset, length, &resolved, &fault)
            if status == 0:
                status = find_hole(&resolved, offset, &fault)
        if status < 0:
            raise self.read_fault(&fault)
        return make_extent(&resolved, offset)

    cdef object read_fault(self, const fault_t* fault):
        cdef LayerMap layer = self.layers[0]
        for candidate in self.layers:
            if (<LayerMap>candidate).c.depth == fault.depth:
                layer = candidate
        what = f"host offset {fault.host_offset:#x}: {RULES[fault.rule]}"
        if fault.rule == RULE_READ_FAILED:
            what += f": {os.strerror(fault.error)}"
        return ReadFault(layer.source.name, fault.depth, fault.guest_offset, what, fault.error)

    cdef int warn_past_end(self) except -1:
        cdef LayerMap layer
        self.warned = True
        for layer in self.layers:
            if &layer.c == self.c.past_end:
                logger.warning("%s: layer %d: data past the end of the file reads as zeros: the image may be truncated",
                               layer.data.name, layer.c.depth)
        return 0


def _continues(first, following):
    """Would qemu-img map print the two as one?"""
    if first[2:7] != following[2:7]:
        return False
    if first.offset is None or following.offset is None:
        return first.offset is following.offset
    return first.offset + first.length == following.offset


cdef object make_extent(const resolved_t* resolved, uint64_t offset):
    cdef mapping_type kind = resolved.mapping.type
    if resolved.layer == NULL:
        return Extent(offset, resolved.mapping.length, resolved.depth, False, True, False, False, None)
    return Extent(
        offset, resolved.mapping.length, resolved.layer.depth, True, kind == ZERO or kind == ZERO_ALLOCATED,
        kind == NORMAL or kind == COMPRESSED, kind == COMPRESSED,
        resolved.mapping.host_offset if kind == NORMAL or kind == ZERO_ALLOCATED else None)


cdef int find_hole(resolved_t* resolved, uint64_t offset, fault_t* fault) noexcept nogil:
    """A raw layer's zeros are the holes of its file: cut the mapping to the hole or the data at `offset`."""
    cdef int status
    if resolved.layer == NULL or resolved.layer.kind != LAYER_RAW:
        return 0
    status = resolved.layer.data.status(resolved.layer.data, offset, &resolved.mapping.length)
    if status < 0:
        return fail(fault, resolved.layer, RULE_READ_FAILED, -status, offset, offset)
    if status == 0:
        resolved.mapping.type = ZERO_ALLOCATED
    return 0


cdef int fail(
    fault_t* fault, const layer_t* layer, rule_t rule, int error, uint64_t offset, uint64_t host_offset
) noexcept nogil:
    fault.rule = rule
    fault.error = error
    fault.depth = layer.depth
    fault.guest_offset = offset
    fault.host_offset = host_offset
    return -1


cdef int disk_resolve(
    const disk_t* disk, uint64_t offset, uint64_t length, resolved_t* resolved, fault_t* fault) noexcept nogil:
    cdef uint32_t number
    cdef layer_t* layer
    for number in range(disk.count):
        layer = disk.layers[number]
        if offset >= layer.virtual_size:  # shorter than the layer above: zeros, whatever lies below
            break
        length = min(length, layer.virtual_size - offset)
        resolved.depth = layer.depth
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


cdef int disk_read(
    disk_t* disk, char* buffer, uint64_t offset, uint64_t length, fault_t* fault) noexcept nogil:
    cdef resolved_t resolved
    cdef int status
    while length > 0:  # a resolved length is > 0
        if disk_resolve(disk, offset, length, &resolved, fault) < 0:
            return -1
        if resolved.mapping.type == NORMAL:
            status = read_normal(disk, &resolved, buffer, offset, fault)
        elif resolved.mapping.type == COMPRESSED:
            status = read_compressed(disk, &resolved, buffer, offset, fault)
        else:
            memset(buffer, 0, resolved.mapping.length)
            status = 0
        if status < 0:
            return -1
        buffer += resolved.mapping.length
        offset += resolved.mapping.length
        length -= resolved.mapping.length
    return 0


cdef int read_normal(
    disk_t* disk, const resolved_t* resolved, char* buffer, uint64_t offset, fault_t* fault) noexcept nogil:
    cdef const layer_t* layer = resolved.layer
    cdef uint64_t length = resolved.mapping.length
    cdef int64_t got = layer.data.pread(layer.data, buffer, length, resolved.mapping.host_offset)
    if got < 0:
        return fail(fault, layer, RULE_READ_FAILED, <int>-got, offset, resolved.mapping.host_offset)
    if <uint64_t>got < length:  # QEMU reads zeros past the end of a file too
        memset(buffer + got, 0, length - <uint64_t>got)
        if layer.kind != LAYER_RAW or length - <uint64_t>got >= SECTOR_SIZE:  # a raw disk ends with a whole sector
            disk.past_end = layer
    return 0


cdef int read_compressed(
    disk_t* disk, const resolved_t* resolved, char* buffer, uint64_t offset, fault_t* fault) noexcept nogil:
    cdef const layer_t* layer = resolved.layer
    cdef uint64_t cluster_size = <uint64_t>1 << layer.cluster_bits
    cdef entry_t* cluster = cache_acquire(
        disk.cache, KIND_CLUSTER, layer.source.identity, resolved.mapping.descriptor, cluster_size)
    cdef int failure = 0
    if cluster == NULL:
        return fail(fault, layer, RULE_NO_MEMORY, ENOMEM, offset, resolved.mapping.host_offset)
    if cluster.state == STATE_LOADING:
        load_cluster(disk.cache, layer, &resolved.mapping, cluster)
    if cluster.state == STATE_FAILED:
        failure = cluster.failure
    else:
        memcpy(buffer, cluster.payload + (offset & (cluster_size - 1)), resolved.mapping.length)
    cache_release(disk.cache, cluster)
    if failure == 0:
        return 0
    if failure == STREAM_IS_BAD:
        return fail(fault, layer, RULE_BAD_STREAM, EIO, offset, resolved.mapping.host_offset)
    return fail(fault, layer, RULE_READ_FAILED, failure, offset, resolved.mapping.host_offset)


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

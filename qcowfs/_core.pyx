# cython: language_level=3, cdivision=True
"""A Disk: one point in time, read as raw bytes through its backing chain.

Used by the mount, the commands and the data plane. `disk_resolve` and `disk_read` run without the GIL on any number of
threads; the border to Python is `Disk`'s methods. A point never changes, so nothing here needs to be told of changes;
where it may be deleted, its guards are asked after each read.
"""

import logging
import os
from typing import NamedTuple

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from qcowfs._cache cimport Cache
from qcowfs._guard cimport Guard, guard_t
from qcowfs._clusters cimport cluster_preload, cluster_read
from qcowfs._resolve cimport disk_check, disk_resolve, disk_t, range_bits_of, resolved_t
from qcowfs._seek cimport disk_seek, find_hole
from qcowfs._tables cimport (
    COMPRESSED, LAYER_RAW, NORMAL, RULE_BAD_STREAM, RULE_COMPRESSED_IN_DATA_FILE, RULE_DATA_FILE_OFFSET, RULE_DELETED,
    RULE_L1_PAST_END, RULE_L1_UNALIGNED, RULE_L2_PAST_END, RULE_L2_UNALIGNED, RULE_NO_MEMORY, RULE_READ_FAILED,
    RULE_REFCOUNT_PAST_END, RULE_SECTOR_UNALIGNED, RULE_SUBCLUSTER_BOTH, RULE_SUBCLUSTER_WITHOUT_CLUSTER,
    RULE_WRITTEN, RULE_ZERO_IN_VERSION_2, ZERO, ZERO_ALLOCATED, LayerMap, fault_t, layer_fault, layer_t, mapping_type,
)
from qcowfs.clib.atomic cimport atomic_load, atomic_store

from qcowfs.errors import ReadFault

cdef enum:
    SECTOR_SIZE = 512
    PRELOAD_SHARE = 4  # of the cache's budget, what one read may put there before it uses it

cdef uint32_t last_identity = 0

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
    RULE_DELETED: "the snapshot was deleted, and its clusters may hold other data",
    RULE_WRITTEN: "another process has written the file since it was opened",
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
        identity: a number of the caller's for this point, > 0 and no other point's: what is resolved is remembered
            under it, also after this object is gone. 0: nobody will ask again.
        guards: Guard objects that have to hold after each read.

    Making one reads nothing.
    """

    def __init__(self, layers, uint64_t virtual_size, Cache cache not None, uint32_t identity=0, guards=()):
        global last_identity
        cdef uint32_t number
        cdef LayerMap layer
        cdef Guard guard
        self.layers = tuple(layers)
        self.guards = tuple(guards)
        if not self.layers:
            raise ValueError("a disk has at least one layer")
        self.cache = cache
        free(self.c.layers)
        free(self.c.guards)
        self.c.layers = <layer_t**>calloc(<size_t>len(self.layers), sizeof(layer_t*))
        self.c.guards = <guard_t**>calloc(<size_t>len(self.guards) + 1, sizeof(guard_t*))
        if self.c.layers == NULL or self.c.guards == NULL:
            raise MemoryError()
        for number, guard in enumerate(self.guards):
            self.c.guards[number] = &guard.c
        self.c.guard_count = <uint32_t>len(self.guards)
        for number, layer in enumerate(self.layers):
            self.c.layers[number] = &layer.c
        self.c.count = <uint32_t>len(self.layers)
        self.c.range_bits = range_bits_of(self.c.layers, self.c.count)
        self.c.virtual_size = virtual_size
        self.c.cache = &cache.c
        if identity == 0:
            last_identity -= 1
        self.c.identity = identity or last_identity

    def __dealloc__(self):
        free(self.c.layers)
        free(self.c.guards)

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
        if disk_has_warning(&self.c):
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
                self.require_guards()
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
        self.require_guards()
        return found

    cdef int require_guards(self) except -1:
        cdef fault_t fault
        cdef int status
        with nogil:
            status = disk_check(&self.c, &fault)
        if status < 0:
            raise self.read_fault(&fault)
        return 0

    def seek(self, uint64_t offset, int whence):
        """Return where the first data (SEEK_DATA) or hole (SEEK_HOLE) at `offset` or after it is; None: nowhere."""
        cdef uint64_t found = 0
        cdef bint data = whence == os.SEEK_DATA
        cdef int status
        with nogil:
            status = disk_seek(&self.c, offset, self.c.virtual_size, data, &found)
        return found if status == 0 else None

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
        return make_extent(&resolved, self.c.layers[resolved.number].depth, offset)

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
        if not disk_has_warning(&self.c):  # another thread was quicker to have the GIL
            return 0
        atomic_store(&self.c.warned, 1)
        for layer in self.layers:
            if layer.c.depth + 1 == atomic_load(&self.c.past_end):
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


cdef object make_extent(const resolved_t* resolved, uint32_t depth, uint64_t offset):
    cdef mapping_type kind = resolved.mapping.type
    if resolved.layer == NULL:
        return Extent(offset, resolved.mapping.length, depth, False, True, False, False, None)
    return Extent(
        offset, resolved.mapping.length, depth, True, kind == ZERO or kind == ZERO_ALLOCATED,
        kind == NORMAL or kind == COMPRESSED, kind == COMPRESSED,
        resolved.mapping.host_offset if kind == NORMAL or kind == ZERO_ALLOCATED else None)


cdef int disk_read(
    disk_t* disk, char* buffer, uint64_t offset, uint64_t length, fault_t* fault) noexcept nogil:
    cdef int status = disk_fill(disk, buffer, offset, length, fault)
    # Also after a fault: clusters that hold something else now look like a damaged image.
    return -1 if disk_check(disk, fault) < 0 else status


cdef int disk_fill(
    disk_t* disk, char* buffer, uint64_t offset, uint64_t length, fault_t* fault) noexcept nogil:
    # Neighbours that lie together in the file are joined before they are read: one system call for all of them. A
    # fault anywhere fails the whole read, so nothing is lost by finding it before the bytes in front of it are read.
    cdef resolved_t run
    cdef resolved_t following
    cdef bint preloaded = False
    if length > 0 and disk_resolve(disk, offset, length, &run, fault) < 0:
        return -1
    while length > 0:  # a resolved length is > 0
        while run.mapping.length < length:
            if disk_resolve(
                    disk, offset + run.mapping.length, length - run.mapping.length, &following, fault) < 0:
                return -1
            if not joins(&run, &following):
                break
            run.mapping.length += following.mapping.length
        if run.mapping.type == COMPRESSED and run.mapping.length < length and not preloaded:
            preload_all(disk, offset, length)
            preloaded = True
        if read_run(disk, &run, buffer, offset, fault) < 0:
            return -1
        buffer += run.mapping.length
        offset += run.mapping.length
        length -= run.mapping.length
        run = following
    return 0


cdef inline bint joins(const resolved_t* run, const resolved_t* following) noexcept nogil:
    if run.layer == NULL or run.layer != following.layer:
        return run.layer == following.layer
    if run.mapping.type != NORMAL:
        return False
    return (following.mapping.type == NORMAL
            and following.mapping.host_offset == run.mapping.host_offset + run.mapping.length)


cdef inline int read_run(
    disk_t* disk, const resolved_t* run, char* buffer, uint64_t offset, fault_t* fault) noexcept nogil:
    if run.mapping.type == NORMAL:
        return read_normal(disk, run, buffer, offset, fault)
    if run.mapping.type == COMPRESSED:
        atomic_store(&disk.compressed, 1)
        return cluster_read(disk.cache, run.layer, &run.mapping, buffer, offset, fault)
    memset(buffer, 0, run.mapping.length)
    return 0


cdef int read_normal(
    disk_t* disk, const resolved_t* resolved, char* buffer, uint64_t offset, fault_t* fault) noexcept nogil:
    cdef const layer_t* layer = resolved.layer
    cdef uint64_t length = resolved.mapping.length
    cdef int64_t got = layer.data.pread(layer.data, buffer, length, resolved.mapping.host_offset)
    if got < 0:
        return layer_fault(fault, layer, RULE_READ_FAILED, <int>-got, offset, resolved.mapping.host_offset)
    if <uint64_t>got < length:  # QEMU reads zeros past the end of a file too
        memset(buffer + got, 0, length - <uint64_t>got)
        if layer.kind != LAYER_RAW or length - <uint64_t>got >= SECTOR_SIZE:  # a raw disk ends with a whole sector
            atomic_store(&disk.past_end, layer.depth + 1)
    return 0


cdef bint disk_has_warning(const disk_t* disk) noexcept nogil:
    return atomic_load(&disk.past_end) and not atomic_load(&disk.warned)


cdef void preload_all(disk_t* disk, uint64_t offset, uint64_t length) noexcept nogil:
    """Do what others have not begun before waiting for what they have: two threads share the work of one read."""
    cdef uint64_t end = offset + length
    if length > disk.cache.budget // PRELOAD_SHARE:  # it would be thrown out before it is used
        return
    while offset < end:
        offset = disk_preload(disk, offset, end)


cdef uint64_t disk_preload(disk_t* disk, uint64_t offset, uint64_t end) noexcept nogil:
    cdef resolved_t resolved
    cdef fault_t ignored
    while offset < end:  # a resolved length is > 0
        if disk_resolve(disk, offset, end - offset, &resolved, &ignored) < 0:
            return end
        offset += resolved.mapping.length
        if resolved.mapping.type == COMPRESSED and cluster_preload(disk.cache, resolved.layer, &resolved.mapping):
            return offset
    return end

# cython: language_level=3, cdivision=True
"""Files that are runs of disks: a partition, a logical volume, and a file in one of them.

Used by the vfs and the commands, and without the GIL by the data plane. A file in a volume is composed with the volume
once, so that a read goes straight to the disk. Immutable, so any number of threads may read one.
"""

import os

from libc.errno cimport EINVAL, ENOMEM, ENXIO
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE

from qcowfs._core cimport Disk, disk_fill, disk_has_warning
from qcowfs._records cimport extent_record_t
from qcowfs._resolve cimport disk_check
from qcowfs._seek cimport SEEK_TIME_MS, disk_seek, monotonic_ms

cdef enum:
    FIRST_RUNS = 4

cdef uint64_t INLINE = <uint64_t>1 << 63  # in an extent's offset: reader.py


cdef class Mapped:
    """A volume of disks.

    Args:
        size: bytes.
        disks: Disk objects.
        runs: (start, length, number in `disks`, offset) in bytes, by start, without overlaps.

    Raises:
        ValueError: a run is out of order, or outside of the file or its disk.
    """

    def __init__(self, uint64_t size, disks, runs):
        cdef Disk disk
        cdef uint32_t number
        self.disks = tuple(disks)
        self.c.size = size
        self.c.disk_count = <uint32_t>len(self.disks)
        self.c.disks = <disk_t**>calloc(<size_t>len(self.disks) + 1, sizeof(disk_t*))
        if self.c.disks == NULL:
            raise MemoryError()
        for number, disk in enumerate(self.disks):
            self.c.disks[number] = &disk.c
        for start, length, place, offset in runs:
            disk = self.disks[place]
            if offset + length > disk.c.virtual_size:
                raise ValueError("a run ends past its disk")
            check(append(&self.c, start, length, <uint32_t>place, offset))

    def __dealloc__(self):
        free(self.c.runs)
        free(self.c.disks)

    @property
    def virtual_size(self):
        """Bytes of the file."""
        return self.c.size

    @property
    def runs(self):
        """A list of (start, length, disk, offset), in bytes; no disk where the bytes are at hand. Gaps are zeros."""
        cdef uint64_t number
        cdef const run_t* run
        cdef list found = []
        for number in range(self.c.count):
            run = &self.c.runs[number]
            disk = None if run.disk == <uint32_t>LITERAL else self.disks[run.disk]
            found.append((run.start, run.length, disk, run.offset))
        return found

    def part(self, uint64_t size, const unsigned char[::1] extents, bytes literal=b""):
        """Return a file in this volume.

        Args:
            size: bytes.
            extents: record.EXTENTs, by start, of bytes of this volume or, from INLINE on, of `literal`.

        Raises:
            ValueError: an extent is out of order, or outside of the file, the volume or `literal`.
        """
        cdef Mapped part = Mapped.__new__(Mapped)
        cdef uint64_t count = <uint64_t>extents.shape[0] // sizeof(extent_record_t)
        cdef const extent_record_t* first = <const extent_record_t*>&extents[0] if count else NULL
        part.disks = self.disks
        part.literal = literal
        check(mapped_part(
            &self.c, size, first, count, PyBytes_AS_STRING(literal), <uint64_t>PyBytes_GET_SIZE(literal), &part.c))
        part.c.disks = <disk_t**>malloc((self.c.disk_count + 1) * sizeof(disk_t*))
        if part.c.disks == NULL:
            raise MemoryError()
        memcpy(part.c.disks, self.c.disks, self.c.disk_count * sizeof(disk_t*))
        return part

    def pread(self, uint64_t offset, uint64_t length):
        """Return `length` bytes at `offset`, fewer only where the file ends.

        Raises:
            ReadFault: some of the range cannot be read right.
        """
        if offset >= self.c.size:
            return b""
        length = min(length, self.c.size - offset)
        cdef bytes data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)
        cdef char* buffer = PyBytes_AS_STRING(data)
        cdef fault_t fault
        cdef uint32_t number = 0
        cdef int status
        with nogil:
            status = mapped_read(&self.c, buffer, offset, length, &fault, &number)
        if mapped_has_warning(&self.c):
            self.warn()
        if status < 0:
            raise self.read_fault(&fault, number)
        return data

    def seek(self, uint64_t offset, int whence):
        """Return where the first data (SEEK_DATA) or hole (SEEK_HOLE) at `offset` or after it is; None: nowhere."""
        cdef uint64_t found = 0
        cdef bint data = whence == os.SEEK_DATA
        cdef int status
        with nogil:
            status = mapped_seek(&self.c, offset, data, &found)
        return found if status == 0 else None

    cdef object read_fault(self, const fault_t* fault, uint32_t number):
        return (<Disk>self.disks[number]).read_fault(fault)

    cdef int warn(self) except -1:
        cdef Disk disk
        for disk in self.disks:
            disk.warn_past_end()
        return 0


cdef int check(int status) except -1:
    if status == ENOMEM:
        raise MemoryError()
    if status:
        raise ValueError("an extent is out of order, or outside of its file")
    return 0


cdef int append(
    mapped_t* mapped, uint64_t start, uint64_t length, uint32_t disk, uint64_t offset) noexcept nogil:
    """Add a run behind all others; the caller has checked that its disk holds it."""
    cdef run_t* runs
    cdef run_t* last = &mapped.runs[mapped.count - 1] if mapped.count else NULL
    if length == 0 or start > mapped.size or length > mapped.size - start:
        return EINVAL
    if last != NULL and start < last.start + last.length:
        return EINVAL
    if last != NULL and last.disk == disk and start == last.start + last.length and (
            offset == last.offset + last.length):
        last.length += length
        return 0
    # The room is the next power of two, so that it need not be remembered.
    if mapped.count == 0 or (mapped.count >= FIRST_RUNS and mapped.count & (mapped.count - 1) == 0):
        runs = <run_t*>realloc(mapped.runs, max(<uint64_t>FIRST_RUNS, mapped.count * 2) * sizeof(run_t))
        if runs == NULL:
            return ENOMEM
        mapped.runs = runs
    mapped.runs[mapped.count].start = start
    mapped.runs[mapped.count].length = length
    mapped.runs[mapped.count].offset = offset
    mapped.runs[mapped.count].disk = disk
    mapped.count += 1
    return 0


cdef int mapped_part(
    const mapped_t* volume, uint64_t size, const extent_record_t* extents, uint64_t count, const char* literal,
    uint64_t literal_size, mapped_t* part) noexcept nogil:
    cdef uint64_t number
    cdef uint64_t offset
    cdef int status = 0
    memset(part, 0, sizeof(mapped_t))
    part.size = size
    part.disks = volume.disks
    part.disk_count = volume.disk_count
    part.literal = literal
    for number in range(count):
        offset = extents[number].offset
        if offset >= INLINE:
            status = append_literal(part, &extents[number], literal_size)
        else:
            status = append_stored(part, &extents[number], volume)
        if status:
            free(part.runs)
            memset(part, 0, sizeof(mapped_t))
            return status
    return 0


cdef int append_literal(mapped_t* part, const extent_record_t* extent, uint64_t literal_size) noexcept nogil:
    cdef uint64_t offset = extent.offset - INLINE
    if offset > literal_size or extent.length > literal_size - offset:
        return EINVAL
    return append(part, extent.start, extent.length, <uint32_t>LITERAL, offset)


cdef int append_stored(mapped_t* part, const extent_record_t* extent, const mapped_t* volume) noexcept nogil:
    """Cut the extent at the borders of the volume's runs; what of it is in none of them reads as zeros."""
    cdef uint64_t place
    cdef uint64_t first
    cdef uint64_t end
    cdef const run_t* run
    cdef int status
    if extent.length == 0 or extent.offset > volume.size or extent.length > volume.size - extent.offset:
        return EINVAL
    place = run_after(volume, extent.offset)
    while place < volume.count and volume.runs[place].start < extent.offset + extent.length:
        run = &volume.runs[place]
        first = max(run.start, extent.offset)
        end = min(run.start + run.length, extent.offset + extent.length)
        status = append(
            part, extent.start + (first - extent.offset), end - first, run.disk, run.offset + (first - run.start))
        if status:
            return status
        place += 1
    return 0


cdef uint64_t run_after(const mapped_t* mapped, uint64_t offset) noexcept nogil:
    """Return the number of the first run that ends after `offset`."""
    cdef uint64_t low = 0
    cdef uint64_t high = mapped.count
    cdef uint64_t middle
    while low < high:
        middle = low + (high - low) // 2
        if mapped.runs[middle].start + mapped.runs[middle].length > offset:
            high = middle
        else:
            low = middle + 1
    return low


cdef int mapped_read(
    const mapped_t* mapped, char* buffer, uint64_t offset, uint64_t length, fault_t* fault,
    uint32_t* number) noexcept nogil:
    cdef int status = fill(mapped, buffer, offset, length, fault, number)
    cdef uint32_t disk
    for disk in range(mapped.disk_count):  # once, after all the pieces
        if disk_check(mapped.disks[disk], fault) < 0:
            number[0] = disk
            return -1
    return status


cdef int fill(
    const mapped_t* mapped, char* buffer, uint64_t offset, uint64_t length, fault_t* fault,
    uint32_t* number) noexcept nogil:
    cdef uint64_t end = offset + length
    cdef uint64_t place = run_after(mapped, offset)
    cdef uint64_t step
    cdef uint64_t start
    cdef const run_t* run
    while offset < end:  # each step is > 0
        run = &mapped.runs[place] if place < mapped.count and mapped.runs[place].start < end else NULL
        if run == NULL or offset < run.start:
            step = (run.start if run != NULL else end) - offset
            memset(buffer, 0, step)
        else:
            start = run.offset + (offset - run.start)
            step = min(end, run.start + run.length) - offset
            if run.disk == <uint32_t>LITERAL:
                memcpy(buffer, mapped.literal + start, step)
            elif disk_fill(mapped.disks[run.disk], buffer, start, step, fault) < 0:
                number[0] = run.disk
                return -1
            place += 1
        buffer += step
        offset += step
    return 0


cdef int mapped_seek(const mapped_t* mapped, uint64_t offset, bint data, uint64_t* found) noexcept nogil:
    cdef int64_t deadline = monotonic_ms() + SEEK_TIME_MS
    cdef uint64_t place
    if offset >= mapped.size:
        return ENXIO
    place = run_after(mapped, offset)
    while place < mapped.count:
        if offset < mapped.runs[place].start:
            if not data:
                found[0] = offset
                return 0
            offset = mapped.runs[place].start
        if seek_in_run(mapped, &mapped.runs[place], offset, data, found):
            return 0
        offset = mapped.runs[place].start + mapped.runs[place].length
        place += 1
        if offset < mapped.size and monotonic_ms() > deadline:
            found[0] = offset if data else mapped.size  # as disk_seek does
            return 0
    if data:
        return ENXIO
    found[0] = offset  # the hole behind the last run, or the one at the end
    return 0


cdef bint seek_in_run(
    const mapped_t* mapped, const run_t* run, uint64_t offset, bint data, uint64_t* found) noexcept nogil:
    cdef uint64_t end = run.offset + run.length
    cdef uint64_t place
    if run.disk == <uint32_t>LITERAL:
        found[0] = offset
        return data
    if disk_seek(mapped.disks[run.disk], run.offset + (offset - run.start), end, data, &place) != 0 or place == end:
        return False  # the hole at its end is none: the next run may begin there
    found[0] = run.start + (place - run.offset)
    return True


cdef bint mapped_has_warning(const mapped_t* mapped) noexcept nogil:
    cdef uint32_t number
    for number in range(mapped.disk_count):
        if disk_has_warning(mapped.disks[number]):
            return True
    return False

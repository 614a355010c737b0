# cython: language_level=3, cdivision=True
"""The inner loops of an export, without the GIL: find the data of a disk, read it, see what is to be written.

Used by export/. Any number of threads, each with buffers of its own.
"""

from cython cimport boundscheck, wraparound
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcmp, memset

from qcowfs._core cimport Disk, disk_has_warning, disk_read
from qcowfs._resolve cimport disk_check, disk_resolve, resolved_t
from qcowfs._seek cimport holds_data
from qcowfs._tables cimport NORMAL, LayerMap, fault_t

cdef enum:
    STEPS = 1 << 16  # clusters that one call looks at: some milliseconds, and then Python may be interrupted
    SAME = 0  # the kinds of classify()
    ZEROS = 1
    DATA = 2


def find_data(Disk disk not None, uint64_t offset):
    """Return (start, end), the first range at `offset` or after it that holds data; what cannot be resolved counts.

    The search gives up after STEPS clusters: then start and end are the same, and it goes on from there. Both are the
    virtual size where nothing is left.
    """
    cdef uint64_t start = offset
    cdef uint64_t size = disk.c.virtual_size
    cdef uint64_t length = 0
    cdef uint64_t end
    cdef uint32_t steps = 0
    with nogil:
        while start < size and steps < STEPS and not holds_data(&disk.c, start, size, &length):
            start += length
            steps += 1
        end = start
        while end < size and steps < STEPS and holds_data(&disk.c, end, size, &length):
            end += length
            steps += 1
    return start, end


@boundscheck(False)  # the buffer is not empty where it is used
@wraparound(False)
def read_into(Disk disk not None, uint64_t offset, unsigned char[::1] buffer not None):
    """Fill `buffer` with what is at `offset`; with zeros where the disk has ended.

    Raises:
        ReadFault: some of the range cannot be read right; the buffer holds anything then.
    """
    cdef uint64_t size = disk.c.virtual_size
    cdef uint64_t room = <uint64_t>buffer.shape[0]
    cdef uint64_t length = min(room, size - offset) if offset < size else 0
    cdef fault_t fault
    cdef int status
    if room == 0:
        return
    with nogil:
        status = disk_read(&disk.c, <char*>&buffer[0], offset, length, &fault)
        memset(&buffer[0] + length, 0, room - length)
    if disk_has_warning(&disk.c):
        disk.warn_past_end()
    if status < 0:
        raise disk.read_fault(&fault)


def descriptors_of(Disk disk not None):
    """Return the descriptors of the files that data of the disk is in; none if one of them is no local file."""
    cdef LayerMap layer
    cdef list found = [layer.c.data.fd for layer in disk.layers]
    return [] if min(found) < 0 else found


def stored_runs(Disk disk not None, uint64_t offset, uint64_t length):
    """Return (descriptor, host offset, length) of each run of the range, in order; none if some is not stored as it is.

    A run may reach past the end of its file, whose data reads as zeros there.
    """
    cdef resolved_t run
    cdef fault_t ignored
    cdef int status
    cdef list found = []
    if offset >= disk.c.virtual_size or length > disk.c.virtual_size - offset:
        return []
    while length > 0:  # a resolved length is > 0
        with nogil:
            status = disk_resolve(&disk.c, offset, length, &run, &ignored)
        if status < 0 or run.mapping.type != NORMAL or run.layer.data.fd < 0:
            return []
        file, start, size = run.layer.data.fd, run.mapping.host_offset, run.mapping.length
        if found and found[-1][0] == file and found[-1][1] + found[-1][2] == start:
            _, start, before = found.pop()
            size += before
        found.append((file, start, size))
        offset += run.mapping.length
        length -= run.mapping.length
    return found


def still_holds(Disk disk not None):
    """Tell whether what was taken of `disk` without reading it, by `stored_runs`, was right until now."""
    cdef fault_t ignored
    cdef int status
    with nogil:
        status = disk_check(&disk.c, &ignored)
    return status >= 0


@boundscheck(False)  # every unit lies within both buffers: their lengths are compared first
@wraparound(False)
def classify(const unsigned char[::1] new not None, const unsigned char[::1] old, Py_ssize_t unit):
    """Return one byte for each `unit` bytes of `new`: 0 as in `old`, 1 zeros that differ from it, 2 data.

    Args:
        old: as long as `new`; None: zeros.
        unit: divides the length.
    """
    cdef Py_ssize_t count = new.shape[0] // unit
    cdef size_t size = <size_t>unit
    cdef bint compared = old is not None
    cdef Py_ssize_t number
    cdef const unsigned char* place
    cdef bytearray kinds = bytearray(count)
    cdef unsigned char[::1] kind = kinds
    if new.shape[0] % unit or (compared and old.shape[0] != new.shape[0]):
        raise ValueError("the buffers do not fit together")
    with nogil:
        for number in range(count):
            place = &new[number * unit]
            if compared and memcmp(place, &old[number * unit], size) == 0:
                kind[number] = SAME
            elif place[0] == 0 and memcmp(place, place + 1, size - 1) == 0:
                kind[number] = <unsigned char>(ZEROS if compared else SAME)
            else:
                kind[number] = DATA
    return kinds

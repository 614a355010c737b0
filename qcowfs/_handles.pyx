# cython: language_level=3, cdivision=True
"""The table of open files: what FUSE's `fh` stands for.

Used by `_ahead`, `_dataplane` and `_treeplane`. `attach` and `detach` are for the thread that answers OPEN and RELEASE
with Python; all else is for any thread, without the GIL. A file that is detached while somebody reads it lives until
that read has ended. One mutex, never held while anything else is waited for.
"""

import logging

from libc.errno cimport EIO, ENOMEM
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc, realloc
from libc.string cimport memcpy, memset
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF

from qcowfs._core cimport Disk
from qcowfs._mapped cimport Mapped, mapped_part
from qcowfs._tables cimport fault_t
from qcowfs.clib.pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)

cdef enum:
    FIRST_ROOM = 64

logger = logging.getLogger("qcowfs.dataplane")

cdef uint64_t DIRECTORY_HANDLE = <uint64_t>1 << 62
cdef uint64_t NOWHERE = <uint64_t>-1  # no read begins there


cdef class Handles:
    """Open files by number. Empty at first."""

    def __cinit__(self):
        pthread_mutex_init(&self.c.lock, NULL)

    def __dealloc__(self):
        # Whoever uses a handle keeps this object, too.
        cdef uint64_t number
        for number in range(self.c.room):
            if self.c.slots[number] != NULL:
                free_handle(self.c.slots[number])
        free(self.c.slots)
        pthread_mutex_destroy(&self.c.lock)

    def __len__(self):
        return <Py_ssize_t>self.c.count

    def attach(self, disk, file not None, bint made=False):
        """Return a number for one more open file.

        Args:
            disk: a Disk or a Mapped; None if only Python can read it, through `file`.
            file: has `read(offset, length)` and `end()`, and hears of faults through `report(error)`; from any thread.
            made: it waits for the worker of a tree when it reads.
        """
        cdef handle_t* handle = <handle_t*>calloc(1, sizeof(handle_t))
        cdef bint added
        if handle == NULL:
            raise MemoryError()
        handle.references = 1
        handle.next = NOWHERE
        handle.made = made
        if isinstance(disk, Mapped):
            handle.mapped = &(<Mapped>disk).c
        elif disk is not None:
            handle.disk = &(<Disk?>disk).c
        Py_INCREF(disk)
        handle.keeper = <void*>disk
        Py_INCREF(file)
        handle.file = <void*>file
        with nogil:
            added = add(&self.c, handle)
        if not added:
            free_handle(handle)
            raise MemoryError()
        return handle.number

    def detach(self, uint64_t number):
        """Forget the file of this number; who reads it now reads on."""
        with nogil:
            handles_close(&self.c, number)

    def directory(self, uint64_t fh):
        """Return (guest, inode number) of a directory that the data plane opened, by FUSE's fh.

        Raises:
            KeyError: there is none.
        """
        cdef handle_t* handle = handles_take(&self.c, fh & ~DIRECTORY_HANDLE) if fh & DIRECTORY_HANDLE else NULL
        if handle == NULL:
            raise KeyError(fh)
        found = <object>handle.file, handle.inode
        handles_put(&self.c, handle)
        return found


cdef void free_handle(handle_t* handle) noexcept:
    if handle.tree == NULL:
        Py_DECREF(<object>handle.keeper)
        Py_DECREF(<object>handle.file)
    free_memory(handle)


cdef void free_memory(handle_t* handle) noexcept nogil:
    free(handle.own.runs)
    free(handle.page.entries)
    free(handle)


cdef bint add(handles_t* handles, handle_t* handle) noexcept nogil:
    cdef uint64_t number = 0
    cdef bint added
    pthread_mutex_lock(&handles.lock)
    added = handles.count * 2 < handles.room or grow(handles)
    if added:
        number = handles.count  # half of the slots are free, so one is near
        while handles.slots[number % handles.room] != NULL:
            number += 1
        handle.number = number % handles.room
        handles.slots[handle.number] = handle
        handles.count += 1
    pthread_mutex_unlock(&handles.lock)
    return added


cdef bint grow(handles_t* handles) noexcept nogil:
    cdef uint64_t room = max(<uint64_t>FIRST_ROOM, handles.room * 2)
    cdef handle_t** slots = <handle_t**>realloc(handles.slots, room * sizeof(handle_t*))
    if slots == NULL:
        return False
    memset(&slots[handles.room], 0, (room - handles.room) * sizeof(handle_t*))
    handles.slots = slots
    handles.room = room
    return True


cdef inline handle_t* look_up(const handles_t* handles, uint64_t number) noexcept nogil:
    return handles.slots[number] if number < handles.room else NULL


cdef handle_t* remove(handles_t* handles, uint64_t number) noexcept nogil:
    cdef handle_t* handle
    pthread_mutex_lock(&handles.lock)
    handle = look_up(handles, number)
    if handle != NULL:
        handles.slots[number] = NULL
        handles.count -= 1
    pthread_mutex_unlock(&handles.lock)
    return handle


cdef handle_t* handles_take(handles_t* handles, uint64_t number) noexcept nogil:
    cdef handle_t* handle
    pthread_mutex_lock(&handles.lock)
    handle = look_up(handles, number)
    if handle != NULL:
        handle.references += 1
    pthread_mutex_unlock(&handles.lock)
    return handle


cdef void handles_keep(handles_t* handles, handle_t* handle) noexcept nogil:
    pthread_mutex_lock(&handles.lock)
    handle.references += 1
    pthread_mutex_unlock(&handles.lock)


cdef void handles_put(handles_t* handles, handle_t* handle) noexcept nogil:
    cdef uint32_t references
    pthread_mutex_lock(&handles.lock)
    handle.references -= 1
    references = handle.references
    pthread_mutex_unlock(&handles.lock)
    if references == 0 and handle.tree != NULL:
        free_memory(handle)
    elif references == 0:
        with gil:
            free_handle(handle)


cdef handle_t* handles_open(handles_t* handles, const node_t* node, bint directory) noexcept nogil:
    cdef handle_t* handle = <handle_t*>calloc(1, sizeof(handle_t))
    if handle == NULL:
        return NULL
    handle.references = 1
    handle.next = NOWHERE
    handle.tree = node.tree
    handle.keeper = node.tree.keeper
    handle.file = node.tree.guest
    handle.inode = node.inode.ino
    if not directory:
        handle.mapped = &handle.own
        if mapped_part(node.tree.volume, node.inode.size, node.extent, node.extents, NULL, 0, &handle.own) != 0:
            free_memory(handle)
            return NULL
    if not add(handles, handle):
        free_memory(handle)
        return NULL
    return handle


cdef void handles_close(handles_t* handles, uint64_t number) noexcept nogil:
    cdef handle_t* handle = remove(handles, number)
    if handle != NULL:
        handles_put(handles, handle)


cdef void handle_take_page(handles_t* handles, handle_t* handle, page_t* page) noexcept nogil:
    pthread_mutex_lock(&handles.lock)
    page[0] = handle.page
    handle.page.entries = NULL
    pthread_mutex_unlock(&handles.lock)


cdef void handle_put_page(handles_t* handles, handle_t* handle, page_t* page) noexcept nogil:
    cdef char* other
    pthread_mutex_lock(&handles.lock)
    other = handle.page.entries  # two listed at once
    handle.page = page[0]
    pthread_mutex_unlock(&handles.lock)
    free(other)


cdef void handle_warn(handle_t* handle) noexcept with gil:
    try:
        if handle.mapped != NULL:
            (<Mapped>handle.keeper).warn()
        else:
            (<Disk>handle.keeper).warn_past_end()
    except Exception:
        logger.exception("internal error")


cdef void handle_report(handle_t* handle, const fault_t* fault, uint32_t number) noexcept with gil:
    try:
        if handle.mapped != NULL:
            error = (<Mapped>handle.keeper).read_fault(fault, number)
        else:
            error = (<Disk>handle.keeper).read_fault(fault)
        if handle.tree != NULL:
            (<object>handle.file).report(handle.inode, error)
        else:
            (<object>handle.file).report(error)
    except Exception:
        logger.exception("internal error")


cdef int64_t handle_read(handle_t* handle, char* buffer, uint64_t size, uint64_t offset) noexcept with gil:
    try:
        data = (<object>handle.file).read(offset, size)
        if not isinstance(data, bytes) or <uint64_t>PyBytes_GET_SIZE(data) > size:
            raise ValueError("read() has to return bytes, and no more than were asked for")
        memcpy(buffer, PyBytes_AS_STRING(data), <size_t>PyBytes_GET_SIZE(data))
        return PyBytes_GET_SIZE(data)
    except Exception as error:
        return -errno_of(error)


cdef int64_t handle_end(handle_t* handle) noexcept with gil:
    try:
        return (<object>handle.file).end()
    except Exception as error:
        return -errno_of(error)


cdef int handle_fill_page(handle_t* handle, uint64_t cookie, page_t* page) noexcept with gil:
    cdef bytes entries
    free(page.entries)
    memset(page, 0, sizeof(page_t))
    page.cookie = cookie
    try:
        entries = (<object>handle.file).page(handle.inode, cookie)
        page.length = <uint64_t>PyBytes_GET_SIZE(entries)
        page.entries = <char*>malloc(page.length + 1)
        if page.entries == NULL:
            return ENOMEM
        memcpy(page.entries, PyBytes_AS_STRING(entries), page.length)
        return 0
    except Exception as error:
        return errno_of(error)


cdef int errno_of(error) except? EIO:
    number = getattr(error, "errno", None)
    if number is None:
        logger.error("internal error in an answer", exc_info=error)
    return number or EIO

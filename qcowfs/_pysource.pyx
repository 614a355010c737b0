# cython: language_level=3
"""A source whose bytes a Python function gets: for protocols that have no C library, and for tests.

Used by source/. A read takes the GIL for the function's one call and nothing else; the function is called from any
number of threads at once, and has to give the GIL back while it waits.
"""

import logging

from cpython.exc cimport PyErr_SetInterrupt
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport EBADF, EINTR, EIO
from libc.stdint cimport int64_t, uint64_t

from qcowfs._source cimport Source, source_t

cdef extern from "Python.h":
    enum:
        PyBUF_WRITE

logger = logging.getLogger("qcowfs.source")


cdef class PythonSource(Source):
    """Bytes by offset, from a Python function.

    A subclass may have a `close` of its own, which makes reads that wait fail, and then calls this one.

    Args:
        name: for messages.
        size: length in bytes, which never changes.
        read: called with an offset and a buffer to fill, both within `size`; returns how many bytes it filled, at
            least one. It may raise OSError. What else it raises is a mistake of ours: it is logged once, and is EIO.
        place: what is equal for two sources of the same bytes.
    """

    cdef object read
    cdef object where
    cdef uint64_t room
    cdef bint reported
    cdef bint closed

    def __init__(self, str name not None, uint64_t size, read, place):
        self.name = name
        self.read = read
        self.where = place
        self.room = size
        self.c.state = <void*>self
        self.c.pread = python_pread
        self.c.status = python_status
        self.c.end = python_end

    def place(self):
        return self.where

    def close(self):
        self.closed = True


cdef int64_t python_pread(const source_t* source, void* buffer, uint64_t length, uint64_t offset) noexcept with gil:
    cdef PythonSource self = <PythonSource>source.state
    cdef uint64_t done = 0
    cdef int64_t got
    if offset >= self.room:
        return 0
    length = min(length, self.room - offset)
    while done < length:
        if self.closed or self.read is None:  # None: the garbage collector was here
            return -EBADF
        got = call(self, <char*>buffer + done, length - done, offset + done)
        if got < 0:
            return got
        done += <uint64_t>got
    return <int64_t>done


cdef int64_t call(PythonSource self, char* buffer, uint64_t length, uint64_t offset) noexcept:
    """Call the function once; returns the bytes that it filled, > 0, or -errno."""
    try:
        view = PyMemoryView_FromMemory(buffer, <Py_ssize_t>length, PyBUF_WRITE)
        try:
            got = self.read(offset, view)
        finally:
            view.release()  # the memory is the reader's again, whoever kept the view
        if not 0 < got <= length:
            raise ValueError(f"{got} bytes were said to be read, of {length}")
        return got
    except OSError as error:
        return -<int64_t>(error.errno or EIO)
    except KeyboardInterrupt:  # belongs to the main thread's Python code, which is told again when it goes on
        PyErr_SetInterrupt()
        return -EINTR
    except BaseException:
        report(self, offset)
        return -EIO


cdef void report(PythonSource self, uint64_t offset) noexcept:
    if not self.reported:  # with the GIL, which nothing gives back in between
        self.reported = True
        logger.exception("%s: cannot read at %#x: this is a mistake in qcowfs", self.name, offset)


cdef int python_status(const source_t* source, uint64_t offset, uint64_t* length) noexcept nogil:
    return 1


cdef int64_t python_end(const source_t* source) noexcept with gil:
    return <int64_t>(<PythonSource>source.state).room

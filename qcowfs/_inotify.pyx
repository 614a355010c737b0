# cython: language_level=3
"""inotify(7): hear of changes of files, which Python has no words for.

Used by follow.py. Two calls; what is read from the descriptor is for whoever reads it.
"""

import os

from libc.errno cimport errno

from qcowfs.clib.inotify cimport (
    IN_CLOEXEC, IN_CLOSE_WRITE, IN_CREATE, IN_MODIFY, IN_MOVED_TO, IN_NONBLOCK, IN_ONLYDIR, inotify_add_watch,
    inotify_init1,
)


def open_inotify():
    """Return a descriptor that becomes readable when something happens; the caller closes it.

    Raises:
        OSError: there is none to be had.
    """
    cdef int descriptor = inotify_init1(IN_CLOEXEC | IN_NONBLOCK)
    if descriptor < 0:
        raise OSError(errno, os.strerror(errno))
    return descriptor


def watch_file(int descriptor, bytes path not None):
    """Hear when the file `path` is written, and when somebody who could write it closes it.

    Raises:
        OSError: it cannot be watched.
    """
    add(descriptor, path, IN_MODIFY | IN_CLOSE_WRITE)


def watch_directory(int descriptor, bytes path not None):
    """Hear when a name appears in the directory `path`.

    Raises:
        OSError: it cannot be watched.
    """
    add(descriptor, path, IN_CREATE | IN_MOVED_TO | IN_ONLYDIR)


cdef int add(int descriptor, bytes path, unsigned int mask) except -1:
    if inotify_add_watch(descriptor, path, mask) < 0:
        raise OSError(errno, os.strerror(errno), os.fsdecode(path))
    return 0

# cython: language_level=3, cdivision=True
"""Guards: what is checked after a read of a state that somebody may delete or rewrite meanwhile.

Used by `_resolve`. Without the GIL; any number of threads. QEMU deletes an internal snapshot in this order: a new table
is written, then the header that names it, and only then clusters become free. So what was read before the header was
found unchanged is right. The table's offset alone does not tell: after a deletion and a new snapshot the table may be
back at its old place. The entry does, because it holds the time of its making to the microsecond.
"""

import logging

from libc.errno cimport EIO, ESTALE
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_GET_SIZE

from qcowfs._source cimport Source
from qcowfs._tables cimport RULE_DELETED, RULE_READ_FAILED, RULE_WRITTEN, fault_t
from qcowfs.clib.atomic cimport atomic_load, atomic_store
from qcowfs.clib.endian cimport be32toh, be64toh
from qcowfs.clib.fcntl cimport F_OFD_GETLK, F_UNLCK, F_WRLCK, SEEK_SET, c_fcntl_lock, flock_t
from qcowfs.clib.pthread cimport (
    pthread_cond_broadcast, pthread_cond_destroy, pthread_cond_init, pthread_cond_wait, pthread_mutex_destroy,
    pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)
from qcowfs.clib.stat cimport c_fstat, stat_t

cdef enum:
    HEADER_OFFSET = 60  # of nb_snapshots, a u32, behind which is snapshots_offset, a u64
    HEADER_SIZE = 12
    CHUNK = 512  # of an entry: few are longer
    USED_TO_WRITE = 101  # source/lock.py: a permission that is used, + WRITE
    USED_TO_RESIZE = 103  # + RESIZE
    NANOSECONDS = 1000000000

logger = logging.getLogger("qcowfs.core")


cdef class Guard:
    """What has to hold after a read. Make one with `snapshot`, `file` or `device`."""

    def __cinit__(self):
        pthread_mutex_init(&self.c.lock, NULL)
        pthread_cond_init(&self.c.ended, NULL)
        self.c.owner = <void*>self

    def __dealloc__(self):
        pthread_cond_destroy(&self.c.ended)
        pthread_mutex_destroy(&self.c.lock)

    @staticmethod
    def snapshot(Source source not None, bytes entry not None, find, *, uint32_t depth, uint64_t table, uint32_t count,
                 uint64_t place):
        """Return the guard of an internal snapshot.

        Args:
            source: the image, without caches.
            entry: the bytes of its entry.
            find: is asked when the table has changed; returns (table, count, place) of now, None if there is no such
                entry any more, and raises QcowfsError if that cannot be told.
            table, count, place: the table's offset, its number of entries, and the entry's offset, as they were read.
        """
        cdef Guard guard = Guard.__new__(Guard)
        guard.use(GUARD_SNAPSHOT, source, depth)
        guard.entry = entry
        guard.find = find
        guard.c.entry = PyBytes_AS_STRING(entry)
        guard.c.length = <uint64_t>PyBytes_GET_SIZE(entry)
        guard.c.table, guard.c.count, guard.c.place = table, count, place
        return guard

    @staticmethod
    def file(Source source not None, *, uint32_t depth, int64_t modified_ns):
        """Return the guard of a file of this machine, which is not to be written after `modified_ns`."""
        cdef Guard guard = Guard.__new__(Guard)
        guard.use(GUARD_FILE, source, depth)
        guard.c.modified_ns = modified_ns
        return guard

    @staticmethod
    def device(Source source not None, *, uint32_t depth):
        """Return the guard of a block device, which nobody is to open for writing."""
        cdef Guard guard = Guard.__new__(Guard)
        guard.use(GUARD_DEVICE, source, depth)
        return guard

    cdef int use(self, guard_kind kind, Source source, uint32_t depth) except -1:
        cdef const source_t* behind = &source.c
        while behind.base != NULL:
            behind = behind.base
        self.source = source
        self.c.kind = kind
        self.c.depth = depth
        self.c.source = behind
        if kind == GUARD_SNAPSHOT:
            self.c.source = &source.c
        self.c.far = behind.fd < 0
        return 0

    def check(self):
        """Return 0 if it holds, or an errno: ESTALE if not, another if nobody can tell now."""
        cdef int error
        with nogil:
            error = check(&self.c)
        return error


cdef int guard_check(guard_t* guard, fault_t* fault) noexcept nogil:
    cdef int error = check(guard)
    if error == 0:
        return 0
    fault.rule = RULE_READ_FAILED
    if error == ESTALE:
        fault.rule = RULE_DELETED if guard.kind == GUARD_SNAPSHOT else RULE_WRITTEN
    fault.error = error
    fault.depth = guard.depth
    fault.guest_offset = 0  # the same fault wherever it was read: the log tells it once
    fault.host_offset = HEADER_OFFSET if guard.kind == GUARD_SNAPSHOT else 0
    return -1


cdef int check(guard_t* guard) noexcept nogil:
    """Return 0, ESTALE if it does not hold, or another errno if nobody can tell."""
    cdef int error
    if atomic_load(&guard.gone):
        return ESTALE
    if guard.kind == GUARD_SNAPSHOT:
        error = look_together(guard) if guard.far else look(guard)
    elif guard.kind == GUARD_FILE:
        error = 0 if is_unmodified(guard) else ESTALE
    else:
        error = 0 if not is_locked(guard, USED_TO_WRITE) and not is_locked(guard, USED_TO_RESIZE) else ESTALE
    if error == ESTALE:
        atomic_store(&guard.gone, 1)
    return error


cdef int look_together(guard_t* guard) noexcept nogil:
    """Look, or let somebody else look for several readers: each look is a way to the server and back, or two.

    What this reader has was read before the call, so a look has to begin after it, but for one that fails: then nobody
    can tell, and who waited so long need not wait again.
    """
    cdef uint64_t early
    cdef int error = 0
    cdef bint known = False
    pthread_mutex_lock(&guard.lock)
    early = guard.begun
    while guard.begun != guard.done and not known:
        pthread_cond_wait(&guard.ended, &guard.lock)
        error = guard.error
        known = guard.done > early or (guard.done == early and error)
    if not known:
        guard.begun += 1
        pthread_mutex_unlock(&guard.lock)
        error = look(guard)
        pthread_mutex_lock(&guard.lock)
        guard.done += 1
        guard.error = error
        pthread_cond_broadcast(&guard.ended)
    pthread_mutex_unlock(&guard.lock)
    return error


cdef int look(guard_t* guard) noexcept nogil:
    return 0 if is_where_it_was(guard) else look_again(guard)


cdef bint is_where_it_was(guard_t* guard) noexcept nogil:
    cdef char header[HEADER_SIZE]
    cdef uint32_t count
    cdef uint64_t table
    cdef uint64_t place
    cdef bint same
    if guard.source.pread(guard.source, header, HEADER_SIZE, HEADER_OFFSET) != HEADER_SIZE:
        return False
    memcpy(&count, header, sizeof(count))
    memcpy(&table, header + sizeof(count), sizeof(table))
    pthread_mutex_lock(&guard.lock)
    place = guard.place
    same = be32toh(count) == guard.count and be64toh(table) == guard.table
    pthread_mutex_unlock(&guard.lock)
    return same and is_at(guard, place)


cdef bint is_at(const guard_t* guard, uint64_t place) noexcept nogil:
    cdef char found[CHUNK]
    cdef uint64_t done = 0
    cdef uint64_t length
    while done < guard.length:
        length = min(guard.length - done, <uint64_t>CHUNK)
        if guard.source.pread(guard.source, found, length, place + done) != <int64_t>length:
            return False
        if memcmp(found, guard.entry + done, length) != 0:
            return False
        done += length
    return True


cdef int look_again(guard_t* guard) noexcept with gil:
    try:
        found = (<Guard>guard.owner).find()
        if found is None:
            return ESTALE
        table, count, place = found
        pthread_mutex_lock(&guard.lock)
        guard.table, guard.count, guard.place = table, count, place
        pthread_mutex_unlock(&guard.lock)
        return 0
    except Exception as error:
        number = getattr(error, "errno", None)
        if number is None:
            logger.exception("internal error")
        # ESTALE would be for ever, and this need not be.
        return EIO if number is None or number == ESTALE else number


cdef bint is_unmodified(const guard_t* guard) noexcept nogil:
    cdef stat_t status
    if c_fstat(guard.source.fd, &status) != 0:
        return False
    return <int64_t>status.st_mtim.tv_sec * NANOSECONDS + status.st_mtim.tv_nsec == guard.modified_ns


cdef bint is_locked(const guard_t* guard, int64_t place) noexcept nogil:
    """Has another process this byte? Who cannot tell says yes."""
    cdef flock_t lock
    lock.l_type = F_WRLCK
    lock.l_whence = SEEK_SET
    lock.l_start = place
    lock.l_len = 1
    lock.l_pid = 0
    return c_fcntl_lock(guard.source.fd, F_OFD_GETLK, &lock) != 0 or lock.l_type != F_UNLCK

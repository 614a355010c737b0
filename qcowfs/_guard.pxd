# The check after a read: could the bytes that were just read already be somebody else's?
#
# A guard_t is of one state that nothing keeps from being deleted or rewritten. What was read is right if the guard
# holds afterwards.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs._source cimport Source, source_t
from qcowfs._tables cimport fault_t
from qcowfs.clib.pthread cimport pthread_cond_t, pthread_mutex_t


cdef enum guard_kind:
    GUARD_SNAPSHOT  # an internal snapshot: its entry is in the table that the header names
    GUARD_FILE  # a file that nobody was writing: it was last written when it was
    GUARD_DEVICE  # a block device, which has no such time: nobody has QEMU's locks for writing


cdef struct guard_t:
    guard_kind kind
    uint32_t depth  # of the layer
    const source_t* source  # GUARD_SNAPSHOT: the image without caches; else the file itself, behind a descriptor
    int64_t modified_ns  # GUARD_FILE: since the epoch
    const char* entry  # GUARD_SNAPSHOT: as it is in the table
    uint64_t length  # of `entry`
    bint far  # the source is no file of this machine: readers of a GUARD_SNAPSHOT share their looks at it
    pthread_mutex_t lock  # of what follows, down to `error`; never held while the source is read
    uint64_t table  # the header's snapshots_offset,
    uint32_t count  # and nb_snapshots, when the entry was there last
    uint64_t place  # host offset of the entry then
    pthread_cond_t ended  # a look did
    uint64_t begun  # looks of a guard that is `far`, one after the other
    uint64_t done
    int error  # of the last look that is done
    uint32_t gone  # atomic; 1: it does not hold, and never will again
    void* owner  # the Guard


cdef class Guard:
    cdef guard_t c
    cdef Source source
    cdef bytes entry
    cdef object find

    cdef int use(self, guard_kind kind, Source source, uint32_t depth) except -1


# Returns 0 if the guard holds, or -1 with `fault`: ESTALE if it does not, another errno if nobody can tell right now.
# Takes the GIL only when the header has changed.
cdef int guard_check(guard_t* guard, fault_t* fault) noexcept nogil

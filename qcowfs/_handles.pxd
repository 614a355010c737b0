# Open files of the mount, as the threads of the data plane know them: by the number that FUSE's requests carry.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._resolve cimport disk_t
from qcowfs.clib.pthread cimport pthread_mutex_t


cdef struct handle_t:
    uint64_t number  # FUSE's fh
    uint32_t references  # of the table and of those who use it now; guarded by the table's lock
    disk_t* disk  # NULL: a file that only Python can read
    void* keeper  # the Disk that `disk` is in, or None; owned
    void* file  # the file of the tree: read(), report(), end; owned
    uint64_t next  # where a sequential reader goes on; guarded by the lock of ahead_t, as is the next one
    uint64_t ahead  # up to where clusters are, or are going to be, decompressed ahead


cdef struct handles_t:
    pthread_mutex_t lock
    handle_t** slots
    uint64_t room  # slots
    uint64_t count  # slots that are not NULL


cdef class Handles:
    cdef handles_t c


# One more reference; NULL: nobody has that file open.
cdef handle_t* handles_take(handles_t* handles, uint64_t number) noexcept nogil
cdef void handles_keep(handles_t* handles, handle_t* handle) noexcept nogil
# One reference less; the last one frees it, and takes the GIL for that.
cdef void handles_put(handles_t* handles, handle_t* handle) noexcept nogil

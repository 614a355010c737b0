# Open files of the mount, as the threads of the data plane know them: by the number that FUSE's requests carry.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs._mapped cimport mapped_t
from qcowfs._resolve cimport disk_t
from qcowfs._tables cimport fault_t
from qcowfs.clib.pthread cimport pthread_mutex_t


cdef struct handle_t:
    uint64_t number  # FUSE's fh
    uint32_t references  # of the table and of those who use it now; guarded by the table's lock
    disk_t* disk  # at most one of the two is not NULL; with none, only Python can read the file
    const mapped_t* mapped
    void* keeper  # the Disk or Mapped that they are in, or None; owned
    void* file  # the file of the tree: read(), report(), end(); owned
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

# What takes the GIL: log that something was found in the handle's disks, or cannot be read (`number`: which disk of a
# mapped file); the bytes and the end of a file that only Python can read, or -errno.
cdef void handle_warn(handle_t* handle) noexcept with gil
cdef void handle_report(handle_t* handle, const fault_t* fault, uint32_t number) noexcept with gil
cdef int64_t handle_read(handle_t* handle, char* buffer, uint64_t size, uint64_t offset) noexcept with gil
cdef int64_t handle_end(handle_t* handle) noexcept with gil

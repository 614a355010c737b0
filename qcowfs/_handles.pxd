# Open files of the mount, as the threads of the data plane know them: by the number that FUSE's requests carry.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs._mapped cimport mapped_t
from qcowfs._nodes cimport node_t, tree_t
from qcowfs._resolve cimport disk_t
from qcowfs._tables cimport fault_t
from qcowfs.clib.pthread cimport pthread_mutex_t


# Entries of a directory (record.pack_entry), some of them taken already.
cdef struct page_t:
    char* entries  # NULL: none
    uint64_t length
    uint64_t place  # of the first that was not taken
    uint64_t cookie  # of the last that was


cdef struct handle_t:
    uint64_t number  # FUSE's fh
    uint32_t references  # of the table and of those who use it now; guarded by the table's lock
    disk_t* disk  # at most one of the two is not NULL; with none, only Python can read the file
    const mapped_t* mapped
    bint made  # by a tree's worker, which may be slow: the data plane waits for some of these at once only
    void* keeper  # the Disk or Mapped that they are in, or None; owned, or `tree`'s
    void* file  # the file of the mount: read(), report(), end(); owned, or `tree`'s guest
    uint64_t next  # where a sequential reader goes on; guarded by the lock of ahead_t, as is the next one
    uint64_t ahead  # up to where clusters are, or are going to be, decompressed ahead
    # Of what was opened without Python, which is in a tree and closed without Python, too.
    const tree_t* tree  # NULL: another
    uint64_t inode
    mapped_t own  # of a file; `mapped` points here
    page_t page  # of a directory


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

# In FUSE's fh of a directory that was opened here; pyfuse3's own begin with 1.
cdef uint64_t DIRECTORY_HANDLE

# Open an inode of a tree: a file whose extents are known, or a directory. NULL: no memory.
cdef handle_t* handles_open(handles_t* handles, const node_t* node, bint directory) noexcept nogil
cdef void handles_close(handles_t* handles, uint64_t number) noexcept nogil

# Of an open directory: take its page, which nobody else can have meanwhile, and give it back.
cdef void handle_take_page(handles_t* handles, handle_t* handle, page_t* page) noexcept nogil
cdef void handle_put_page(handles_t* handles, handle_t* handle, page_t* page) noexcept nogil

# What takes the GIL: log that something was found in the handle's disks, or cannot be read (`number`: which disk of a
# mapped file); the bytes and the end of a file that only Python can read, or -errno.
cdef void handle_warn(handle_t* handle) noexcept with gil
cdef void handle_report(handle_t* handle, const fault_t* fault, uint32_t number) noexcept with gil
cdef int64_t handle_read(handle_t* handle, char* buffer, uint64_t size, uint64_t offset) noexcept with gil
cdef int64_t handle_end(handle_t* handle) noexcept with gil
# Ask the tree for entries of a directory after `cookie`. Returns 0, with none at the end, or an errno.
cdef int handle_fill_page(handle_t* handle, uint64_t cookie, page_t* page) noexcept with gil

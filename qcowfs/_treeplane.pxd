# What the data plane answers of trees inside disks: attributes, listings, opening and closing, without Python.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs._handles cimport handles_t
from qcowfs._nodes cimport nodes_t
from qcowfs.clib.fuse_kernel cimport fuse_in_header


cdef enum:
    NOT_OURS = -1000000  # instead of a length or -errno: pyfuse3 has to answer


cdef struct treeplane_t:
    int device
    handles_t* handles
    nodes_t* nodes
    uint32_t waiting  # atomic; threads that wait for a tree now
    uint32_t most_waiting


# Answer a request that is no listing, or return False: it is not for us.
cdef bint tree_answer(treeplane_t* plane, const fuse_in_header* request, uint64_t length) noexcept nogil

# Put entries of an open directory into `buffer`. Returns how many bytes, -errno, or NOT_OURS.
cdef int64_t tree_list(
    treeplane_t* plane, uint64_t fh, uint64_t cookie, bint plus, char* buffer, uint64_t room) noexcept nogil

# A tree that waits for its source must not take all threads: may one more wait? Then it tells when it has.
cdef bint tree_may_wait(treeplane_t* plane) noexcept nogil
cdef void tree_waited(treeplane_t* plane) noexcept nogil

# The inodes of trees inside disks, as the mount shows them: kept by number for whoever answers FUSE without Python.

from libc.stdint cimport int64_t, uint32_t, uint64_t

from qcowfs._mapped cimport mapped_t
from qcowfs._records cimport extent_record_t, inode_record_t
from qcowfs.clib.pthread cimport pthread_mutex_t


cdef enum:
    FEW_EXTENTS = 4  # that are kept with an inode: nearly all files have no more


# A tree that is shown; lives as long as the Nodes that it was entered into.
cdef struct tree_t:
    tree_t* next
    uint64_t base  # of its inode numbers in the mount
    uint64_t root  # its root's number for its reader; in the mount that is `base` itself
    int64_t uid  # instead of the stored one; -1: as stored
    int64_t gid
    uint32_t umask  # bits that are taken from the modes of files and directories
    const mapped_t* volume
    void* keeper  # the Mapped that `volume` is in; owned
    void* guest  # vfs.guest.Guest: entries(), report(); owned


cdef struct node_t:
    const tree_t* tree
    uint32_t extents  # RECORD_UNMAPPED: they have to be asked for
    inode_record_t inode  # as the mount shows it: number, owner and mode are mapped
    extent_record_t extent[FEW_EXTENTS]


cdef struct nodes_t:
    pthread_mutex_t lock
    tree_t* trees
    node_t* slots  # in sets of a few, by inode number; NULL while there is no tree
    uint64_t turn  # which of a set is overwritten next


cdef class Nodes:
    cdef nodes_t c
    cdef dict by_base  # number of a tree: the Tree that stands for it

    cdef const tree_t* tree(self, uint64_t base) except NULL


# Copy what is known of an inode number; False: nothing is.
cdef bint nodes_find(nodes_t* nodes, uint64_t number, node_t* found) noexcept nogil

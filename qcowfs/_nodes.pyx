# cython: language_level=3, cdivision=True
"""The inodes of trees inside disks, as the mount shows them.

Used by vfs/guest.py, which hands in what a tree's reader told, and by `_dataplane`, which answers FUSE from what is
kept here, without Python. What is told of an inode is adopted first, in one place: its number becomes the mount's, and
its owner and mode what the person who mounts asked for. Nothing of a tree ever changes, so what is kept is never stale;
it may be overwritten at any time, and is asked for again then.
"""

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.ref cimport Py_DECREF, Py_INCREF

from qcowfs._mapped cimport Mapped
from qcowfs._records cimport RECORD_UNMAPPED, entry_record_t, extent_record_t, inode_record_t
from qcowfs.clib.pthread cimport (
    pthread_mutex_destroy, pthread_mutex_init, pthread_mutex_lock, pthread_mutex_unlock,
)

cdef enum:
    SETS = 8192  # of WAYS inodes: 32,768 of 232 bytes, 7 MiB, of which the kernel gives only what is used
    WAYS = 4
    FORMAT = 0o170000
    DIRECTORY = 0o040000
    REGULAR = 0o100000


cdef class Nodes:
    """The inodes of one mount's trees. Any number of threads."""

    def __cinit__(self):
        pthread_mutex_init(&self.c.lock, NULL)
        self.by_base = {}

    def __dealloc__(self):
        # Whoever uses a tree_t keeps this object, too.
        cdef tree_t* tree = self.c.trees
        cdef tree_t* following
        while tree != NULL:
            following = tree.next
            Py_DECREF(<object>tree.keeper)
            Py_DECREF(<object>tree.guest)
            free(tree)
            tree = following
        free(self.c.slots)
        pthread_mutex_destroy(&self.c.lock)

    def enter(self, uint64_t base, uint64_t root, Mapped volume not None, guest, *, int64_t uid, int64_t gid, umask):
        """Enter a tree.

        Args:
            base: of its inode numbers in the mount, which are `base` | the reader's, and `base` for the root.
            root: the root's number for the reader.
            volume: where its files are.
            guest: has `page(number, cookie)` for the data plane, and `report(number, error)`.
            uid, gid: shown instead of the stored ones; -1: as stored.
            umask: bits that are taken away from the modes of files and directories.
        """
        cdef tree_t* tree
        if self.c.slots == NULL:
            self.c.slots = <node_t*>calloc(SETS * WAYS, sizeof(node_t))
        tree = <tree_t*>calloc(1, sizeof(tree_t))
        if self.c.slots == NULL or tree == NULL:
            free(tree)
            raise MemoryError()
        tree.base, tree.root, tree.uid, tree.gid, tree.umask = base, root, uid, gid, umask
        tree.volume = &volume.c
        Py_INCREF(volume)
        tree.keeper = <void*>volume
        Py_INCREF(guest)
        tree.guest = <void*>guest
        tree.next = self.c.trees
        self.c.trees = tree
        self.by_base[base] = <size_t>tree

    def inode(self, uint64_t base, bytes record not None):
        """Return the bytes of record.INODE as the mount shows that inode of the tree `base`, and keep it."""
        cdef const tree_t* tree = self.tree(base)
        cdef bytes adopted
        cdef inode_record_t inode
        if PyBytes_GET_SIZE(record) != sizeof(inode):
            raise ValueError("not one inode")
        memcpy(&inode, PyBytes_AS_STRING(record), sizeof(inode))
        adopt(tree, &inode)
        if not inode.error:
            with nogil:
                keep(&self.c, tree, &inode, RECORD_UNMAPPED, NULL)
        adopted = PyBytes_FromStringAndSize(<char*>&inode, sizeof(inode))
        return adopted

    def page(self, uint64_t base, bytes entries not None):
        """Return entries of a directory (record.pack_entry) as the mount shows them, and keep their inodes.

        Args:
            entries: checked by `_answer`.
        """
        cdef const tree_t* tree = self.tree(base)
        cdef Py_ssize_t length = PyBytes_GET_SIZE(entries)
        cdef bytes adopted = PyBytes_FromStringAndSize(PyBytes_AS_STRING(entries), length)
        cdef char* at = PyBytes_AS_STRING(adopted)
        with nogil:
            adopt_entries(&self.c, tree, at, <uint64_t>length)
        return adopted

    cdef const tree_t* tree(self, uint64_t base) except NULL:
        cdef size_t address = self.by_base[base]
        return <const tree_t*>address


cdef void adopt(const tree_t* tree, inode_record_t* inode) noexcept nogil:
    cdef uint32_t form = inode.mode & FORMAT
    # The root is found again under its own number, so that whoever walks sees a circle for what it is.
    inode.ino = tree.base if inode.ino == tree.root else tree.base | inode.ino
    if tree.uid >= 0:
        inode.uid = <uint32_t>tree.uid
    if tree.gid >= 0:
        inode.gid = <uint32_t>tree.gid
    if form == DIRECTORY or form == REGULAR:
        inode.mode &= ~tree.umask


cdef void adopt_entries(nodes_t* nodes, const tree_t* tree, char* at, uint64_t length) noexcept nogil:
    cdef const char* end = at + length
    cdef entry_record_t entry
    cdef inode_record_t inode
    while at < end:
        memcpy(&entry, at, sizeof(entry))
        memcpy(&inode, at + sizeof(entry), sizeof(inode))
        adopt(tree, &inode)
        memcpy(at + sizeof(entry), &inode, sizeof(inode))
        if not inode.error:
            keep(nodes, tree, &inode, entry.extents, at + sizeof(entry) + sizeof(inode))
        at += entry.length


cdef void keep(
    nodes_t* nodes, const tree_t* tree, const inode_record_t* inode, uint32_t extents, const char* at
) noexcept nogil:
    cdef node_t* slot
    if extents > FEW_EXTENTS:
        extents = RECORD_UNMAPPED
    pthread_mutex_lock(&nodes.lock)
    slot = slot_of(nodes, inode.ino)
    if slot.inode.ino == inode.ino and slot.inode.size == inode.size and extents == RECORD_UNMAPPED:
        extents = slot.extents  # an inode that is asked for alone comes without its extents
    elif extents != RECORD_UNMAPPED:
        memcpy(slot.extent, at, extents * sizeof(extent_record_t))
    slot.tree = tree
    slot.inode = inode[0]
    slot.extents = extents
    pthread_mutex_unlock(&nodes.lock)


cdef node_t* slot_of(nodes_t* nodes, uint64_t number) noexcept nogil:
    """Return the slot that has `number`, or else the one to overwrite with it."""
    cdef node_t* first = set_of(nodes, number)
    cdef uint64_t way
    for way in range(<uint64_t>WAYS):
        if first[way].inode.ino == number or first[way].inode.ino == 0:
            return &first[way]
    nodes.turn += 1
    return &first[nodes.turn % WAYS]


cdef inline node_t* set_of(nodes_t* nodes, uint64_t number) noexcept nogil:
    # Numbers of one tree follow each other; those of another begin elsewhere.
    return &nodes.slots[((number ^ (number >> 40) * <uint64_t>0x9E3779B97F4A7C15) % SETS) * WAYS]


cdef bint nodes_find(nodes_t* nodes, uint64_t number, node_t* found) noexcept nogil:
    cdef node_t* first
    cdef uint64_t way
    cdef bint is_there = False
    pthread_mutex_lock(&nodes.lock)
    if nodes.slots != NULL:
        first = set_of(nodes, number)
        for way in range(<uint64_t>WAYS):
            if first[way].inode.ino == number:
                found[0] = first[way]
                is_there = True
                break
    pthread_mutex_unlock(&nodes.lock)
    return is_there

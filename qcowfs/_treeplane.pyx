# cython: language_level=3, cdivision=True
"""What the data plane answers of the trees inside disks: attributes, listings, opening and closing.

Used by `_dataplane`. Listing a directory asks its tree, which is Python; what that told of the inodes in it is kept by
`_nodes`, so that nothing that `find -ls` or `cp -a` does afterwards needs Python. What is not known here any more, or
needs more thought, is pyfuse3's.
"""

from libc.errno cimport EBADF, ENODATA, ENOMEM, ENOSYS
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from qcowfs._handles cimport (
    DIRECTORY_HANDLE, handle_fill_page, handle_put_page, handle_t, handle_take_page, handles_close, handles_open,
    handles_put, handles_take, page_t,
)
from qcowfs._nodes cimport node_t, nodes_find
from qcowfs._records cimport (
    RECORD_NO_XATTRS, RECORD_UNMAPPED, entry_record_t, extent_record_t, inode_record_t,
)
from qcowfs._reply cimport device_reply
from qcowfs.clib.atomic cimport atomic_add, atomic_subtract
from qcowfs.clib.fuse_kernel cimport (
    FOPEN_CACHE_DIR, FOPEN_KEEP_CACHE, FUSE_BATCH_FORGET, FUSE_FLUSH, FUSE_FORGET, FUSE_GETATTR, FUSE_GETXATTR,
    FUSE_LISTXATTR, FUSE_OPEN, FUSE_OPENDIR, FUSE_RELEASE, FUSE_RELEASEDIR, fuse_attr, fuse_attr_out, fuse_dirent,
    fuse_entry_out, fuse_getxattr_in, fuse_getxattr_out, fuse_in_header, fuse_open_in, fuse_open_out,
    fuse_release_in,
)

cdef enum:
    FOREVER = 365 * 86400  # seconds; nothing in a tree changes
    FORMAT = 0o170000
    DIRECTORY = 0o040000
    REGULAR = 0o100000
    ACCESS_MODE = 3  # O_ACCMODE, of the flags of OPEN
    BLOCK_SIZE = 4096  # of st_blksize


cdef bint tree_answer(treeplane_t* plane, const fuse_in_header* request, uint64_t length) noexcept nogil:
    cdef const void* body = request + 1
    cdef uint64_t room = length - sizeof(fuse_in_header)
    if request.opcode == FUSE_FORGET or request.opcode == FUSE_BATCH_FORGET:
        return True  # wants no answer, and no node of the mount ever goes away
    if request.opcode == FUSE_FLUSH:  # nothing is ever dirty; the kernel does not ask again
        device_reply(plane.device, request, ENOSYS, NULL, 0)
        return True
    if request.opcode == FUSE_RELEASE and room >= sizeof(fuse_release_in):
        return release(plane, request, (<const fuse_release_in*>body).fh)
    if request.opcode == FUSE_RELEASEDIR and room >= sizeof(fuse_release_in):
        return release_directory(plane, request, (<const fuse_release_in*>body).fh)
    if request.opcode == FUSE_GETATTR:
        return tell_attributes(plane, request)
    if request.opcode == FUSE_OPEN and room >= sizeof(fuse_open_in):
        return open_file(plane, request, (<const fuse_open_in*>body).flags)
    if request.opcode == FUSE_OPENDIR:
        return open_directory(plane, request)
    if (request.opcode == FUSE_GETXATTR or request.opcode == FUSE_LISTXATTR) and room >= sizeof(fuse_getxattr_in):
        return tell_no_attribute(plane, request, (<const fuse_getxattr_in*>body).size)
    return False


cdef bint tell_attributes(treeplane_t* plane, const fuse_in_header* request) noexcept nogil:
    cdef node_t node
    cdef fuse_attr_out told
    if not nodes_find(plane.nodes, request.nodeid, &node):
        return False
    memset(&told, 0, sizeof(told))
    told.attr_valid = FOREVER
    fill_attributes(&told.attr, &node.inode)
    device_reply(plane.device, request, 0, &told, sizeof(told))
    return True


cdef void fill_attributes(fuse_attr* told, const inode_record_t* inode) noexcept nogil:
    told.ino = inode.ino
    told.size = inode.size
    told.blocks = inode.blocks
    told.atime = <uint64_t>inode.atime
    told.mtime = <uint64_t>inode.mtime
    told.ctime = <uint64_t>inode.ctime
    told.atimensec = inode.atime_ns
    told.mtimensec = inode.mtime_ns
    told.ctimensec = inode.ctime_ns
    told.mode = inode.mode
    told.nlink = inode.nlink
    told.uid = inode.uid
    told.gid = inode.gid
    told.rdev = inode.rdev
    told.blksize = BLOCK_SIZE


cdef bint tell_no_attribute(treeplane_t* plane, const fuse_in_header* request, uint32_t size) noexcept nogil:
    """Answer for an inode that has no extended attributes. The tree's root has some that are not stored."""
    cdef node_t node
    cdef fuse_getxattr_out none
    if not nodes_find(plane.nodes, request.nodeid, &node):
        return False
    if not node.inode.flags & RECORD_NO_XATTRS or request.nodeid == node.tree.base:
        return False
    if request.opcode == FUSE_GETXATTR:
        device_reply(plane.device, request, ENODATA, NULL, 0)
    elif size:
        device_reply(plane.device, request, 0, NULL, 0)
    else:
        memset(&none, 0, sizeof(none))
        device_reply(plane.device, request, 0, &none, sizeof(none))
    return True


cdef bint open_file(treeplane_t* plane, const fuse_in_header* request, uint32_t flags) noexcept nogil:
    cdef node_t node
    if not nodes_find(plane.nodes, request.nodeid, &node):
        return False
    if flags & ACCESS_MODE or node.inode.mode & FORMAT != REGULAR or node.extents == RECORD_UNMAPPED:
        return False
    opened(plane, request, handles_open(plane.handles, &node, False), 0, FOPEN_KEEP_CACHE)
    return True


cdef bint open_directory(treeplane_t* plane, const fuse_in_header* request) noexcept nogil:
    cdef node_t node
    if not nodes_find(plane.nodes, request.nodeid, &node) or node.inode.mode & FORMAT != DIRECTORY:
        return False
    opened(
        plane, request, handles_open(plane.handles, &node, True), DIRECTORY_HANDLE, FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR)
    return True


cdef void opened(
    treeplane_t* plane, const fuse_in_header* request, const handle_t* handle, uint64_t mark, uint32_t flags
) noexcept nogil:
    cdef fuse_open_out told
    if handle == NULL:
        device_reply(plane.device, request, ENOMEM, NULL, 0)
        return
    memset(&told, 0, sizeof(told))
    told.fh = handle.number | mark
    told.open_flags = flags
    device_reply(plane.device, request, 0, &told, sizeof(told))


cdef bint release(treeplane_t* plane, const fuse_in_header* request, uint64_t fh) noexcept nogil:
    cdef handle_t* handle = handles_take(plane.handles, fh)
    cdef bint ours = handle != NULL and handle.tree != NULL
    if ours:
        handles_close(plane.handles, fh)
    if handle != NULL:
        handles_put(plane.handles, handle)
    if ours:
        device_reply(plane.device, request, 0, NULL, 0)
    return ours


cdef bint release_directory(treeplane_t* plane, const fuse_in_header* request, uint64_t fh) noexcept nogil:
    if not fh & DIRECTORY_HANDLE:
        return False
    handles_close(plane.handles, fh & ~DIRECTORY_HANDLE)
    device_reply(plane.device, request, 0, NULL, 0)
    return True


cdef int64_t tree_list(
    treeplane_t* plane, uint64_t fh, uint64_t cookie, bint plus, char* buffer, uint64_t room) noexcept nogil:
    cdef handle_t* handle
    cdef int64_t listed
    if not fh & DIRECTORY_HANDLE:
        return NOT_OURS
    handle = handles_take(plane.handles, fh & ~DIRECTORY_HANDLE)
    if handle == NULL:
        return -EBADF
    listed = list_page(plane, handle, cookie, plus, buffer, room)
    handles_put(plane.handles, handle)
    return listed


cdef int64_t list_page(
    treeplane_t* plane, handle_t* handle, uint64_t cookie, bint plus, char* buffer, uint64_t room) noexcept nogil:
    cdef page_t page
    cdef uint64_t used = 0
    cdef int error = 0
    handle_take_page(plane.handles, handle, &page)
    if page.entries == NULL or page.cookie != cookie or page.place == page.length:
        if not tree_may_wait(plane):  # pyfuse3 has time
            handle_put_page(plane.handles, handle, &page)
            return NOT_OURS
        error = handle_fill_page(handle, cookie, &page)
        tree_waited(plane)
    if error == 0:
        used = take_entries(&page, plus, buffer, room)
    handle_put_page(plane.handles, handle, &page)
    return -error if error else <int64_t>used


cdef bint tree_may_wait(treeplane_t* plane) noexcept nogil:
    if atomic_add(&plane.waiting, 1) <= plane.most_waiting:
        return True
    atomic_subtract(&plane.waiting, 1)
    return False


cdef void tree_waited(treeplane_t* plane) noexcept nogil:
    atomic_subtract(&plane.waiting, 1)


cdef uint64_t take_entries(page_t* page, bint plus, char* buffer, uint64_t room) noexcept nogil:
    """Move entries from the page to an answer of `room` bytes; return how many bytes of it are used."""
    cdef uint64_t used = 0
    cdef uint64_t size
    cdef entry_record_t entry
    while page.place < page.length:
        memcpy(&entry, page.entries + page.place, sizeof(entry))
        size = put_entry(page.entries + page.place, &entry, plus, buffer + used, room - used)
        if size == 0:
            break
        used += size
        page.place += entry.length
        page.cookie = entry.cookie
    return used


cdef uint64_t put_entry(
    const char* at, const entry_record_t* entry, bint plus, char* buffer, uint64_t room) noexcept nogil:
    """Write one entry as FUSE has it; return its bytes, 0 if there is no room."""
    cdef fuse_entry_out more
    cdef fuse_dirent dirent
    cdef inode_record_t inode
    cdef uint64_t before = sizeof(fuse_entry_out) if plus else 0
    cdef uint64_t head = before + sizeof(fuse_dirent)
    cdef uint64_t size = (head + entry.name_length + 7) // 8 * 8
    cdef uint64_t extents = 0 if entry.extents == RECORD_UNMAPPED else entry.extents
    if size > room:
        return 0
    memcpy(&inode, at + sizeof(entry_record_t), sizeof(inode))
    memset(buffer, 0, size)
    if plus:
        memset(&more, 0, sizeof(more))
        # Without a number the kernel looks the name up when somebody wants more than the name, and hears why not.
        more.nodeid = 0 if inode.error else inode.ino
        more.entry_valid = more.attr_valid = FOREVER
        fill_attributes(&more.attr, &inode)
        memcpy(buffer, &more, sizeof(more))
    memset(&dirent, 0, sizeof(dirent))
    dirent.ino = inode.ino
    dirent.off = entry.cookie
    dirent.namelen = entry.name_length
    dirent.type = inode.mode >> 12
    memcpy(buffer + before, &dirent, sizeof(dirent))
    memcpy(
        buffer + head, at + sizeof(entry_record_t) + sizeof(inode) + extents * sizeof(extent_record_t),
        entry.name_length)
    return size

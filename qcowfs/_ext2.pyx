# cython: language_level=3, cdivision=True
# distutils: libraries = ext2fs com_err
"""Inodes, directories and block maps of ext2, ext3 and ext4, by libext2fs over a Device; only ever read.

Used by inside/ext.py, in a worker, in one thread. Every error is an OSError; what the volume counts is capped.
"""

import errno

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

from qcowfs.clib.ext2fs cimport *

from qcowfs.limits import MAX_EXT_DIRECTORY, MAX_EXT_RUNS

cdef uint64_t RUNS = MAX_EXT_RUNS
cdef uint64_t NAMES = MAX_EXT_DIRECTORY
cdef object opening = None  # the Device that ext2fs_open2 is about to ask for: it passes only a name on


cdef errcode_t io_open(const char *name, int flags, io_channel *channel) noexcept with gil:
    cdef io_channel made = <io_channel>calloc(1, sizeof(struct_io_channel))
    if made == NULL:
        return EXT2_ET_NO_MEMORY
    made.magic = EXT2_ET_MAGIC_IO_CHANNEL
    made.manager = &manager
    made.name = <char *>b"volume"
    made.block_size = 1024
    made.refcount = 1
    made.private_data = <void *>opening
    channel[0] = made
    return 0


cdef errcode_t io_close(io_channel channel) noexcept nogil:
    channel.refcount -= 1
    if channel.refcount <= 0:
        free(channel)
    return 0


cdef errcode_t io_set_blksize(io_channel channel, int size) noexcept nogil:
    channel.block_size = size
    return 0


cdef errcode_t io_read64(io_channel channel, unsigned long long block, int count, void *data) noexcept with gil:
    cdef uint64_t length = <uint64_t>(-<int64_t>count) if count < 0 else <uint64_t>count * <uint64_t>channel.block_size
    try:
        found = (<object>channel.private_data).read(int(block) * channel.block_size, length)
        if <uint64_t>len(found) != length:
            return EXT2_ET_SHORT_READ
        memcpy(data, <char *>(<bytes>found), length)
    except Exception:
        return EXT2_ET_SHORT_READ
    return 0


cdef errcode_t io_read(io_channel channel, unsigned long block, int count, void *data) noexcept nogil:
    return io_read64(channel, block, count, data)


cdef errcode_t io_write(io_channel channel, unsigned long block, int count, const void *data) noexcept nogil:
    return EXT2_ET_RO_FILSYS


cdef errcode_t io_write64(io_channel channel, unsigned long long block, int count, const void *data) noexcept nogil:
    return EXT2_ET_RO_FILSYS


cdef errcode_t io_flush(io_channel channel) noexcept nogil:
    return 0


initialize_ext2_error_table()

cdef struct_io_manager manager
manager.magic = EXT2_ET_MAGIC_IO_MANAGER
manager.name = b"qcowfs"
manager.open = io_open
manager.close = io_close
manager.set_blksize = io_set_blksize
manager.read_blk = io_read
manager.read_blk64 = io_read64
manager.write_blk = io_write
manager.write_blk64 = io_write64
manager.flush = io_flush


cdef int take_name(ext2_ino_t directory, int kind, ext2_dir_entry *entry, int offset, int size, char *block,
                   void *data) noexcept with gil:
    names = <list>data
    if <uint64_t>len(names) >= NAMES:
        return DIRENT_ABORT
    cdef const char *text = <const char *>entry + 8
    name = text[:ext2fs_dirent_name_len(entry)]
    if entry.inode and name and name not in (b".", b"..") and b"/" not in name and b"\0" not in name:
        names.append((name, entry.inode, ext2fs_dirent_file_type(entry)))
    return 0


cdef int take_xattr(char *name, char *value, size_t length, void *data) noexcept with gil:
    (<dict>data)[<bytes>name] = value[:<Py_ssize_t>length] if length else b""
    return 0


cdef struct runs_t:
    uint64_t start
    uint64_t length
    uint64_t block
    uint64_t count
    void *found


cdef int take_block(ext2_filsys fs, blk64_t *block, e2_blkcnt_t number, blk64_t parent, int offset,
                    void *data) noexcept with gil:
    cdef runs_t *runs = <runs_t *>data
    if runs.length and runs.start + runs.length == <uint64_t>number and runs.block + runs.length == block[0]:
        runs.length += 1
        return 0
    if runs.length:
        (<list>runs.found).append((runs.start, runs.length, runs.block))
    runs.start, runs.length, runs.block = <uint64_t>number, 1, block[0]
    runs.count += 1
    return BLOCK_ABORT if runs.count > RUNS else 0


cdef int check(errcode_t code, str what) except -1:
    if code:
        raise OSError(errno.EIO, f"{what}: {(<bytes>error_message(code)).decode()}")
    return 0


cdef class Filesystem:
    """An ext2, ext3 or ext4 on a Device. Raises OSError where it cannot be opened."""

    cdef ext2_filsys fs
    cdef object device

    def __cinit__(self, device):
        global opening
        self.device = opening = device
        try:
            check(ext2fs_open2(b"volume", NULL, EXT2_FLAG_64BITS | EXT2_FLAG_SKIP_MMP, 0, 0, &manager, &self.fs),
                  "superblock")
        finally:
            opening = None

    def __dealloc__(self):
        if self.fs != NULL:
            ext2fs_free(self.fs)

    @property
    def block_size(self):
        return self.fs.blocksize

    @property
    def clean(self):
        return bool(self.fs.super.s_state & 1)

    @property
    def features(self):
        """The incompatible and the read-only compatible ones, as bits."""
        return self.fs.super.s_feature_incompat, self.fs.super.s_feature_ro_compat

    def inode(self, ino: int) -> bytes:
        """Return the inode as stored."""
        cdef int size = EXT2_INODE_SIZE(self.fs.super)
        raw = bytearray(size)
        check(ext2fs_read_inode2(self.fs, ino, <ext2_inode *><char *>raw, size, 0), f"inode {ino}")
        return bytes(raw)

    def names(self, ino: int) -> list:
        """Return (name, inode number, type or 0) of what the directory `ino` holds, as stored."""
        found = []
        check(ext2fs_dir_iterate2(self.fs, ino, 0, NULL, take_name, <void *>found), f"directory {ino}")
        if <uint64_t>len(found) >= NAMES:
            raise OSError(errno.EIO, f"directory {ino}: too many names")
        return found

    def xattrs(self, ino: int) -> dict:
        """Return the extended attributes; ACLs in ext4's own form."""
        cdef ext2_xattr_handle *handle = NULL
        found = {}
        check(ext2fs_xattrs_open(self.fs, ino, &handle), f"xattrs of inode {ino}")
        try:
            check(ext2fs_xattrs_read(handle), f"xattrs of inode {ino}")
            check(ext2fs_xattrs_iterate(handle, take_xattr, <void *>found), f"xattrs of inode {ino}")
        finally:
            ext2fs_xattrs_close(&handle)
        return found

    def inline(self, ino: int) -> bytes:
        """Return the data that is stored in the inode."""
        cdef size_t size = 0
        check(ext2fs_inline_data_size(self.fs, ino, &size), f"inode {ino}")
        if size > 65536:
            raise OSError(errno.EIO, f"inode {ino}: more inline data than an inode holds")
        data = bytearray(size)
        check(ext2fs_inline_data_get(self.fs, ino, NULL, <char *>data, &size), f"inode {ino}")
        return bytes(data[:<Py_ssize_t>size])

    def leaves(self, ino: int) -> list:
        """Return (first block of the file, blocks, first block of the volume) of what the extent tree stores."""
        cdef ext2_extent_handle_t handle = NULL
        cdef ext2fs_extent extent
        cdef errcode_t code
        cdef uint64_t count = 0
        found = []
        check(ext2fs_extent_open2(self.fs, ino, NULL, &handle), f"extents of inode {ino}")
        try:
            code = ext2fs_extent_get(handle, EXT2_EXTENT_ROOT, &extent)
            while code != EXT2_ET_EXTENT_NO_NEXT:
                check(code, f"extents of inode {ino}")
                count += 1
                if count > RUNS:
                    raise OSError(errno.EIO, f"inode {ino}: too many extents")
                # The root of a tree without index blocks is a leaf already.
                if extent.e_flags & <uint32_t>EXT2_EXTENT_FLAGS_LEAF and not (
                        extent.e_flags & <uint32_t>EXT2_EXTENT_FLAGS_UNINIT):
                    found.append((extent.e_lblk, extent.e_len, extent.e_pblk))
                code = ext2fs_extent_get(handle, EXT2_EXTENT_NEXT_LEAF, &extent)
            return found
        finally:
            ext2fs_extent_free(handle)

    def blocks(self, ino: int) -> list:
        """Return the same of a map of indirect blocks."""
        found = []
        cdef runs_t runs = runs_t(0, 0, 0, 0, <void *>found)
        check(ext2fs_block_iterate3(self.fs, ino, BLOCK_FLAG_DATA_ONLY | BLOCK_FLAG_READ_ONLY, NULL, take_block, &runs),
              f"blocks of inode {ino}")
        if runs.count > RUNS:
            raise OSError(errno.EIO, f"inode {ino}: too many runs of blocks")
        if runs.length:
            found.append((runs.start, runs.length, runs.block))
        return found

# cython: language_level=3, cdivision=True
# distutils: libraries = ext2fs com_err
"""Inodes of ext2, ext3 and ext4, by libext2fs over a Device; only ever read.

Used by _extmap, _extdir and inside/ext.py, in a worker, in one thread. Every error is an OSError.
"""

import errno
from array import array

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from qcowfs._records cimport RECORD_NO_XATTRS, inode_record_t
from qcowfs.clib.ext2fs cimport *

from qcowfs.limits import EXT_BLOCKS, MAX_EXT_XATTRS

cdef enum:
    OLD_INODE = 128  # bytes; what is longer has i_extra_isize next
    OLD_EXTRA = 32  # what the kernel takes for i_extra_isize where that is 0
    XATTR_MAGIC = 0xEA020000
    MOST_INLINE = 65536  # bytes: no inode is larger than a block
    LAST_NANOSECOND = 999999999
    TYPES = 0x1556  # a bit for each S_IFMT >> 12 that there is: fifo, chr, dir, blk, reg, lnk, sock
    CHARACTER = 0x2
    BLOCK = 0x6
    REGULAR = 0x8
    LINK = 0xA
    LINK_LENGTH = 2  # bytes before an encrypted target
    HUGE_FILE = 0x40000
    RO_COMPAT_HUGE_FILE = 0x8
    INCOMPAT_EA_INODE = 0x400
    INCOMPAT_LARGEDIR = 0x4000

cdef uint64_t LAST_BYTE = <uint64_t>1 << 62
cdef size_t HELD = EXT_BLOCKS
cdef size_t XATTRS = MAX_EXT_XATTRS
cdef object opening = None  # the Device that ext2fs_open2 is about to ask for: it passes only a name on


cdef struct volume_t:
    # What a channel reads, and the blocks that it read last, each in the one place that its number has.
    void *device
    uint64_t slots
    uint64_t *numbers  # of the blocks that are held, and 1 more; 0 if there is none
    char *blocks


cdef errcode_t io_open(const char *name, int flags, io_channel *channel) noexcept with gil:
    cdef io_channel made = <io_channel>calloc(1, sizeof(struct_io_channel))
    cdef volume_t *volume = <volume_t *>calloc(1, sizeof(volume_t))
    if made == NULL or volume == NULL:
        free(made)
        free(volume)
        return EXT2_ET_NO_MEMORY
    volume.device = <void *>opening
    made.magic = EXT2_ET_MAGIC_IO_CHANNEL
    made.manager = &manager
    made.name = <char *>b"volume"
    made.block_size = 1024
    made.refcount = 1
    made.private_data = volume
    channel[0] = made
    return 0


cdef void hold_nothing(volume_t *volume) noexcept nogil:
    free(volume.numbers)
    free(volume.blocks)
    volume.numbers = NULL
    volume.blocks = NULL
    volume.slots = 0


cdef errcode_t io_close(io_channel channel) noexcept nogil:
    channel.refcount -= 1
    if channel.refcount <= 0:
        hold_nothing(<volume_t *>channel.private_data)
        free(channel.private_data)
        free(channel)
    return 0


cdef errcode_t io_set_blksize(io_channel channel, int size) noexcept nogil:
    cdef volume_t *volume = <volume_t *>channel.private_data
    channel.block_size = size
    hold_nothing(volume)
    volume.numbers = <uint64_t *>calloc(HELD // <size_t>size, sizeof(uint64_t))
    volume.blocks = <char *>malloc(HELD)
    if volume.numbers == NULL or volume.blocks == NULL:
        hold_nothing(volume)
        return EXT2_ET_NO_MEMORY
    volume.slots = HELD // <size_t>size
    return 0


cdef errcode_t io_read64(io_channel channel, unsigned long long block, int count, void *data) noexcept with gil:
    cdef volume_t *volume = <volume_t *>channel.private_data
    cdef uint64_t size = <uint64_t>channel.block_size
    cdef uint64_t slot
    if block > LAST_BYTE // size:
        return EXT2_ET_SHORT_READ
    if count != 1 or volume.slots == 0:  # if less than 0, they are bytes
        return read_bytes(volume, block * size, <uint64_t>(-count) if count < 0 else size * <uint64_t>count, data)
    slot = block % volume.slots
    if volume.numbers[slot] != block + 1:
        volume.numbers[slot] = 0
        if read_bytes(volume, block * size, size, volume.blocks + slot * size):
            return EXT2_ET_SHORT_READ
        volume.numbers[slot] = block + 1
    memcpy(data, volume.blocks + slot * size, size)
    return 0


cdef errcode_t read_bytes(volume_t *volume, uint64_t offset, uint64_t length, void *data) noexcept:
    try:
        found = (<object>volume.device).read(offset, length)
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


cdef struct xattrs_t:
    void *found
    size_t left  # bytes that they may still take
    bint too_many


cdef int take_xattr(char *name, char *value, size_t length, void *data) noexcept with gil:
    cdef xattrs_t *xattrs = <xattrs_t *>data
    if length > xattrs.left:
        xattrs.too_many = True
        return XATTR_ABORT
    xattrs.left -= length
    (<dict>xattrs.found)[<bytes>name] = value[:<Py_ssize_t>length] if length else b""
    return 0


cdef int check(errcode_t code, str what) except -1:
    if code:
        raise OSError(errno.EIO, f"{what}: {(<bytes>error_message(code)).decode()}")
    return 0


cdef int64_t seconds(const uint8_t *stored, const uint8_t *extra) noexcept:
    """Return a time; `extra`, of which two bits are above those 32, is NULL where the inode has none."""
    return <int32_t>le32(stored) + (<int64_t>(extra[0] & 3) << 32 if extra != NULL else 0)


cdef uint32_t nanoseconds(const uint8_t *extra) noexcept:
    return min(<uint32_t>(le32(extra) >> 2), <uint32_t>LAST_NANOSECOND) if extra != NULL else <uint32_t>0


cdef uint64_t size_without_key(uint64_t stored) noexcept:
    """Return how long an encrypted target is as Linux shows it without the key."""
    cdef uint64_t length = stored - LINK_LENGTH if stored > LINK_LENGTH else 0
    cdef uint64_t told = min(length, <uint64_t>NOKEY_BYTES) + NOKEY_HASHES
    if length > NOKEY_BYTES:
        told += NOKEY_DIGEST
    return (4 * told + 2) // 3


cdef class Filesystem:
    """An ext2, ext3 or ext4 on a Device. Raises OSError where it cannot be opened."""

    def __cinit__(self, device, uint64_t[::1] covered=None):
        global opening
        self.device = opening = device
        self.covered = covered
        self.suspects = None
        try:
            check(ext2fs_open2(b"volume", NULL, EXT2_FLAG_64BITS | EXT2_FLAG_SKIP_MMP, 0, 0, &manager, &self.fs),
                  "superblock")
        finally:
            opening = None
        self.inode_size = <uint32_t>EXT2_INODE_SIZE(self.fs.super)
        self.blocks = <uint64_t>device.size // self.fs.blocksize
        self.raw = <uint8_t *>malloc(self.inode_size)
        if self.raw == NULL:
            raise MemoryError

    def __dealloc__(self):
        free(self.raw)
        if self.fs != NULL:
            ext2fs_free(self.fs)

    @property
    def block_size(self):
        return self.fs.blocksize

    @property
    def cluster_size(self):
        return self.fs.blocksize << self.fs.cluster_ratio_bits

    @property
    def has_ea_inodes(self):
        return bool(self.fs.super.s_feature_incompat & <uint32_t>INCOMPAT_EA_INODE)

    @property
    def clean(self):
        return bool(self.fs.super.s_state & 1)

    @property
    def inode_tables(self):
        """The block where the inodes of each group begin: 8 bytes each, little-endian."""
        cdef uint32_t group
        tables = array("Q", bytes(8 * self.fs.group_desc_count))
        cdef uint64_t[::1] blocks = tables
        for group in range(self.fs.group_desc_count):
            blocks[group] = ext2fs_inode_table_loc(self.fs, group)
        return tables.tobytes()

    def suspect(self, uint64_t[::1] ranges):
        """Take what another state of the volume may have other bytes in: start and end of each range, in order."""
        self.suspects = ranges

    def stat(self, uint32_t ino) -> bytes:
        """Return the bytes of record.INODE."""
        cdef inode_record_t told
        self.read(ino, &told)
        return (<const char *>&told)[:sizeof(told)]

    def inode(self, uint32_t ino) -> bytes:
        """Return the inode as stored, if it is one."""
        cdef inode_record_t told
        self.read(ino, &told)
        return (<const char *>self.raw)[:self.inode_size]

    def xattrs(self, uint32_t ino) -> dict:
        """Return the extended attributes; ACLs in ext4's own form."""
        cdef ext2_xattr_handle *handle = NULL
        cdef inode_record_t told
        found = {}
        self.read(ino, &told)  # a damaged one must not come to the library's cache another way
        cdef xattrs_t xattrs = xattrs_t(<void *>found, XATTRS, False)
        check(ext2fs_xattrs_open(self.fs, ino, &handle), f"xattrs of inode {ino}")
        try:
            check(ext2fs_xattrs_read(handle), f"xattrs of inode {ino}")
            check(ext2fs_xattrs_iterate(handle, take_xattr, &xattrs), f"xattrs of inode {ino}")
        finally:
            ext2fs_xattrs_close(&handle)
        if xattrs.too_many:
            raise OSError(errno.E2BIG, f"inode {ino}: more than {XATTRS} bytes of extended attributes")
        return found

    def inline(self, uint32_t ino) -> bytes:
        """Return the data that is stored in the inode."""
        cdef size_t size = 0
        check(ext2fs_inline_data_size(self.fs, ino, &size), f"inode {ino}")
        if size > MOST_INLINE:
            raise OSError(errno.EIO, f"inode {ino}: more inline data than an inode holds")
        data = bytearray(size)
        check(ext2fs_inline_data_get(self.fs, ino, NULL, <char *>data, &size), f"inode {ino}")
        return bytes(data[:<Py_ssize_t>size])

    cdef int read(self, uint32_t ino, inode_record_t *told) except -1:
        """Do what `load` does, and raise OSError if anything is wrong."""
        cdef const char *wrong = self.load(ino, told)
        if wrong != NULL:
            raise OSError(errno.EIO, f"inode {ino}: {(<bytes>wrong).decode()}")
        return 0

    cdef int read_block(self, uint64_t block, void *data) except -1:
        self.met_suspect = self.met_suspect or self.is_suspect(block * self.fs.blocksize, self.fs.blocksize)
        return check(io_channel_read_blk64(self.fs.io, block, 1, data), f"block {block}")

    cdef bint is_covered(self, uint64_t block, uint64_t length) noexcept:
        """Return whether any of these blocks is stored elsewhere."""
        cdef Py_ssize_t low = 0, high = 0 if self.covered is None else self.covered.shape[0]
        cdef Py_ssize_t end = high, middle
        while low < high:
            middle = (low + high) // 2
            if self.covered[middle] < block:
                low = middle + 1
            else:
                high = middle
        return low < end and self.covered[low] < block + length

    cdef bint is_suspect(self, uint64_t offset, uint64_t length) noexcept:
        """Return whether some of these bytes may be others."""
        cdef Py_ssize_t low = 0, high = 0 if self.suspects is None else self.suspects.shape[0] // 2
        cdef Py_ssize_t count = high, middle
        while low < high:
            middle = (low + high) // 2
            if self.suspects[2 * middle + 1] <= offset:
                low = middle + 1
            else:
                high = middle
        return low < count and self.suspects[2 * low] < offset + length

    cdef bint is_suspect_inode(self, uint32_t ino) noexcept:
        """Return whether some of the bytes of an inode may be others."""
        cdef uint32_t group = (ino - 1) // self.fs.super.s_inodes_per_group
        cdef uint64_t index = (ino - 1) % self.fs.super.s_inodes_per_group
        cdef uint64_t table
        if ino == 0 or group >= self.fs.group_desc_count:
            return True
        table = ext2fs_inode_table_loc(self.fs, group) * self.fs.blocksize
        return self.is_suspect(table + index * self.inode_size, self.inode_size)

    cdef const char *load(self, uint32_t ino, inode_record_t *told) noexcept:
        """Read an inode to `raw` and tell of it; return what is wrong with it, or NULL."""
        cdef errcode_t code = ext2fs_read_inode2(self.fs, ino, <ext2_inode *>self.raw, <int>self.inode_size, 0)
        cdef const uint8_t *raw = self.raw
        if code:
            # It is in the library's cache all the same, under the number of an inode that was there before.
            ext2fs_flush_icache(self.fs)
            return error_message(code)
        memset(told, 0, sizeof(told[0]))
        told.ino = ino
        told.mode = le16(raw)
        told.nlink = le16(raw + 26)
        if told.nlink == 0:
            return b"it is deleted"
        if not <uint32_t>TYPES >> (told.mode >> 12) & 1:
            return b"no type of file has the number that its mode says"
        told.uid = le16(raw + 2) | <uint32_t>le16(raw + 120) << 16
        told.gid = le16(raw + 24) | <uint32_t>le16(raw + 122) << 16
        if told.mode >> 12 == CHARACTER or told.mode >> 12 == BLOCK:
            told.rdev = le16(raw + INODE_BLOCK) if le32(raw + INODE_BLOCK) else le32(raw + INODE_BLOCK + 4)
        self.tell_size(told)
        if told.size >> 63 or told.blocks >> 54:
            return b"its size is none that a file can have"
        return self.tell_extra(told)

    cdef void tell_size(self, inode_record_t *told) noexcept:
        cdef const uint8_t *raw = self.raw
        cdef uint32_t flags = le32(raw + INODE_FLAGS)
        told.size = le32(raw + 4)
        if told.mode >> 12 == REGULAR or self.fs.super.s_feature_incompat & <uint32_t>INCOMPAT_LARGEDIR:
            told.size |= <uint64_t>le32(raw + 108) << 32
        if told.mode >> 12 == LINK and flags & <uint32_t>FLAG_ENCRYPTED:
            told.size = size_without_key(told.size)
        told.blocks = le32(raw + 28)
        if self.fs.super.s_feature_ro_compat & <uint32_t>RO_COMPAT_HUGE_FILE:
            told.blocks |= <uint64_t>le16(raw + 116) << 32
            if flags & <uint32_t>HUGE_FILE:
                told.blocks *= self.fs.blocksize // 512
        if told.mode >> 12 == REGULAR and flags & <uint32_t>FLAG_INLINE_DATA:
            told.blocks += told.size // 512 + (told.size % 512 != 0)  # as the kernel does, lest it be taken for empty

    cdef const char *tell_extra(self, inode_record_t *told) noexcept:
        """Tell what depends on how long the inode is: times, and whether it has extended attributes."""
        cdef const uint8_t *raw = self.raw
        cdef uint32_t extra = le16(raw + OLD_INODE) if self.inode_size > OLD_INODE else 0
        cdef uint32_t end = OLD_INODE
        cdef bint bare = not le32(raw + 104) and not le16(raw + 118)
        if extra & 3 or OLD_INODE + extra > self.inode_size:
            return b"its extra fields are longer than it is"
        if self.inode_size > OLD_INODE:
            end += extra or <uint32_t>OLD_EXTRA
        if extra and end + 4 <= self.inode_size and le32(raw + end) == <uint32_t>XATTR_MAGIC:
            bare = False
        told.flags = RECORD_NO_XATTRS if bare else 0
        cdef const uint8_t *atime = raw + 140 if end >= 144 else NULL
        cdef const uint8_t *ctime = raw + 132 if end >= 136 else NULL
        cdef const uint8_t *mtime = raw + 136 if end >= 140 else NULL
        told.atime, told.atime_ns = seconds(raw + 8, atime), nanoseconds(atime)
        told.ctime, told.ctime_ns = seconds(raw + 12, ctime), nanoseconds(ctime)
        told.mtime, told.mtime_ns = seconds(raw + 16, mtime), nanoseconds(mtime)
        return NULL

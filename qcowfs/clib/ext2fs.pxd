# libext2fs, as far as _ext2 uses it.

from libc.stdint cimport int64_t, uint16_t, uint32_t, uint64_t, uint8_t

cdef extern from "ext2fs/ext2fs.h" nogil:
    ctypedef long errcode_t
    ctypedef struct_io_channel *io_channel
    ctypedef struct_io_manager *io_manager
    ctypedef uint32_t ext2_ino_t
    ctypedef unsigned long long blk64_t
    ctypedef long long e2_blkcnt_t

    ctypedef struct struct_io_channel "struct struct_io_channel":
        errcode_t magic
        io_manager manager
        char *name
        int block_size
        int refcount
        void *private_data

    ctypedef struct struct_io_manager "struct struct_io_manager":
        errcode_t magic
        const char *name
        errcode_t (*open)(const char *, int, io_channel *) noexcept
        errcode_t (*close)(io_channel) noexcept
        errcode_t (*set_blksize)(io_channel, int) noexcept
        errcode_t (*read_blk)(io_channel, unsigned long, int, void *) noexcept
        errcode_t (*write_blk)(io_channel, unsigned long, int, const void *) noexcept
        errcode_t (*flush)(io_channel) noexcept
        errcode_t (*read_blk64)(io_channel, unsigned long long, int, void *) noexcept
        errcode_t (*write_blk64)(io_channel, unsigned long long, int, const void *) noexcept

    ctypedef struct ext2_super_block "struct ext2_super_block":
        uint16_t s_state
        uint32_t s_feature_ro_compat
        uint32_t s_feature_incompat

    ctypedef struct struct_ext2_filsys "struct struct_ext2_filsys":
        ext2_super_block *super
        unsigned int blocksize
    ctypedef struct_ext2_filsys *ext2_filsys

    ctypedef struct ext2_inode "struct ext2_inode":
        pass

    ctypedef struct ext2_dir_entry "struct ext2_dir_entry":
        uint32_t inode
        char *name

    ctypedef struct ext2fs_extent "struct ext2fs_extent":
        uint64_t e_pblk
        uint64_t e_lblk
        uint32_t e_len
        uint32_t e_flags
    ctypedef void *ext2_extent_handle_t
    ctypedef struct ext2_xattr_handle "struct ext2_xattr_handle":
        pass

    int EXT2_FLAG_64BITS, EXT2_FLAG_SKIP_MMP
    int EXT2_EXTENT_ROOT, EXT2_EXTENT_NEXT_LEAF, EXT2_EXTENT_FLAGS_UNINIT, EXT2_EXTENT_FLAGS_LEAF
    int BLOCK_FLAG_DATA_ONLY, BLOCK_FLAG_READ_ONLY, BLOCK_ABORT, DIRENT_ABORT
    errcode_t EXT2_ET_MAGIC_IO_MANAGER, EXT2_ET_MAGIC_IO_CHANNEL, EXT2_ET_EXTENT_NO_NEXT, EXT2_ET_NO_MEMORY
    errcode_t EXT2_ET_SHORT_READ, EXT2_ET_RO_FILSYS
    int EXT2_INODE_SIZE(ext2_super_block *)

    int ext2fs_dirent_name_len(const ext2_dir_entry *)
    int ext2fs_dirent_file_type(const ext2_dir_entry *)
    errcode_t ext2fs_open2(const char *, const char *, int, int, unsigned int, io_manager, ext2_filsys *)
    void ext2fs_free(ext2_filsys)
    errcode_t ext2fs_read_inode2(ext2_filsys, ext2_ino_t, ext2_inode *, int, int)
    errcode_t ext2fs_dir_iterate2(
        ext2_filsys, ext2_ino_t, int, char *,
        int (*)(ext2_ino_t, int, ext2_dir_entry *, int, int, char *, void *) noexcept, void *)
    errcode_t ext2fs_block_iterate3(
        ext2_filsys, ext2_ino_t, int, char *,
        int (*)(ext2_filsys, blk64_t *, e2_blkcnt_t, blk64_t, int, void *) noexcept, void *)
    errcode_t ext2fs_extent_open2(ext2_filsys, ext2_ino_t, ext2_inode *, ext2_extent_handle_t *)
    errcode_t ext2fs_extent_get(ext2_extent_handle_t, int, ext2fs_extent *)
    void ext2fs_extent_free(ext2_extent_handle_t)
    errcode_t ext2fs_inline_data_size(ext2_filsys, ext2_ino_t, size_t *)
    errcode_t ext2fs_inline_data_get(ext2_filsys, ext2_ino_t, ext2_inode *, void *, size_t *)
    errcode_t ext2fs_xattrs_open(ext2_filsys, ext2_ino_t, ext2_xattr_handle **)
    errcode_t ext2fs_xattrs_read(ext2_xattr_handle *)
    errcode_t ext2fs_xattrs_iterate(ext2_xattr_handle *, int (*)(char *, char *, size_t, void *) noexcept, void *)
    errcode_t ext2fs_xattrs_close(ext2_xattr_handle **)

cdef extern from "et/com_err.h" nogil:
    const char *error_message(errcode_t)

cdef extern from "ext2fs/ext2_err.h" nogil:
    void initialize_ext2_error_table()

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
        uint32_t s_feature_compat
        uint32_t s_feature_ro_compat
        uint32_t s_feature_incompat
        uint32_t s_flags
        uint32_t s_inodes_count
        uint32_t s_inodes_per_group
        uint32_t s_hash_seed[4]
        uint8_t s_def_hash_version

    ctypedef struct struct_ext2_filsys "struct struct_ext2_filsys":
        io_channel io
        ext2_super_block *super
        unsigned int blocksize
        int cluster_ratio_bits
        uint32_t group_desc_count
    ctypedef struct_ext2_filsys *ext2_filsys

    ctypedef struct ext2_inode "struct ext2_inode":
        pass

    ctypedef struct ext2_dir_entry "struct ext2_dir_entry":
        pass

    ctypedef struct ext3_extent_header "struct ext3_extent_header":
        pass

    ctypedef struct ext2_xattr_handle "struct ext2_xattr_handle":
        pass

    int EXT2_FLAG_64BITS, EXT2_FLAG_SKIP_MMP, XATTR_ABORT
    errcode_t EXT2_ET_MAGIC_IO_MANAGER, EXT2_ET_MAGIC_IO_CHANNEL, EXT2_ET_NO_MEMORY
    errcode_t EXT2_ET_SHORT_READ, EXT2_ET_RO_FILSYS
    errcode_t io_channel_read_blk64(io_channel, unsigned long long, int, void *)
    int ext2fs_dir_block_csum_verify(ext2_filsys, ext2_ino_t, ext2_dir_entry *)
    int ext2fs_extent_block_csum_verify(ext2_filsys, ext2_ino_t, ext3_extent_header *)
    errcode_t ext2fs_dirhash(int, const char *, int, const uint32_t *, uint32_t *, uint32_t *)
    int EXT2_INODE_SIZE(ext2_super_block *)
    blk64_t ext2fs_inode_table_loc(ext2_filsys, uint32_t)

    errcode_t ext2fs_open2(const char *, const char *, int, int, unsigned int, io_manager, ext2_filsys *)
    void ext2fs_free(ext2_filsys)
    errcode_t ext2fs_flush_icache(ext2_filsys)
    errcode_t ext2fs_read_inode2(ext2_filsys, ext2_ino_t, ext2_inode *, int, int)
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

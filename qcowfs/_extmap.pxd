# Where the blocks of a file are.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._ext2 cimport Filesystem
from qcowfs._records cimport extent_record_t, inode_record_t

cdef enum:
    FEW_EXTENTS = 4

cdef struct run_t:
    # Blocks that lie one after the other, in the file and in the volume.
    uint64_t start
    uint64_t length
    uint64_t block

cdef struct runs_t:
    # What is known of a file's map from a block on.
    run_t *found
    uint64_t count
    uint64_t limit  # of `found`
    uint64_t first  # block of the file that was asked for
    uint64_t end  # of the file, in blocks
    uint64_t known  # up to this block of the file all runs are in `found`
    uint64_t floor  # before this block of the file no further run may start
    uint64_t budget  # extents, and KiB of the map's blocks, that may still be looked at

cdef int read_runs(Filesystem volume, uint32_t ino, runs_t *runs) except -1
cdef uint32_t few_extents(Filesystem volume, const inode_record_t *told, extent_record_t *found) noexcept

# Two disks, and what of them is the same without a look at the data.

from libc.stdint cimport uint32_t, uint64_t

from qcowfs._core cimport Disk
from qcowfs._resolve cimport disk_t, resolved_t


cdef struct files_t:
    # Numbers of one layer's files: equal where the bytes are those of the same file.
    uint32_t source
    uint32_t data


cdef struct pair_t:
    disk_t* old
    disk_t* new
    files_t* old_files  # for each layer
    files_t* new_files
    uint32_t tail  # how many layers at the end of both chains are the same, in the same state
    bint kin  # the layers just above the tail have the same files and geometry: what equal tables say is equal
    uint64_t end  # bytes of the larger disk


cdef struct tables_t:
    # Host offsets of an L2 table of each.
    uint64_t old
    uint64_t new


# Fill in `pair`, which is all zero or was made before. Raises OSError if the status of a file cannot be had. Whoever
# has it keeps the disks alive, and frees it in the end.
cdef int pair_make(pair_t* pair, Disk old, Disk new) except -1
cdef void pair_free(pair_t* pair) noexcept nogil

# Is the rest of both chains the same from `offset` on, by the L1 tables? `length` is cut down to what that is said of.
# If not, `tables` has the L2 tables of that range if equal entries of them mean the same; else both are 0.
cdef bint pair_shares(const pair_t* pair, uint64_t offset, uint64_t* length, tables_t* tables) noexcept nogil

# Bytes from `offset` on for which `tables` have equal entries; 0 if there are none.
cdef uint64_t pair_equal_entries(const pair_t* pair, const tables_t* tables, uint64_t offset) noexcept nogil

# Do two answers mean the same bytes of the host, or zeros? Both are about the same guest offset.
cdef bint pair_same_place(const pair_t* pair, const resolved_t* old, const resolved_t* new) noexcept nogil

cdef bint is_zero(const resolved_t* resolved) noexcept nogil

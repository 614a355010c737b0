# cython: language_level=3, cdivision=True
# distutils: libraries = ext2fs com_err
"""Where the bytes of a file of ext are: extent trees, and the older maps of indirect blocks.

Used by _extdir and inside/ext.py, in a worker, in one thread. A map is never held: a request walks from the place that
is asked for, and a budget ends it early, so that neither a file of terabytes nor a forged tree takes memory or time.
"""

import errno

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy

from qcowfs._ext2 cimport (
    FLAG_ENCRYPTED, FLAG_EXTENTS, FLAG_INLINE_DATA, INODE_BLOCK, INODE_BLOCK_SIZE, INODE_FLAGS, Filesystem,
    le16, le32,
)
from qcowfs._records cimport RECORD_UNMAPPED, extent_record_t, inode_record_t
from qcowfs.clib.ext2fs cimport *

from qcowfs.limits import INSIDE_EXTENTS, MAX_EXT_MAP

cdef uint64_t MOST_EXTENTS = INSIDE_EXTENTS
cdef uint64_t BUDGET = MAX_EXT_MAP

cdef enum:
    DIRECT = 12  # blocks that an inode without an extent tree names itself; three of indirect blocks follow
    EXTENT_MAGIC = 0xF30A
    DEEPEST = 5  # EXT4_MAX_EXTENT_DEPTH
    EXTENT = 12  # bytes of an extent, of an index of others, and of the head of a node
    KIB = 1024
    LONGEST_EXTENT = 32768  # blocks; a larger number is that of an unwritten one


cdef bint add(runs_t *runs, uint64_t start, uint64_t length, uint64_t block) noexcept:
    """Add a run to what is found; return whether there is room for it."""
    cdef run_t *last = &runs.found[runs.count - 1] if runs.count else NULL
    if last != NULL and last.start + last.length == start and last.block + last.length == block:
        last.length += length
        return True
    if runs.count == runs.limit:
        runs.known = start
        return False
    runs.found[runs.count] = run_t(start, length, block)
    runs.count += 1
    return True


cdef bint spend(runs_t *runs, uint64_t cost, uint64_t known) noexcept:
    """Take `cost` from the budget; return whether it lasts. If not, the map is known up to the block `known`."""
    if runs.budget < cost:
        runs.known = known
        return False
    runs.budget -= cost
    return True


cdef int refuse(uint32_t ino, str what) except -1:
    raise OSError(errno.EIO, f"inode {ino}: {what}")


cdef int check_leaf(Filesystem volume, uint32_t ino, const uint8_t *at, uint32_t count, uint64_t floor) except -1:
    """Raise OSError unless these are extents one after the other; one that is wrong makes the others doubtful."""
    cdef uint64_t length, block
    for _ in range(count):
        length, block = written(at), block_of(at)
        if le32(at) < floor or le16(at + 4) == 0:
            refuse(ino, "an extent overlaps another")
        if block == 0 or block + length > volume.blocks:
            refuse(ino, "an extent lies outside the volume")
        floor = le32(at) + length
        at += EXTENT
    return 0


cdef uint64_t written(const uint8_t *at) noexcept:
    """Return how many blocks an extent has, be they written or not."""
    cdef uint64_t stored = le16(at + 4)
    return stored - LONGEST_EXTENT if stored > LONGEST_EXTENT else stored


cdef uint64_t block_of(const uint8_t *at) noexcept:
    return le32(at + 8) | <uint64_t>le16(at + 6) << 32


cdef int read_leaf(Filesystem volume, uint32_t ino, runs_t *runs, const uint8_t *at, uint32_t count) except -1:
    """Take `count` extents; return 0 to go on."""
    check_leaf(volume, ino, at, count, runs.floor)
    for _ in range(count):
        if le32(at) >= runs.end:
            return 1
        runs.floor = le32(at) + written(at)
        if runs.floor > runs.first:
            if le16(at + 4) <= LONGEST_EXTENT and not add(runs, le32(at), written(at), block_of(at)):
                return 1
            if not spend(runs, 1, runs.floor):
                return 1
        at += EXTENT
    return 0


cdef int read_node(Filesystem volume, uint32_t ino, runs_t *runs, const uint8_t *node, uint32_t depth,
                   uint64_t size) except -1:
    """Take a node of an extent tree of `size` bytes; return 0 to go on."""
    cdef uint32_t count = le16(node + 2), number
    cdef const uint8_t *at = node
    if not is_node(node, depth, size):
        refuse(ino, "a node of its extent tree is damaged")
    if depth == 0:
        return read_leaf(volume, ino, runs, node + EXTENT, count)
    for number in range(count):
        at += EXTENT
        if le32(at) < runs.floor:
            refuse(ino, "its extent tree is not in order")
        if le32(at) >= runs.end:
            return 1
        if number + 1 == count or le32(at + EXTENT) > runs.first:
            if read_child(volume, ino, runs, at, depth - 1):
                return 1
        runs.floor = max(runs.floor, <uint64_t>le32(at) + 1)
    return 0


cdef bint is_node(const uint8_t *node, uint32_t depth, uint64_t size) noexcept:
    cdef uint32_t room = le16(node + 4)
    if le16(node) != EXTENT_MAGIC or le16(node + 6) != depth or depth > DEEPEST:
        return False
    return le16(node + 2) <= room and 0 < room <= size // EXTENT - 1


cdef int read_child(Filesystem volume, uint32_t ino, runs_t *runs, const uint8_t *at, uint32_t depth) except -1:
    cdef uint64_t unit = volume.fs.blocksize
    cdef uint8_t *node
    if not spend(runs, unit // KIB, le32(at)):
        return 1
    node = <uint8_t *>malloc(unit)
    if node == NULL:
        raise MemoryError
    try:
        volume.read_block(le32(at + 4) | <uint64_t>le16(at + 8) << 32, node)
        if is_node(node, depth, unit) and not (  # libext2fs looks for the checksum where the node says that it ends
                ext2fs_extent_block_csum_verify(volume.fs, ino, <ext3_extent_header *>node)):
            refuse(ino, "the checksum of a node of its extent tree is wrong")
        return read_node(volume, ino, runs, node, depth, unit)
    finally:
        free(node)


cdef int read_pointers(Filesystem volume, uint32_t ino, runs_t *runs, const uint8_t *at, uint64_t count, int level,
                       uint64_t start, uint64_t span) except -1:
    """Take `count` numbers of blocks, each for `span` blocks of the file from `start` on; return 0 to go on."""
    cdef uint64_t skipped = min((runs.first - start) // span, count) if runs.first > start else 0
    cdef uint64_t number
    cdef uint32_t block
    for number in range(skipped, count):
        if start + number * span >= runs.end:
            return 1
        block = le32(at + 4 * number)
        if block == 0:
            continue
        if block >= volume.blocks:
            refuse(ino, "a block lies outside the volume")
        if level == 0:
            if not add(runs, start + number, 1, block):
                return 1
        elif read_indirect(volume, ino, runs, block, level - 1, start + number * span, span):
            return 1
    return 0


cdef int read_indirect(Filesystem volume, uint32_t ino, runs_t *runs, uint64_t block, int level, uint64_t start,
                       uint64_t span) except -1:
    cdef uint64_t count = volume.fs.blocksize // 4
    cdef uint8_t *content
    if not spend(runs, volume.fs.blocksize // KIB, start):
        return 1
    content = <uint8_t *>malloc(volume.fs.blocksize)
    if content == NULL:
        raise MemoryError
    try:
        volume.read_block(block, content)
        return read_pointers(volume, ino, runs, content, count, level, start, span // count)
    finally:
        free(content)


cdef int read_map(Filesystem volume, uint32_t ino, runs_t *runs, const uint8_t *block) except -1:
    """Take the i_block of a file without an extent tree."""
    cdef uint64_t start = DIRECT, span = 1
    cdef int level
    if read_pointers(volume, ino, runs, block, DIRECT, 0, 0, 1):
        return 0
    for level in range(1, 4):
        span *= volume.fs.blocksize // 4
        if read_pointers(volume, ino, runs, block + 4 * (DIRECT + level - 1), 1, level, start, span):
            return 0
        start += span
    return 0


cdef int read_runs(Filesystem volume, uint32_t ino, runs_t *runs) except -1:
    """Fill in `found`, `count` and `known` of a file or directory whose inode is loaded; the rest is given.

    What cannot be read raises OSError once it is asked for; what lies before it is found.
    """
    cdef uint8_t block[INODE_BLOCK_SIZE]
    memcpy(block, volume.raw + INODE_BLOCK, INODE_BLOCK_SIZE)
    runs.count = runs.floor = 0
    runs.known = runs.end
    runs.budget = BUDGET
    try:
        if le32(volume.raw + INODE_FLAGS) & <uint32_t>FLAG_EXTENTS:
            return read_node(volume, ino, runs, block, le16(block + 6), INODE_BLOCK_SIZE)
        return read_map(volume, ino, runs, block)
    except OSError:
        if runs.count == 0:
            raise
        runs.known = runs.found[runs.count - 1].start + runs.found[runs.count - 1].length
        return 0


def extents(Filesystem volume, uint32_t ino, uint64_t offset, uint64_t limit):
    """Return (start, length, offset) of extents of a file from `offset` on, and up to where in the file they are all.

    `limit` of them at most; `offset` itself is of the volume.
    """
    cdef inode_record_t told
    cdef runs_t runs
    cdef run_t *run
    cdef uint64_t unit = volume.fs.blocksize, size, number, start, end
    volume.read(ino, &told)
    size = told.size
    runs.limit = min(limit, MOST_EXTENTS)
    runs.first = offset // unit
    runs.end = size // unit + (size % unit != 0)
    runs.found = <run_t *>malloc((runs.limit + 1) * sizeof(run_t))
    if runs.found == NULL:
        raise MemoryError
    try:
        read_runs(volume, ino, &runs)
        found = []
        for number in range(runs.count):
            run = &runs.found[number]
            start = max(run.start * unit, offset)  # or a caller who cuts extents up would get the same ones again
            end = min((run.start + run.length) * unit, size)
            if start < end:
                found.append((start, end - start, run.block * unit + start - run.start * unit))
        return found, min(runs.known * unit, size)
    finally:
        free(runs.found)


cdef uint32_t few_extents(Filesystem volume, const inode_record_t *told, extent_record_t *found) noexcept:
    """Put all extents of a file to `found`, if they are FEW_EXTENTS at most and stand in its inode, which is loaded.

    Return how many they are, or RECORD_UNMAPPED: they are to be asked for, because they are more or not so simple.
    """
    cdef run_t few[FEW_EXTENTS]
    cdef runs_t runs
    cdef uint32_t flags = le32(volume.raw + INODE_FLAGS)
    cdef uint64_t unit = volume.fs.blocksize, number
    if flags & <uint32_t>(FLAG_ENCRYPTED | FLAG_INLINE_DATA):
        return RECORD_UNMAPPED
    runs.found, runs.count, runs.limit, runs.first = few, 0, <uint64_t>FEW_EXTENTS, 0
    runs.end = told.size // unit + (told.size % unit != 0)
    if not (few_leaves(volume, &runs) if flags & <uint32_t>FLAG_EXTENTS else few_pointers(volume, &runs)):
        return RECORD_UNMAPPED
    for number in range(runs.count):
        if few[number].block == 0 or few[number].block + few[number].length > volume.blocks or (
                volume.is_covered(few[number].block, few[number].length)):
            return RECORD_UNMAPPED
        found[number].start = few[number].start * unit
        found[number].length = min(few[number].length * unit, told.size - few[number].start * unit)
        found[number].offset = few[number].block * unit
    return <uint32_t>runs.count


cdef bint few_leaves(Filesystem volume, runs_t *runs) noexcept:
    """Read a tree that is no deeper than its root; return whether that is all, and in order."""
    cdef const uint8_t *at = volume.raw + INODE_BLOCK
    cdef uint32_t count = le16(at + 2)
    cdef uint64_t floor = 0
    if not is_node(at, 0, INODE_BLOCK_SIZE):
        return False
    for _ in range(count):
        at += EXTENT
        if le32(at) < floor or le16(at + 4) == 0:
            return False
        floor = le32(at) + written(at)
        if le32(at) < runs.end and le16(at + 4) <= LONGEST_EXTENT:
            if not add(runs, le32(at), written(at), block_of(at)):
                return False
    return True


cdef bint few_pointers(Filesystem volume, runs_t *runs) noexcept:
    """Read the blocks that an inode without an extent tree names itself; return whether they are all."""
    cdef uint32_t number, block
    if runs.end > DIRECT:
        return False
    for number in range(<uint32_t>runs.end):
        block = le32(volume.raw + INODE_BLOCK + 4 * number)
        if block and not add(runs, number, 1, block):
            return False
    return True

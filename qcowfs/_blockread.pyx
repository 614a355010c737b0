# cython: language_level=3, cdivision=True
"""Reading a remote source block by block.

Used by `_blocks`. No GIL, any number of threads at once. A block is fetched by the first who wants it, reader or
helper; others wait for it. A helper only does earlier what the reader would do, so nobody depends on there being one.
"""

from libc.errno cimport EAGAIN, EBADF, EIO, ENOMEM
from libc.stdint cimport int64_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, nanosleep, timespec

from qcowfs._blockfile cimport BLOCK, blockfile_read, blockfile_write
from qcowfs._cache cimport (
    KIND_BLOCK, KIND_PAGE, STATE_FAILED, STATE_LOADING, cache_abandon, cache_acquire, cache_begin, cache_find,
    cache_forget, cache_peek, cache_publish, cache_release, entry_kind, entry_t,
)
from qcowfs._interruptible cimport in_main_thread, read_interruptibly
from qcowfs._pool cimport MOST_THREADS, pool_add, pool_drain
from qcowfs._source cimport source_t
from qcowfs._spares cimport spares_give, spares_take
from qcowfs._statuses cimport statuses_ask
from qcowfs._streams cimport streams_follow
from qcowfs.clib.atomic cimport (
    atomic_add, atomic_add_64, atomic_load, atomic_load_64, atomic_store_64, atomic_subtract,
)

cdef enum:
    PAGE = 4096  # bytes: what a random reader asks for
    QUICK_NS = 2000000000  # a failure that came sooner is of some block, and not of a server that does not answer
    LONGEST_REST_NS = 5000000000  # of a server that did not answer: somebody waits for it to be back
    WAIT_NS = 1000000  # between two looks whether the last reader has gone


cdef void blocks_finish(blocks_t* blocks) noexcept nogil:
    cdef timespec pause
    pause.tv_sec = 0
    pause.tv_nsec = WAIT_NS
    while atomic_load(&blocks.readers):  # they hand out tasks
        nanosleep(&pause, NULL)
    pool_drain(&blocks.shared.fetchers, blocks)
    pool_drain(&blocks.shared.writer, blocks)
    cache_forget(blocks.shared.cache, blocks.identity)


cdef int64_t blocks_pread(const source_t* source, void* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    cdef blocks_t* blocks = <blocks_t*>source.state
    cdef int64_t got
    if offset >= blocks.size or length == 0:
        return 0
    length = min(length, blocks.size - offset)
    atomic_add(&blocks.readers, 1)
    if atomic_load(&blocks.closing):  # looked at after `readers` was counted up: blocks_finish looks in the other order
        got = -EBADF
    elif in_main_thread() and not is_there(blocks, length, offset):
        got = read_interruptibly(&blocks.shared.fetchers, read_all, blocks, buffer, length, offset)
    else:
        got = read_all(blocks, buffer, length, offset)
    atomic_subtract(&blocks.readers, 1)
    return got


cdef bint is_there(blocks_t* blocks, uint64_t length, uint64_t offset) noexcept nogil:
    cdef uint64_t number
    for number in range(offset // BLOCK, (offset + length - 1) // BLOCK + 1):
        if not has(blocks, KIND_BLOCK, number):
            return False
    return True


cdef int blocks_status(const source_t* source, uint64_t offset, uint64_t* length) noexcept nogil:
    cdef blocks_t* blocks = <blocks_t*>source.state
    return statuses_ask(&blocks.statuses, blocks.base, blocks.size, offset, length)


cdef int64_t blocks_end(const source_t* source) noexcept nogil:
    return <int64_t>(<blocks_t*>source.state).size


cdef int64_t read_all(void* owner, void* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    cdef blocks_t* blocks = <blocks_t*>owner
    cdef uint64_t end = offset + length
    cdef uint64_t handed_out = 0
    cdef uint64_t piece
    cdef uint64_t start
    cdef uint64_t upto
    cdef int failure
    if atomic_load(&blocks.closing):
        return -EBADF
    if streams_follow(&blocks.shared.streams, blocks.identity, offset, end, blocks.size, &start, &upto):
        hand_out(blocks, start // BLOCK, (upto - 1) // BLOCK, False)
    while offset < end:
        piece = min(BLOCK - offset % BLOCK, end - offset)
        if wants_page(blocks, piece, offset):
            failure = read_piece(blocks, KIND_PAGE, <unsigned char*>buffer, PAGE, offset, offset + piece, &handed_out)
            piece = PAGE
        else:
            failure = read_piece(blocks, KIND_BLOCK, <unsigned char*>buffer, piece, offset, end, &handed_out)
        if failure:
            return -failure
        buffer = <unsigned char*>buffer + piece
        offset += piece
    return <int64_t>length


cdef bint wants_page(blocks_t* blocks, uint64_t length, uint64_t offset) noexcept nogil:
    """Return whether this read of a block is a random reader's: it gets the page at `offset`, and not all of the block.

    He reads whole pages, and few of a block; then they are all of it that is worth its way. What reads tables, or what
    is compressed, reads in other pieces, and wants the neighbours next.
    """
    cdef uint64_t number = offset // BLOCK
    cdef uint64_t* touched = &blocks.touched[number % TOUCHED]
    if not blocks.near or length == BLOCK or (offset | length) % PAGE or has(blocks, KIND_BLOCK, number):
        return False
    if has(blocks, KIND_PAGE, offset // PAGE):
        return True
    if atomic_load_64(touched) == number + 1:
        return False
    atomic_store_64(touched, number + 1)
    return True


cdef inline bint has(blocks_t* blocks, entry_kind kind, uint64_t number) noexcept nogil:
    cdef entry_t* entry = cache_peek(blocks.shared.cache, kind, blocks.identity, number)
    if entry == NULL:
        return False
    cache_release(blocks.shared.cache, entry)
    return True


cdef inline uint64_t size_of(entry_kind kind) noexcept nogil:
    return <uint64_t>PAGE if kind == KIND_PAGE else <uint64_t>BLOCK


cdef int read_piece(
    blocks_t* blocks, entry_kind kind, unsigned char* buffer, uint64_t length, uint64_t offset, uint64_t end,
    uint64_t* handed_out) noexcept nogil:
    """Read what is wanted of one block, or of one page. Returns 0 or an errno.

    `end` is that of the whole read, of which helpers were given the blocks before `handed_out`.
    """
    cdef shared_t* shared = blocks.shared
    cdef uint64_t number = offset // size_of(kind)
    cdef uint64_t last = (end - 1) // size_of(kind)
    cdef entry_t* entry = cache_find(shared.cache, kind, blocks.identity, number)
    cdef uint64_t begin = 0
    cdef int failure
    if entry != NULL:
        atomic_add_64(&shared.hits, 1)
    else:
        begin = now_ns()
        entry = cache_acquire(shared.cache, kind, blocks.identity, number, size_of(kind))
        if entry == NULL:
            return read_directly(blocks, buffer, length, offset)
        if entry.state == STATE_LOADING:
            atomic_add_64(&shared.misses, 1)
            if kind == KIND_BLOCK and number >= handed_out[0]:
                handed_out[0] = number + RUN + MOST_THREADS * RUN
                hand_out(blocks, number + RUN, last, True)
            load(blocks, entry, number, last)
        else:
            atomic_add_64(&shared.hits, 1)
    failure = entry.failure if entry.state == STATE_FAILED else 0
    if not failure:
        memcpy(buffer, entry.payload + offset % size_of(kind), length)
    cache_release(shared.cache, entry)
    if failure and now_ns() - begin < quick_ns(blocks) and not atomic_load(&blocks.closing):
        # The request was for more than this reader wants, and one bad sector of it is no reason to refuse the rest.
        return read_directly(blocks, buffer, length, offset)
    return failure


cdef inline uint64_t quick_ns(const blocks_t* blocks) noexcept nogil:
    return min(blocks.patience_ns // 2, <uint64_t>QUICK_NS) if blocks.patience_ns else <uint64_t>QUICK_NS


cdef int read_directly(blocks_t* blocks, unsigned char* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    cdef int64_t got = ask(blocks, buffer, length, offset)
    return <int>-got if got < 0 else 0


cdef uint64_t now_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t>now.tv_sec * 1000000000 + <uint64_t>now.tv_nsec


cdef void hand_out(blocks_t* blocks, uint64_t first, uint64_t last, bint urgent) noexcept nogil:
    """Have helpers load blocks `first` to `last`, a request each; what is there already costs nothing."""
    cdef uint64_t requests
    cdef uint64_t number
    cdef uint64_t start
    if first > last:
        return
    requests = min((last - first) // RUN + 1, <uint64_t>MOST_THREADS)
    for number in range(requests):
        start = first + (requests - 1 - number if urgent else number) * RUN  # each urgent one goes before the last one
        if not pool_add(&blocks.shared.fetchers, help, blocks, start, min(start + RUN - 1, last), urgent):
            return


cdef void help(void* owner, uint64_t first, uint64_t last) noexcept nogil:
    cdef blocks_t* blocks = <blocks_t*>owner
    cdef entry_t* entry
    while first <= last and not atomic_load(&blocks.closing):
        entry = cache_begin(blocks.shared.cache, KIND_BLOCK, blocks.identity, first, BLOCK)
        if entry == NULL:
            first += 1
            continue
        first += load(blocks, entry, first, last)
        cache_release(blocks.shared.cache, entry)


cdef uint64_t load(blocks_t* blocks, entry_t* entry, uint64_t number, uint64_t last) noexcept nogil:
    """Load `entry`, which is block (or page) `number`, with those after it up to `last` that nobody has.

    Returns how many these are.
    """
    cdef entry_t* entries[RUN]
    cdef uint64_t count = 1
    cdef uint64_t place
    cdef uint64_t start
    entries[0] = entry
    while count < RUN and number + count <= last:
        entries[count] = cache_begin(
            blocks.shared.cache, entry.kind, blocks.identity, number + count, entry.capacity)
        if entries[count] == NULL:
            break
        count += 1
    if blocks.kept != NULL:
        for place in range(count):
            restore(blocks, entries[place], number + place)
    start = 0
    while start < count:
        place = start
        while place < count and entries[place].state == STATE_LOADING:
            place += 1
        if place > start:
            fetch(blocks, entries + start, number + start, place - start)
        start = place + 1
    for place in range(1, count):
        cache_release(blocks.shared.cache, entries[place])
    return count


cdef void restore(blocks_t* blocks, entry_t* entry, uint64_t number) noexcept nogil:
    cdef uint64_t length = min(<uint64_t>BLOCK, blocks.size - number * BLOCK)
    if blockfile_read(blocks.kept, number, entry.payload, length):
        cache_publish(blocks.shared.cache, entry, length)
        atomic_add_64(&blocks.shared.restored, 1)


cdef void fetch(blocks_t* blocks, entry_t** entries, uint64_t number, uint64_t count) noexcept nogil:
    cdef uint64_t unit = entries[0].capacity
    cdef uint64_t length = min(count * unit, blocks.size - number * unit)
    cdef unsigned char* buffer = entries[0].payload
    cdef int64_t got = -ENOMEM
    cdef uint64_t place
    cdef uint64_t valid
    if count > 1:
        buffer = take_run(blocks.shared)
    if buffer != NULL:
        got = ask(blocks, buffer, length, number * unit)
    for place in range(count):
        if got < 0:
            cache_abandon(blocks.shared.cache, entries[place], <int>-got)
            continue
        valid = min(unit, length - place * unit)
        if count > 1:
            memcpy(entries[place].payload, buffer + place * unit, valid)
        cache_publish(blocks.shared.cache, entries[place], valid)
    if count > 1 and buffer != NULL:
        give_run(blocks.shared, buffer)
    if got >= 0 and blocks.kept != NULL and not atomic_load(&blocks.kept.allowance.stopped):
        pool_add(&blocks.shared.writer, keep, blocks, number, number + count - 1, False)


cdef unsigned char* take_run(shared_t* shared) noexcept nogil:
    """Return room for RUN blocks, or NULL.

    malloc(3) gives 1 MiB that was freed back to the kernel, which hands out 256 pages anew, each zeroed, for the next
    one: a tenth of what reading 1 MiB costs.
    """
    cdef void* run = spares_take(&shared.runs)
    return <unsigned char*>(malloc(RUN * BLOCK) if run == NULL else run)


cdef void give_run(shared_t* shared, void* run) noexcept nogil:
    if not spares_give(&shared.runs, run):
        free(run)


cdef int64_t ask(blocks_t* blocks, unsigned char* buffer, uint64_t length, uint64_t offset) noexcept nogil:
    """Read from the base: all of it, or -errno."""
    cdef uint64_t begin = now_ns()
    cdef int64_t got
    if begin < atomic_load_64(&blocks.silent_until):
        return -EIO
    got = blocks.base.pread(blocks.base, buffer, length, offset)
    atomic_add_64(&blocks.shared.requests, 1)
    if got < 0 and blocks.patience_ns and now_ns() - begin >= blocks.patience_ns - blocks.patience_ns // 20:
        atomic_store_64(&blocks.silent_until, now_ns() + min(blocks.patience_ns // 4, <uint64_t>LONGEST_REST_NS))
    elif got >= 0 and atomic_load_64(&blocks.silent_until):
        atomic_store_64(&blocks.silent_until, 0)
    if got >= 0:
        atomic_add_64(&blocks.shared.fetched, <uint64_t>got)
        if <uint64_t>got != length:
            return -EIO  # it became shorter than it was
    return got


cdef void keep(void* owner, uint64_t first, uint64_t last) noexcept nogil:
    """Write blocks to the directory, if they are still in memory."""
    cdef blocks_t* blocks = <blocks_t*>owner
    cdef uint64_t number
    cdef entry_t* entry
    for number in range(first, last + 1):
        entry = cache_peek(blocks.shared.cache, KIND_BLOCK, blocks.identity, number)
        if entry != NULL:
            write(blocks, number, entry)
            cache_release(blocks.shared.cache, entry)


cdef void write(blocks_t* blocks, uint64_t number, const entry_t* entry) noexcept nogil:
    cdef int failure
    if atomic_load(&blocks.kept.allowance.stopped):
        return
    failure = blockfile_write(blocks.kept, number, entry.payload, entry.valid)
    if failure == EAGAIN:
        tidy(blocks.directory)
        failure = blockfile_write(blocks.kept, number, entry.payload, entry.valid)
    if failure and failure != EAGAIN:
        give_up(blocks.directory, failure)


cdef void tidy(void* directory) noexcept with gil:
    (<object>directory).tidy()


cdef void give_up(void* directory, int failure) noexcept with gil:
    (<object>directory).give_up(failure)

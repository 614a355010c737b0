"""The cache of blocks before remote sources: right bytes, few requests, many at once, and bounded memory."""

from __future__ import annotations

import errno
import gc
import os
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from qcowfs._blocks import BlockCache, BlockSource
from qcowfs._pysource import PythonSource
from qcowfs._source import Source
from tests.support.remotebase import PATIENCE, RemoteBase, content_of

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
SIZE = 24 * MIB + 12_345
CONTENT = content_of(SIZE)


@pytest.fixture
def cache() -> BlockCache:
    return BlockCache(64 * MIB)


@pytest.fixture
def base() -> RemoteBase:
    return RemoteBase(CONTENT)


@pytest.fixture
def source(cache: BlockCache, base: RemoteBase) -> Iterator[BlockSource]:
    source = BlockSource(cache, base.source)
    yield source
    base.release()
    source.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def read_all(source: Source, step: int, start: int = 0, end: int = SIZE) -> bytes:
    return b"".join(source.read_at(offset, min(step, end - offset)) for offset in range(start, end, step))


def settle(base: RemoteBase, source: BlockSource) -> None:
    """Wait until no helper fetches any more: what is forgotten and fetched again would be counted otherwise."""
    base.release()
    source.close()


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (0, 1),
        (BLOCK - 1, 2),
        (5, 3 * MIB),
        (SIZE - 1, 1),
        (SIZE - 1, 2),
        (SIZE - BLOCK, 2 * BLOCK),
        (SIZE, 1),
        (SIZE + 5, 9),
        (7, 0),
        (0, SIZE + 1),
    ],
)
def test_reads_are_those_of_the_base(source: BlockSource, offset: int, length: int) -> None:
    for _ in range(2):
        assert CONTENT[offset : offset + length] == source.read_at(offset, length)


def test_it_is_its_base_in_all_but_speed(source: BlockSource, base: RemoteBase) -> None:
    assert (SIZE, "here://image", ("here", "image")) == (source.size, source.name, source.place())
    assert source.uncached() is base.source


def test_a_small_read_fetches_one_block_and_a_warm_one_nothing(source: BlockSource, base: RemoteBase) -> None:
    for offset in (3 * MIB + 5, 3 * MIB + 40_000):
        source.read_at(offset, 4 * KIB)

    assert [(3 * MIB, BLOCK)] == base.requests


def test_random_reads_read_nothing_ahead(source: BlockSource, base: RemoteBase) -> None:
    dice = random.Random(5)
    wanted = {dice.randrange(SIZE // BLOCK) for _ in range(100)}
    for number in sorted(wanted, key=lambda _: dice.random()):
        source.read_at(number * BLOCK + dice.randrange(BLOCK - 4096), 4096)
    settle(base, source)

    assert len(wanted) * BLOCK >= base.fetched


def test_a_large_read_is_several_requests_at_once(
    source: BlockSource, base: RemoteBase, threads: ThreadPoolExecutor
) -> None:
    base.hold()
    reading = threads.submit(source.read_at, 0, 8 * MIB)
    base.wait_for_requests(8)
    base.release()

    assert CONTENT[: 8 * MIB] == reading.result(PATIENCE)
    assert {MIB} == {length for offset, length in base.requests if offset < 8 * MIB}


def test_a_block_is_fetched_once_however_many_want_it(
    source: BlockSource, base: RemoteBase, threads: ThreadPoolExecutor, cache: BlockCache
) -> None:
    base.hold()
    reading = [threads.submit(source.read_at, 5 * MIB + number, 100) for number in range(8)]
    base.wait_for_requests(1)
    base.release()

    assert [CONTENT[5 * MIB + number :][:100] for number in range(8)] == [one.result(PATIENCE) for one in reading]
    assert 1 == len(base.requests)
    assert 8 == cache.statistics()["hits"] + cache.statistics()["misses"]


def test_a_sequential_reader_has_large_requests_before_him(
    source: BlockSource, base: RemoteBase, threads: ThreadPoolExecutor
) -> None:
    read_all(source, 128 * KIB, 0, 4 * MIB)
    before = len(base.requests)
    base.hold()
    reading = threads.submit(read_all, source, 128 * KIB, 4 * MIB, 20 * MIB)
    base.wait_for_requests(4)
    base.release()

    assert CONTENT[4 * MIB : 20 * MIB] == reading.result(PATIENCE)
    assert before < 60
    assert 4 <= base.most_at_once <= 17


@pytest.mark.parametrize("step", [4 * KIB, 100_000, MIB])
def test_nothing_is_read_twice_or_beyond_the_end(source: BlockSource, base: RemoteBase, step: int) -> None:
    data = read_all(source, step)
    settle(base, source)

    assert CONTENT == data
    assert SIZE == base.fetched
    assert all(offset + length <= SIZE for offset, length in base.requests)


def test_a_reader_that_stops_has_cost_three_times_what_he_read_at_most(source: BlockSource, base: RemoteBase) -> None:
    read_all(source, 16 * KIB, MIB, 2 * MIB)
    settle(base, source)

    assert MIB <= base.fetched <= 3 * MIB + BLOCK


def test_readers_of_many_places_are_told_apart(source: BlockSource, base: RemoteBase) -> None:
    starts = range(0, 24 * MIB, 3 * MIB)
    for step in range(0, 2 * MIB, 32 * KIB):
        for start in starts:
            assert CONTENT[start + step : start + step + 32 * KIB] == source.read_at(start + step, 32 * KIB)
    settle(base, source)

    assert len(base.requests) < len(starts) * 20  # of 64 reads each
    assert sum(length for _, length in base.requests) <= SIZE


def test_the_kernels_order_of_reads_ahead_is_sequential_too(source: BlockSource, base: RemoteBase) -> None:
    dice = random.Random(2)
    for start in range(0, 16 * MIB, MIB):
        for part in dice.sample(range(8), 8):
            source.read_at(start + part * 128 * KIB, 128 * KIB)
    settle(base, source)

    assert len(base.requests) < 100


def test_errors_are_not_remembered(source: BlockSource, base: RemoteBase) -> None:
    base.failure = errno.ESTALE
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        source.read_at(0, 10)
    base.failure = 0

    assert CONTENT[:10] == source.read_at(0, 10)


def test_a_bad_sector_refuses_no_other(source: BlockSource, base: RemoteBase) -> None:
    base.bad = {MIB + 3 * BLOCK + 5_000}

    assert CONTENT[MIB : MIB + 3 * BLOCK + 5_000] == read_all(source, 5_000, MIB, MIB + 3 * BLOCK + 5_000)
    assert CONTENT[: MIB + 3 * BLOCK] == source.read_at(0, MIB + 3 * BLOCK)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        source.read_at(MIB + 3 * BLOCK + 4_990, 20)
    assert CONTENT[MIB + 3 * BLOCK + 5_001 :][:9] == source.read_at(MIB + 3 * BLOCK + 5_001, 9)


def test_what_cannot_be_read_ahead_is_nobodys_error(source: BlockSource, base: RemoteBase) -> None:
    end = 6 * MIB
    base.bad = set(range(end, SIZE, BLOCK))

    assert CONTENT[:end] == read_all(source, 64 * KIB, 0, end)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        source.read_at(end, 10)


def test_a_base_that_became_shorter_is_an_error_and_no_short_read(cache: BlockCache) -> None:
    base = RemoteBase(CONTENT)
    source = BlockSource(cache, base.source)
    base.content = CONTENT[: 5 * MIB]
    base.failure = errno.EIO

    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        source.read_at(6 * MIB, 10)
    source.close()


def waiting_reads(source: BlockSource, base: RemoteBase, threads: ThreadPoolExecutor) -> list[Future[bytes]]:
    base.hold()
    reading = [threads.submit(source.read_at, number % 2 * MIB, 2 * BLOCK) for number in range(6)]
    base.wait_for_requests(2)
    return reading


def test_who_waits_for_anothers_fetch_shares_its_error(
    source: BlockSource, base: RemoteBase, threads: ThreadPoolExecutor
) -> None:
    reading = waiting_reads(source, base, threads)
    base.failure = errno.ESTALE
    base.release()

    assert {errno.ESTALE} == {getattr(one.exception(PATIENCE), "errno", None) for one in reading}


def test_close_makes_reads_fail_that_wait(
    source: BlockSource, base: RemoteBase, threads: ThreadPoolExecutor, cache: BlockCache
) -> None:
    reading = waiting_reads(source, base, threads)
    source.close()

    assert all(isinstance(one.exception(PATIENCE), OSError) for one in reading)
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        source.read_at(0, 1)
    assert 0 == cache.used


def test_helpers_end_with_the_last_source(cache: BlockCache) -> None:
    threads_before = len(os.listdir("/proc/self/task"))
    sources = [BlockSource(cache, RemoteBase(CONTENT, place=number).source) for number in range(2)]
    for source in sources:
        assert CONTENT == source.read_at(0, SIZE)
    sources[0].close()
    with_helpers = len(os.listdir("/proc/self/task"))
    sources[1].close()

    assert threads_before < with_helpers <= threads_before + 17
    assert threads_before >= len(os.listdir("/proc/self/task"))


def test_a_source_that_nobody_closed_leaves_no_thread_and_no_memory(cache: BlockCache) -> None:
    threads_before = len(os.listdir("/proc/self/task"))
    source: BlockSource | None = BlockSource(cache, RemoteBase(CONTENT).source)
    assert source is not None
    read_all(source, 128 * KIB)
    source = None
    gc.collect()

    assert 0 == cache.used
    assert threads_before >= len(os.listdir("/proc/self/task"))


def test_what_was_forgotten_is_fetched_anew(source: BlockSource, base: RemoteBase) -> None:
    source.read_at(0, SIZE)
    base.content = content_of(SIZE, seed=2)
    assert CONTENT[:100] == source.read_at(0, 100)
    source.forget()

    assert base.content == source.read_at(0, SIZE)


def test_what_was_on_its_way_when_all_was_forgotten_is_not_kept(
    source: BlockSource, base: RemoteBase, threads: ThreadPoolExecutor
) -> None:
    base.hold()
    reading = threads.submit(source.read_at, 0, 100)
    base.wait_for_requests(1)
    base.content = content_of(SIZE, seed=2)
    source.forget()
    base.release()

    assert CONTENT[:100] == reading.result(PATIENCE)
    assert base.content[:100] == source.read_at(0, 100)


def test_forgetting_one_source_leaves_the_others(cache: BlockCache) -> None:
    bases = [RemoteBase(content_of(4 * MIB, seed), place=seed) for seed in range(2)]
    sources = [BlockSource(cache, base.source) for base in bases]
    for _ in range(2):
        for base, source in zip(bases, sources, strict=True):
            assert base.content == source.read_at(0, 4 * MIB)
        sources[0].forget()

    assert [2 * 4 * MIB, 4 * MIB] == [base.fetched for base in bases]
    for source in sources:
        source.close()


def test_a_scan_does_not_throw_out_what_is_used_all_the_time() -> None:
    """The tables of an image are read now and then while its data go by, which are many times the budget."""
    cache, base = BlockCache(4 * MIB), RemoteBase(CONTENT)
    source = BlockSource(cache, base.source)
    tables = [SIZE - (number + 1) * BLOCK for number in range(8)]
    for step in range(0, 20 * MIB, 64 * KIB):
        source.read_at(step, 64 * KIB)
        if step % MIB == 0:
            for table in tables:
                source.read_at(table, 512)
    of_tables = [offset for offset, _ in base.requests if offset >= min(tables)]
    source.close()

    assert len(of_tables) < 3 * len(tables)  # of 20 rounds
    assert base.fetched < SIZE + 3 * MIB


def test_blocks_that_are_read_in_small_steps_are_not_taken_for_tables() -> None:
    cache, base = BlockCache(4 * MIB), RemoteBase(CONTENT)
    source = BlockSource(cache, base.source)
    tables = range(0, MIB, BLOCK)
    for _ in range(3):
        for table in tables:
            source.read_at(table + 7, 100)
        read_all(source, 8 * KIB, 4 * MIB, 5 * MIB)
    base.requests.clear()
    read_all(source, 8 * KIB, 6 * MIB, 20 * MIB)
    for table in tables:
        source.read_at(table + 7, 100)
    source.close()

    assert [] == [offset for offset, _ in base.requests if offset < MIB]


@pytest.mark.parametrize("budget", [100_000, MIB, 8 * MIB])
def test_threads_read_right_whatever_is_thrown_out_meanwhile(budget: int, threads: ThreadPoolExecutor) -> None:
    cache = BlockCache(budget)
    bases = [RemoteBase(content_of(3 * MIB + 999, seed), place=seed) for seed in range(3)]
    sources = [BlockSource(cache, base.source) for base in bases]

    def hammer(seed: int) -> list[str]:
        dice, wrong = random.Random(seed), []
        place = 0
        for _ in range(150):
            number = dice.randrange(3)
            content, source = bases[number].content, sources[number]
            length = dice.choice([1, 512, 4096, 70_000, 300_000, 2 * MIB])
            place = dice.choice([place, dice.randrange(len(content))])
            try:
                if source.read_at(place, length) != content[place : place + length]:
                    wrong.append(f"seed {seed}: {number} {place}+{length}")
            except OSError:
                wrong.extend([] if bases[number].bad else [f"seed {seed}: an error"])
            place += length
            if dice.random() < 0.02:
                source.forget()
            if number == 2 and dice.random() < 0.1:
                bases[2].bad = {dice.randrange(3 * MIB)}
        return wrong

    wrong = [line for found in threads.map(hammer, range(8)) for line in found]
    for source in sources:
        source.close()

    assert [] == wrong
    assert 0 == cache.used


def test_memory_stays_within_the_budget(source: BlockSource, cache: BlockCache) -> None:
    small = BlockCache(2 * MIB)
    narrow = BlockSource(small, RemoteBase(CONTENT).source)
    for step in (64 * KIB, MIB):
        assert CONTENT == read_all(narrow, step)
        assert small.used <= small.budget + 17 * MIB
    narrow.close()

    assert 0 == small.used


def test_what_is_used_can_be_asked_while_helpers_fill_the_cache(threads: ThreadPoolExecutor) -> None:
    """It is right, and a race that a sanitizer sees if it is read without the lock."""
    cache, base = BlockCache(MIB), RemoteBase(content_of(8 * MIB))
    source = BlockSource(cache, base.source)
    read = threads.submit(lambda: [len(source.read_at(offset, BLOCK)) for offset in range(0, 8 * MIB, BLOCK)])
    used = {cache.used}
    while not read.done():
        used.add(cache.used)
    source.close()

    assert sum(read.result()) == 8 * MIB
    assert 0 < max(used) <= 2 * MIB + 16 * MIB, "the budget, and what is on its way"


@pytest.mark.parametrize("close_at", range(0, 40, 8))
def test_close_at_any_moment_ends(cache: BlockCache, threads: ThreadPoolExecutor, close_at: int) -> None:
    base = RemoteBase(CONTENT)
    source = BlockSource(cache, base.source)
    enough = threading.Event()
    reads = 0

    def work(_: int) -> str:
        nonlocal reads
        for offset in range(0, SIZE, 200_000):
            try:
                if source.read_at(offset, 200_000) != CONTENT[offset : offset + 200_000]:
                    return "wrong"
            except OSError:
                return "ended"
            reads += 1
            if reads >= close_at:
                enough.set()
        return "done"

    working = [threads.submit(work, number) for number in range(4)]
    assert enough.wait(PATIENCE)
    source.close()

    assert {"ended", "done"} >= {one.result(PATIENCE) for one in working}


def test_ctrl_c_is_heard_while_a_read_waits(source: BlockSource, base: RemoteBase) -> None:
    base.hold()
    interrupted = False

    def interrupt() -> None:
        base.wait_for_requests(1)
        os.kill(os.getpid(), 2)

    killer = threading.Thread(target=interrupt)
    killer.start()
    try:
        try:
            source.read_at(0, 100)
        except InterruptedError:
            killer.join()
    except KeyboardInterrupt:
        interrupted = True
    killer.join()

    assert interrupted


def test_after_a_server_was_silent_others_fail_at_once_for_a_while_and_then_it_is_asked_again(
    cache: BlockCache,
) -> None:
    """One `ls` reads at dozens of places: it must not wait for each of them."""
    asked: list[int] = []
    silent = threading.Event()
    silent.set()

    def read(offset: int, buffer: memoryview) -> int:
        asked.append(offset)
        if silent.is_set():
            time.sleep(1.2)
            raise OSError(errno.EIO, "no answer")
        buffer[:] = CONTENT[offset : offset + len(buffer)]
        return len(buffer)

    source = BlockSource(cache, PythonSource("here://image", SIZE, read, ("here",)), patience=1.2)
    for place in range(20):
        with pytest.raises(OSError, match="Input/output error"):
            source.read_at(place * MIB, 10)
    assert len(asked) <= 3  # of which one is enough where the machine is not busy

    silent.clear()
    time.sleep(0.4)  # a quarter of the patience, and some more
    assert CONTENT[:10] == source.read_at(0, 10)
    assert CONTENT[5 * MIB : 5 * MIB + 10] == source.read_at(5 * MIB, 10)
    source.close()


def test_a_server_that_took_half_of_the_patience_to_fail_is_not_asked_again(cache: BlockCache) -> None:
    """A read would take twice the time that it may."""
    asked: list[int] = []

    def read(offset: int, buffer: memoryview) -> int:
        asked.append(offset)
        time.sleep(0.6)
        raise OSError(errno.EIO, "given up")

    source = BlockSource(cache, PythonSource("here://image", SIZE, read, ("here",)), patience=1.0)
    with pytest.raises(OSError, match="Input/output error"):
        source.read_at(0, 10)
    source.close()

    assert [0] == asked

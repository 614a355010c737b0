"""Readers who talk to the server themselves: who has the wheel, who gets it next, and what ends when nobody answers.

Evidence: own fixture, servers of our own that answer as each test says, and nbdkit. Who had the wheel is told by how
often the source's own thread had to wake up; it has nothing to do while readers hand the wheel to each other.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs._source import Source
from qcowfs._tables import LayerMap
from qcowfs.source import iscsi
from qcowfs.source.nbd import open_url
from qcowfs.source.remote import RemoteSettings
from qcowfs.source.url import parse_url
from tests.support import need
from tests.support.mounts import wait_until
from tests.support.nbd import qemu_nbd
from tests.support.nbdscript import Command, scripted_server
from tests.support.wildtarget import WildTarget

MIB = 1 << 20
PAGE = 4096
LONG = 30.0  # seconds of patience where nothing is to fail
END = 60.0  # seconds after which a test takes a reader for one that waits for ever


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(1).randbytes(20 * MIB)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


@contextmanager
def opened(url: str, patience: float) -> Iterator[Source]:
    source = open_url(parse_url(url), RemoteSettings(patience=patience)).source
    try:
        yield source
    finally:
        source.close()


def page(content: bytes, number: int) -> bytes:
    return content[number * PAGE : (number + 1) * PAGE]


def read(source: Source, offset: int, length: int) -> bytes | int | None:
    """Return the bytes, or the errno."""
    try:
        return source.read_at(offset, length)
    except OSError as error:
        return error.errno


class Gathering:
    """A script that answers nothing before `count` reads are there, and then whatever `answer` does with them."""

    def __init__(self, count: int, answer: Callable[[list[Command]], None]) -> None:
        self._count = count
        self._answer = answer
        self._there: list[Command] = []

    def __call__(self, command: Command) -> None:
        self._there.append(command)
        if len(self._there) == self._count:
            there, self._there = self._there, []
            self._answer(there)


def sleeps() -> int:
    """Return how often threads of this process went to sleep that Python knows nothing of: those of sources."""
    others = set(os.listdir("/proc/self/task")) - {str(thread.native_id) for thread in threading.enumerate()}
    total = 0
    for thread in others:
        lines = Path(f"/proc/self/task/{thread}/status").read_text().splitlines()
        total += next(int(line.split()[1]) for line in lines if line.startswith("voluntary_ctxt_switches"))
    return total


class TestTheWheel:
    def test_is_a_lone_readers(self, place: Path, content: bytes) -> None:
        """The source's own thread has nothing to do."""
        with scripted_server(place, content, Command.answer) as server, opened(server.url, LONG) as source:
            start = sleeps()
            for offset in range(0, 1000 * PAGE, PAGE):
                assert source.read_at(offset, PAGE) == content[offset : offset + PAGE]
            assert sleeps() - start < 500

    @pytest.mark.parametrize("seed", range(3))
    def test_is_handed_on_by_who_has_his_answer(
        self, seed: int, place: Path, content: bytes, pool: ThreadPoolExecutor
    ) -> None:
        """Answers come in any order, each when the reader before it has gone."""
        rounds, readers = 40, 4
        chance = random.Random(seed)
        gone = threading.Semaphore(0)

        def answer(commands: list[Command]) -> None:
            chance.shuffle(commands)
            for command in commands:
                command.answer()
                assert gone.acquire(timeout=END)

        def read_one(source: Source, offset: int) -> None:
            assert content[offset : offset + PAGE] == source.read_at(offset, PAGE)
            gone.release()

        with scripted_server(place, content, Gathering(readers, answer)) as server, opened(server.url, LONG) as source:
            start = sleeps()
            for number in range(rounds):
                offsets = [(number * readers + reader) * PAGE for reader in range(readers)]
                for done in [pool.submit(read_one, source, offset) for offset in offsets]:
                    done.result(END)
            assert sleeps() - start < rounds
            assert 1 == server.connections


@pytest.mark.expect_warnings
class TestAConnectionThatEnds:
    def test_while_somebody_has_the_wheel_is_made_again_and_all_are_answered(
        self, place: Path, content: bytes, pool: ThreadPoolExecutor
    ) -> None:
        readers, times = 4, 4

        def answer(commands: list[Command]) -> None:
            if commands[0].connection <= times:
                commands[0].hang_up()
            for command in commands:
                command.answer()

        with scripted_server(place, content, Gathering(readers, answer)) as server, opened(server.url, LONG) as source:
            reads = [pool.submit(read, source, number * PAGE, PAGE) for number in range(readers)]
            for number, done in enumerate(reads):
                assert page(content, number) == done.result(END)
            assert times + 1 == server.connections

    def test_while_nobody_reads_is_noticed(self, place: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
        """By the source's own thread, which takes the wheel that nobody has used for a while."""
        last: list[Command] = []

        def answer(command: Command) -> None:
            last.append(command)
            command.answer()

        with scripted_server(place, content, answer) as server, opened(server.url, LONG) as source:
            assert source.read_at(0, PAGE) == content[:PAGE]
            last[0].hang_up()
            wait_until(lambda: "closed the connection" in caplog.text, "nobody noticed")
            assert source.read_at(PAGE, PAGE) == content[PAGE : 2 * PAGE]
            assert 2 == server.connections

    def test_is_made_again_at_once_by_the_sources_own_thread(self) -> None:
        """The reader who had the wheel calls it. It would look by itself 50 to 100 ms later."""
        target = WildTarget(bytes(64 * PAGE))
        source = iscsi.open_url(parse_url(target.url), RemoteSettings(patience=LONG)).source
        took = []
        try:
            for _ in range(20):
                assert source.read_at(0, PAGE) == bytes(PAGE)
                target.moods.append("close")
                time.sleep(0.02)  # until its thread has let readers have the wheel again
                start = time.monotonic()
                assert source.read_at(0, PAGE) == bytes(PAGE)
                took.append(time.monotonic() - start)
            assert 21 == target.logins
        finally:
            source.close()
            target.close()
        assert sorted(took)[2] < 0.045  # the others may have waited for the machine


@pytest.mark.expect_warnings
class TestPatience:
    def test_of_who_has_the_wheel_ends_and_the_others_are_answered(
        self, place: Path, content: bytes, pool: ThreadPoolExecutor
    ) -> None:
        asked = threading.Semaphore(0)

        def answer(command: Command) -> None:
            if command.connection % 2 == 0 and command.offset:
                command.answer()
            asked.release()

        expected: list[bytes | int] = [errno.EIO, page(content, 1), page(content, 2), page(content, 3)]
        for patience in (0.8, 8.0):  # a busy machine may need more
            with scripted_server(place, content, answer) as server, opened(server.url, patience) as source:
                reads = [pool.submit(read, source, 0, PAGE)]
                assert asked.acquire(timeout=END)
                time.sleep(patience / 2)  # its patience ends when that of the others is half over
                reads += [pool.submit(read, source, number * PAGE, PAGE) for number in range(1, 4)]
                got = [done.result(END) for done in reads]
            if (got, server.connections) == (expected, 2):
                break

        assert (expected, 2) == (got, server.connections)

    def test_ends_for_all_who_are_behind_what_the_server_was_asked(
        self, place: Path, content: bytes, pool: ThreadPoolExecutor
    ) -> None:
        """Readers of more than it is ever asked for at once, which it does not answer."""
        asked: list[Command] = []

        def answer(command: Command) -> None:
            asked.append(command)
            if command.length == PAGE:
                command.answer()

        with scripted_server(place, content, answer) as server, opened(server.url, 0.5) as source:
            reads = [pool.submit(read, source, 0, 16 * MIB) for _ in range(6)]

            assert [errno.EIO] * 6 == [done.result(END) for done in reads]
            assert 64 >= sum(command.connection == 1 for command in asked)
            assert source.read_at(PAGE, PAGE) == page(content, 1)

    def test_ends_where_there_is_no_server_any_more(
        self, place: Path, content: bytes, pool: ThreadPoolExecutor
    ) -> None:
        """What nobody was asked for leaves the queue."""
        with ExitStack() as stack:
            with scripted_server(place, content, Command.hang_up) as server:
                source = stack.enter_context(opened(server.url, 0.5))
                reads = [pool.submit(read, source, number * PAGE, PAGE) for number in range(2)]
                wait_until(lambda: server.connections > 1, "it was never asked")
            reads += [pool.submit(read, source, number * PAGE, PAGE) for number in range(2)]

            assert [errno.EIO] * 4 == [done.result(END) for done in reads]

    @pytest.mark.parametrize("seed", range(4))
    def test_is_all_that_anybody_waits_whatever_the_server_does(
        self, seed: int, place: Path, content: bytes, pool: ThreadPoolExecutor
    ) -> None:
        """It is late, silent, hangs up, or refuses, while many read: right bytes or an error."""
        script = Moody(seed)
        with scripted_server(place, content, script) as server, opened(server.url, 0.5) as source:
            readers = [pool.submit(read_randomly, source, content, seed * 8 + number, 12) for number in range(8)]
            failures = sum(done.result(END) for done in readers)
            script.end()
            # A connection ends with a word of the server, or because somebody lost his patience.
            assert server.connections - 1 <= script.ended + failures


class Moody:
    """A script that chooses for each read what to do with it.

    Attributes:
        ended: connections that it closed.
    """

    def __init__(self, seed: int) -> None:
        self.ended = 0
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._timers: list[threading.Timer] = []

    def __call__(self, command: Command) -> None:
        with self._lock:
            mood = self._chance.choices(("well", "late", "silent", "gone", "refused"), (70, 20, 2, 4, 4))[0]
            self.ended += mood == "gone"
            if mood == "late":
                self._timers.append(threading.Timer(self._chance.uniform(0, 0.03), command.answer))
                self._timers[-1].start()
        if mood == "gone":
            command.hang_up()
        elif mood in ("well", "refused"):
            command.answer(errno.EIO if mood == "refused" else 0)

    def end(self) -> None:
        for timer in self._timers:
            timer.join()


def read_randomly(source: Source, content: bytes, seed: int, count: int) -> int:
    """Read at random; return how often that was an error, which only EIO may be."""
    chance = random.Random(seed)
    failures = 0
    for _ in range(count):
        offset, length = chance.randrange(len(content) - 3 * MIB), chance.choice((1, 511, PAGE, 65536, 2 * MIB + 1))
        got = read(source, offset, length)
        assert got in (errno.EIO, content[offset : offset + length])
        failures += got == errno.EIO
    return failures


@pytest.mark.parametrize("seed", range(6))
def test_close_while_somebody_has_the_wheel_ends_all_reads(
    seed: int, place: Path, content: bytes, pool: ThreadPoolExecutor
) -> None:
    """At any moment: after a number of reads that the seed says, some of which were answered."""
    chance = random.Random(seed)
    left = chance.randrange(1, 60)
    now = threading.Event()

    def answer(command: Command) -> None:
        nonlocal left
        left -= 1
        if left <= 0:
            now.set()
        if left > 0 or chance.random() < 0.5:
            command.answer()

    def read_until_the_end(source: Source, number: int) -> int | None:
        while True:
            got = read(source, number * PAGE, PAGE)
            if got != page(content, number):
                assert isinstance(got, int)
                return got

    with scripted_server(place, content, answer) as server:
        source = open_url(parse_url(server.url), RemoteSettings(patience=600)).source
        reads: list[Future[int | None]] = [pool.submit(read_until_the_end, source, number) for number in range(8)]
        assert now.wait(END)
        source.close()
        assert [errno.EBADF] * 8 == [done.result(END) for done in reads]


def test_questions_for_holes_come_between_reads(place: Path, tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    """Half of the threads read, the others ask what is data, all over one source."""
    need("qemu-nbd")
    path, step = tmp_path / "sparse", 128 << 10
    with path.open("wb") as file:
        for number in range(200):
            file.seek(number * step)
            file.write(bytes([number + 1]) * PAGE)
    size = path.stat().st_size

    def read_all(source: Source, seed: int) -> bool:
        numbers = random.Random(seed).sample(range(200), 200)
        return all(source.read_at(number * step, PAGE) == bytes([number + 1]) * PAGE for number in numbers)

    def ask_all(source: Source) -> bool:
        disk = Disk([LayerMap.raw(source, depth=0, virtual_size=size)], size, Cache(MIB))
        told = [extent.start for extent in disk.extents(0, size, 1000) if extent.data]
        return told == [number * step for number in range(200)]

    with qemu_nbd(place, path, "-f", "raw") as server, opened(server.url, LONG) as source:
        reads = [pool.submit(read_all, source, seed) for seed in range(4)]
        questions = [pool.submit(ask_all, source) for _ in range(4)]
        assert all(done.result(END) for done in reads + questions)

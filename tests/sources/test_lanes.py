"""Several connections to one server: opened when two want to read, told apart from what is another thing, all closed.

Evidence: nbdkit and tgtd, whose connections the kernel counts.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from qcowfs._lanes import LanesSource
from qcowfs._nbd import NbdSource
from qcowfs._source import Source
from qcowfs.source import iscsi, nbd
from qcowfs.source.lanes import in_lanes
from qcowfs.source.remote import RemoteSettings
from qcowfs.source.url import parse_url
from tests.support import need
from tests.support.iscsi import Target
from tests.support.nbd import Server, nbdkit
from tests.support.workers import eventually

need("nbdkit", "tgtd", "qemu-img")

SIZE = 8 << 20  # bytes
READERS = 8
ALL = 4  # connections, once they are open
LATE = ("--filter=delay", "delay-read=5ms")  # so that reads meet
SETTINGS = RemoteSettings(patience=20.0)


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(7).randbytes(SIZE)


@contextmanager
def opened(url: str, settings: RemoteSettings = SETTINGS) -> Iterator[Source]:
    room = iscsi if url.startswith("iscsi") else nbd
    source = room.open_url(parse_url(url), settings).source
    try:
        yield source
    finally:
        source.close()


def late(place: Path, image: Path, *filters: str, words: tuple[str, ...] = ()) -> AbstractContextManager[Server]:
    """Run nbdkit, which answers after some milliseconds."""
    return nbdkit(place, *filters, LATE[0], "file", image, LATE[1], *words)


def read_together(source: Source, content: bytes) -> None:
    """Read pieces everywhere from READERS threads, and compare them."""

    def read(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(12):
            offset = choose.randrange(SIZE - 70_000)
            length = choose.choice((512, 4096, 65_536))
            assert content[offset : offset + length] == source.read_at(offset, length)

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, range(READERS)))


def sockets() -> int:
    """Return how many sockets this process has."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return found


def test_one_reader_needs_one_connection(place: Path, image: Path, content: bytes) -> None:
    with late(place, image) as server, opened(server.url) as source:
        assert content[4096:8192] == source.read_at(4096, 4096)
        assert source.read_at(0, 10) == content[:10]

        assert isinstance(source, LanesSource)
        assert 1 == source.connections


def test_several_readers_get_several_and_close_ends_all(place: Path, image: Path, content: bytes) -> None:
    before = sockets()
    with late(place, image) as server, opened(server.url) as source:
        read_together(source, content)

        assert isinstance(source, LanesSource)
        assert eventually(lambda: source.connections == ALL)
        assert before + ALL == sockets()
        read_together(source, content)
    assert before == sockets()


def test_a_server_that_is_not_for_several_gets_one(place: Path, image: Path, content: bytes) -> None:
    filters = ("--filter=multi-conn",)
    with late(place, image, *filters, words=("multi-conn-mode=disable",)) as server, opened(server.url) as source:
        before = sockets()
        read_together(source, content)

        assert isinstance(source, NbdSource)
        assert before == sockets()


def test_a_server_that_takes_no_more_is_read_by_what_there_is(place: Path, image: Path, content: bytes) -> None:
    with late(place, image, "--filter=limit", words=("limit=2",)) as server, opened(server.url) as source:
        read_together(source, content)
        read_together(source, content)

        assert isinstance(source, LanesSource)
        assert source.connections <= 2


@pytest.mark.expect_warnings  # of a target that is slow to start again
def test_a_session_with_a_target_is_one_of_several_too(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    directory = tmp_path_factory.mktemp("t")
    (directory / "disk").write_bytes(content)
    target = Target(directory)
    try:
        with opened(target.add(1, directory / "disk")) as source:
            assert isinstance(source, LanesSource)
            for _ in range(100):  # until two reads met
                read_together(source, content)
                if source.connections > 1:
                    break
            assert eventually(lambda: source.connections == ALL)
            target.kill()
            target.start()
            read_together(source, content)
    finally:
        target.close()


@pytest.mark.expect_warnings
def test_a_server_that_is_killed_is_waited_for_by_all(place: Path, image: Path, content: bytes) -> None:
    with late(place, image) as server, opened(server.url) as source:
        read_together(source, content)
        assert isinstance(source, LanesSource)
        assert eventually(lambda: source.connections == ALL)
        with ThreadPoolExecutor(1) as pool:
            server.kill()
            reading = pool.submit(read_together, source, content)
            server.start()
            reading.result(60)


@pytest.mark.expect_warnings
def test_all_are_used_again_after_an_outage_that_nobody_waited_for(place: Path, image: Path, content: bytes) -> None:
    with late(place, image) as server, opened(server.url, RemoteSettings(patience=2.0)) as source:
        read_together(source, content)
        assert isinstance(source, LanesSource)
        assert eventually(lambda: source.connections == ALL)
        before = sockets()
        server.kill()
        with ThreadPoolExecutor(READERS) as pool:
            reads = [pool.submit(source.read_at, number * 65_536, 4096) for number in range(READERS)]
            assert [errno.EIO] * READERS == [getattr(read.exception(), "errno", None) for read in reads]
        server.start()

        assert eventually(lambda: read_together(source, content) is None and sockets() == before)


def test_what_shows_something_else_is_not_read(place: Path, image: Path, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(SIZE // 2))
    asked = []
    with late(place, image) as server, late(place.with_name("o"), tmp_path / "other") as other:
        first = nbd._connected(parse_url(server.url), SETTINGS)

        def another() -> NbdSource:
            asked.append(nbd._connected(parse_url(other.url), SETTINGS))
            return asked[-1]

        source = in_lanes(first, another, lambda one: one.facts)
        try:
            read_together(source, content)
            assert eventually(lambda: len(asked) == 1)

            assert 1 == source.connections
            with pytest.raises(OSError):
                asked[0].read_at(0, 10)  # it is closed
        finally:
            source.close()


def test_one_that_comes_after_the_end_is_closed(place: Path, image: Path) -> None:
    with late(place, image) as server:
        source = nbd.open_url(parse_url(server.url), SETTINGS).source
        assert isinstance(source, LanesSource)
        source.close()
        before = sockets()
        source.open_others()

        assert before == sockets()
        assert 1 == source.connections


@pytest.mark.expect_warnings
def test_what_one_of_them_knows_to_be_another_thing_is_so_for_all(
    place: Path, image: Path, content: bytes, tmp_path: Path
) -> None:
    (tmp_path / "other").write_bytes(bytes(SIZE // 2))
    with late(place, image) as server, opened(server.url) as source:
        read_together(source, content)
        assert isinstance(source, LanesSource)
        assert eventually(lambda: source.connections == ALL)
        server.kill()
        with late(place, tmp_path / "other"):
            for _ in range(2 * ALL):
                with pytest.raises(OSError) as caught:
                    source.read_at(0, 512)
                assert errno.ESTALE == caught.value.errno

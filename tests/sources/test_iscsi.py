"""Logical units of a real target, tgtd, on loopback. Evidence: own fixture; the file behind the LUN is the judge."""

from __future__ import annotations

import errno
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs._source import Source
from qcowfs._tables import LayerMap
from qcowfs.errors import SourceError, UnsupportedImage
from qcowfs.source.iscsi import open_url
from qcowfs.source.remote import RemoteSettings
from qcowfs.source.url import parse_url
from tests.support.iscsi import Target
from tests.support.workers import eventually

SIZE = (24 << 20) + 4096  # bytes of LUN 1
LENGTHS = (1, 511, 513, 4095, 4097, 65536, 1000001, (2 << 20) + 3)
SHORT = 1.5  # seconds of patience in tests of what fails
LONG = 20.0  # and where the answer comes


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


@pytest.fixture
def target(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Iterator[Target]:
    directory = tmp_path_factory.mktemp("t")
    (directory / "disk").write_bytes(content)
    target = Target(directory)
    try:
        target.add(1, directory / "disk")
        yield target
    finally:
        target.close()


@pytest.fixture
def opened() -> Iterator[Callable[..., Source]]:
    """Open a URL; what was opened is closed after the test."""
    sources: list[Source] = []

    def open_it(url: str, *, patience: float = LONG) -> Source:
        sources.append(open_url(parse_url(url), RemoteSettings(patience=patience)).source)
        return sources[-1]

    yield open_it
    for source in sources:
        source.close()


def refusal(url: str, *, patience: float = LONG) -> SourceError:
    with pytest.raises(SourceError) as caught:
        open_url(parse_url(url), RemoteSettings(patience=patience)).source.close()
    assert "\n" not in str(caught.value)
    return caught.value


def read_randomly(source: Source, content: bytes, seed: int, count: int) -> None:
    """Compare `count` reads at random with the file."""
    chance = random.Random(seed)
    for _ in range(count):
        offset, length = chance.randrange(len(content)), chance.choice(LENGTHS)
        assert content[offset : offset + length] == source.read_at(offset, length), (offset, length)


def failure(source: Source, offset: int = 0) -> int:
    """Return the errno of a read of one byte."""
    with pytest.raises(OSError) as caught:
        source.read_at(offset, 1)
    assert caught.value.errno is not None
    return caught.value.errno


def test_bytes_are_the_files_from_many_threads(target: Target, opened: Callable[..., Source], content: bytes) -> None:
    source = opened(target.url(1))
    with ThreadPoolExecutor(8) as readers:
        done = [readers.submit(read_randomly, source, content, seed, 40) for seed in range(8)]
        for future in done:
            future.result()

    assert len(content) == source.size
    assert content == source.read_at(0, len(content))


def test_a_read_is_short_only_at_the_end(target: Target, opened: Callable[..., Source], content: bytes) -> None:
    source = opened(target.url(1))

    assert content[-3:] == source.read_at(SIZE - 3, 100)
    assert b"" == source.read_at(SIZE, 1)
    assert b"" == source.read_at(SIZE + (1 << 40), 1)


@pytest.mark.parametrize("block_size", [512, 4096])
def test_blocks_of_any_size_are_read_by_parts(
    target: Target, opened: Callable[..., Source], tmp_path: Path, content: bytes, block_size: int
) -> None:
    (tmp_path / "other").write_bytes(content[: 1 << 20])
    source = opened(target.add(2, tmp_path / "other", "--blocksize", str(block_size)))

    assert 1 << 20 == source.size
    for offset in (0, 1, block_size - 1, block_size, block_size + 1, 3 * block_size - 1):
        for length in (1, block_size - 1, block_size, block_size + 1, 2 * block_size + 2):
            assert content[offset : offset + length] == source.read_at(offset, length), (offset, length)


def test_two_names_of_one_lun_are_one_place(target: Target, opened: Callable[..., Source], tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(bytes(1 << 20))
    target.add(2, tmp_path / "other")
    one, same = opened(target.url(1)), opened(target.url(1).replace("127.0.0.1", "localhost"))

    assert one.place() == same.place()
    assert one.place() != opened(target.url(2)).place()


class TestPasswords:
    @pytest.fixture(autouse=True)
    def nothing_in_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for kind in ("", "TARGET_"):
            monkeypatch.delenv(f"LIBISCSI_CHAP_{kind}USERNAME", raising=False)
            monkeypatch.delenv(f"LIBISCSI_CHAP_{kind}PASSWORD", raising=False)

    def test_the_right_one_lets_in(
        self, target: Target, opened: Callable[..., Source], monkeypatch: pytest.MonkeyPatch, content: bytes
    ) -> None:
        target.ask_for_password("jane", "twelve-bytes")

        assert content[:9] == opened(target.url(1, secret="jane%twelve-bytes@")).read_at(0, 9)

        monkeypatch.setenv("LIBISCSI_CHAP_USERNAME", "jane")
        monkeypatch.setenv("LIBISCSI_CHAP_PASSWORD", "twelve-bytes")

        assert content[:9] == opened(target.url(1)).read_at(0, 9)

    @pytest.mark.parametrize("secret", ["", "jane%not-the-password@", "john%twelve-bytes@"])
    def test_another_one_does_not_and_is_not_shown(self, target: Target, secret: str) -> None:
        target.ask_for_password("jane", "twelve-bytes")

        error = refusal(target.url(1, secret=secret))

        assert errno.EACCES == error.errno
        assert "cannot log in: the user or the password is wrong, or missing" in str(error)
        assert "LIBISCSI_CHAP_PASSWORD" in str(error.hint)
        assert "not-the-password" not in f"{error} {error.hint}"

    def test_the_target_may_have_to_show_one_too(
        self, target: Target, opened: Callable[..., Source], content: bytes
    ) -> None:
        target.ask_for_password("jane", "twelve-bytes", outgoing=("disks", "of-the-target"))
        url = target.url(1, secret="jane%twelve-bytes@")

        source = opened(f"{url}?target_user=disks&target_password=of-the-target")

        assert content[:9] == source.read_at(0, 9)
        assert "of-the-target" not in source.name
        assert errno.EACCES == refusal(f"{url}?target_user=disks&target_password=of-another").errno


class TestRefusals:
    """Evidence: own fixture; one line for a person, with the errno a program would look at."""

    def test_no_such_target(self, target: Target) -> None:
        error = refusal(target.url(1).replace(target.iqn, "iqn.2024-01.example:none"))

        assert (errno.ENOENT, "there is no such target") == (error.errno, error.why)
        assert f"iscsi-ls -s iscsi://127.0.0.1:{target.port}" in str(error.hint)

    def test_no_such_lun(self, target: Target) -> None:
        error = refusal(target.url(7))

        assert (errno.ENOENT, "there is no such LUN") == (error.errno, error.why)

    def test_no_disk(self, target: Target) -> None:
        error = refusal(target.url(0))

        assert (errno.EMEDIUMTYPE, "not a disk, but a device of SCSI type 0xc") == (error.errno, error.why)

    def test_nobody_listens(self, target: Target) -> None:
        target.kill()
        error = refusal(target.url(1))

        assert (errno.ECONNREFUSED, "cannot connect") == (error.errno, error.what)

    def test_nobody_answers(self, target: Target) -> None:
        target.freeze()
        error = refusal(target.url(1), patience=0.3)

        assert (errno.ETIMEDOUT, "cannot connect") == (error.errno, error.what)

    def test_no_such_host(self) -> None:
        assert "cannot find the host no-such-host.invalid" in str(refusal("iscsi://no-such-host.invalid/iqn/1"))

    @pytest.mark.parametrize(
        "rest",
        [
            "",
            "h",
            "h/",
            "h/iqn",
            "h/iqn/",
            "h/iqn/x",
            "h/iqn/1/2",
            "h/iqn/99999",
            "h:x/iqn/1",
            "h:99999/iqn/1",
        ],
    )
    def test_no_url_of_a_lun(self, rest: str) -> None:
        assert "was expected" in str(refusal(f"iscsi://{rest}"))

    @pytest.mark.parametrize("word", ["header_digest", "header_digest=md5", "iser", "colour=red"])
    def test_an_unknown_word_after_the_question_mark(self, word: str) -> None:
        assert "cannot do what it says after ?" in str(refusal(f"iscsi://127.0.0.1/iqn/1?{word}"))

    def test_what_is_too_long_for_libiscsi(self) -> None:
        assert "too long" in str(refusal(f"iscsi://127.0.0.1/{'x' * 300}/1"))


def test_without_libiscsi_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qcowfs._iscsi", None)
    with pytest.raises(UnsupportedImage) as caught:
        open_url(parse_url("iscsi://127.0.0.1/iqn/1"), RemoteSettings())

    assert "iscsi://127.0.0.1/iqn/1: the protocol iscsi: qcowfs was built without libiscsi" == str(caught.value)
    assert "libiscsi-dev" in (caught.value.hint or "")
    assert "libiscsi-dev" in str(caught.value.hint)


class TestTroubles:
    @pytest.mark.expect_warnings
    def test_a_target_that_comes_back_answers_what_was_asked_before(
        self, target: Target, opened: Callable[..., Source], content: bytes
    ) -> None:
        source = opened(target.url(1))
        stop = threading.Event()

        def read_on(seed: int) -> int:
            count = 0
            while not stop.is_set():
                read_randomly(source, content, seed + count, 5)
                count += 1
            return count

        with ThreadPoolExecutor(4) as readers:
            done = [readers.submit(read_on, seed * 1000) for seed in range(4)]
            try:
                for _ in range(3):
                    time.sleep(0.1)
                    target.kill()
                    target.start()
                    source.read_at(0, 1)  # the session is back
            finally:
                stop.set()

        assert all(future.result() for future in done)

    @pytest.mark.expect_warnings
    def test_patience_ends_and_the_source_recovers(
        self, target: Target, opened: Callable[..., Source], content: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        source = opened(target.url(1), patience=SHORT)
        target.freeze()
        errors = [failure(source), failure(source)]
        target.thaw()
        deadline = time.monotonic() + LONG
        while time.monotonic() < deadline:
            try:
                again = source.read_at(5, 9)
                break
            except OSError:
                continue
        assert eventually(lambda: any("answers again" in line for line in caplog.messages))

        assert [errno.EIO, errno.EIO] == errors
        assert content[5:14] == again
        assert 1 == sum("does not answer" in line for line in caplog.messages)
        assert all(line.startswith(source.name) for line in caplog.messages)

    @pytest.mark.expect_warnings
    def test_a_target_that_is_gone_fails_reads_after_their_patience(
        self, target: Target, opened: Callable[..., Source], content: bytes
    ) -> None:
        source = opened(target.url(1), patience=0.4)
        target.kill()

        assert errno.EIO == failure(source)

        target.start()

        assert content[:1] == _eventually(lambda: source.read_at(0, 1))

    def test_close_lets_waiting_reads_go(self, target: Target, opened: Callable[..., Source]) -> None:
        source = opened(target.url(1), patience=300)
        target.freeze()
        with ThreadPoolExecutor(4) as readers:
            done: list[Future[bytes]] = [readers.submit(source.read_at, 4096 * number, 9) for number in range(4)]
            time.sleep(0.2)  # for them to wait; if they do not yet, they fail all the same
            source.close()
            errors = [future.exception() for future in done]

        assert [errno.EBADF] * 4 == [error.errno for error in errors if isinstance(error, OSError)]

    @pytest.mark.expect_warnings
    def test_another_unit_in_its_place_is_stale_for_ever(
        self, target: Target, opened: Callable[..., Source], tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        source = opened(target.url(1), patience=SHORT)
        target.kill()
        target.start()
        target.admin("--op", "update", "--mode", "logicalunit", "--tid", "1", "--lun", "1", "--params", "scsi_sn=other")
        target.kill()
        target.start()

        assert errno.ESTALE == failure(source)
        assert errno.ESTALE == failure(source, 9000)
        assert eventually(lambda: any("another logical unit" in line for line in caplog.messages))

    @pytest.mark.expect_warnings
    def test_a_unit_that_shrank_fails_only_what_is_gone(
        self, target: Target, opened: Callable[..., Source], tmp_path: Path, content: bytes
    ) -> None:
        (tmp_path / "smaller").write_bytes(content[: 1 << 20])
        source = opened(target.url(1), patience=SHORT)
        target.remove(1)
        target.add(1, tmp_path / "smaller")

        assert content[:9] == source.read_at(0, 9)
        assert SIZE == source.size
        assert errno.EIO == failure(source, 2 << 20)
        assert content[(1 << 20) - 9 : 1 << 20] == source.read_at((1 << 20) - 9, 9)


@pytest.mark.expect_warnings
def test_a_medium_error_is_of_its_range(
    target: Target, opened: Callable[..., Source], tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cut").write_bytes(content[: 1 << 20])
    source = opened(target.add(2, tmp_path / "cut"))
    os.truncate(tmp_path / "cut", 1 << 19)

    assert content[:9] == source.read_at(0, 9)
    assert [errno.EIO, errno.EIO] == [failure(source, 3 << 18), failure(source, (3 << 18) + 512)]
    assert content[(1 << 19) - 9 : 1 << 19] == source.read_at((1 << 19) - 9, 9)
    assert eventually(lambda: any("at offset 0xc0000" in line for line in caplog.messages))
    assert 1 == len(caplog.messages), "one line for one kind of error"


def test_holes_of_a_thin_unit_are_told(target: Target, opened: Callable[..., Source], tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(16 << 20)
        os.pwrite(file.fileno(), b"x" * 65536, 8 << 20)
    source = opened(target.add(2, tmp_path / "sparse", thin_provisioning="1"))
    disk = Disk([LayerMap.raw(source, depth=0, virtual_size=16 << 20)], 16 << 20, Cache(1 << 20))

    extents = [(extent.start, extent.length, extent.data) for extent in disk.extents(0, 16 << 20, 10)]

    start, length = 8 << 20, 65536
    assert [(0, start, False), (start, length, True), (start + length, start - length, False)] == extents


def _eventually(read: Callable[[], bytes]) -> bytes:
    deadline = time.monotonic() + LONG
    while True:
        try:
            return read()
        except OSError:
            if time.monotonic() > deadline:
                raise

"""Exports of real NBD servers, read while they run, fail, die and come back."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs._source import Source
from qcowfs._tables import LayerMap
from qcowfs.errors import SourceError
from qcowfs.source.nbd import open_url
from qcowfs.source.remote import RemoteSettings
from qcowfs.source.url import parse_url
from tests.support import need
from tests.support.mounts import wait_until
from tests.support.nbd import Server, certificates, free_port, hostile_server, nbdkit, newstyle, qemu_nbd

need("nbdkit", "qemu-nbd", "qemu-img")

MIB = 1 << 20
SIZE = 16 * MIB
LONG = 20.0  # seconds of patience where nothing is to fail


@pytest.fixture(scope="module")
def content() -> bytes:
    return random.Random(1).randbytes(SIZE)


@contextmanager
def opened(url: str, patience: float = LONG) -> Iterator[Source]:
    source = open_url(parse_url(url), RemoteSettings(patience=patience)).source
    try:
        yield source
    finally:
        source.close()


def refusal(url: str, patience: float = 5.0) -> SourceError:
    with pytest.raises(SourceError) as raised, opened(url, patience):
        pass
    assert "\n" not in str(raised.value)
    return raised.value


def read_error(source: Source, offset: int, length: int) -> int | None:
    with pytest.raises(OSError) as raised:
        source.read_at(offset, length)
    return raised.value.errno


def random_reads(source: Source, content: bytes, seed: int, count: int) -> None:
    choose = random.Random(seed)
    for _ in range(count):
        offset = choose.randrange(len(content))
        length = choose.choice((1, 511, 4096, 65536, 3 * MIB + 1))
        assert source.read_at(offset, length) == content[offset : offset + length]


class TestBytes:
    @pytest.mark.parametrize("filters", [[], ["--filter=blocksize-policy", "blocksize-minimum=4096"]])
    def test_are_equal_for_many_threads_at_once(
        self, filters: list[str], place: Path, image: Path, content: bytes
    ) -> None:
        policy = ["blocksize-error-policy=error"] if filters else []
        with nbdkit(place, *filters[:1], "file", image, *filters[1:], *policy) as server, opened(server.url) as source:
            assert source.size == SIZE
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda seed: random_reads(source, content, seed, 40), range(8)))

    def test_are_those_of_the_export_that_the_url_names(self, place: Path, image: Path, content: bytes) -> None:
        with (
            qemu_nbd(place, image, "-f", "raw", "-x", "an export/ä") as server,
            opened(server.url.replace("///", "///an%20export/%C3%A4")) as source,
        ):
            assert source.read_at(SIZE - 10, 100) == content[-10:]

    def test_come_over_tcp(self, image: Path, content: bytes) -> None:
        with nbdkit(free_port(), "file", image) as server, opened(server.url) as source:
            random_reads(source, content, 3, 20)

    def test_are_told_apart_by_place(self, place: Path, image: Path) -> None:
        with nbdkit(place, "file", image) as server, opened(server.url) as one:
            with opened(f"{server.url}".replace(str(place), f"{place.parent}/../{place.parent.name}/s")) as same:
                assert one.place() == same.place()
            with opened(server.url.replace("///", "///other")) as other:
                assert one.place() != other.place()


def runs(source: Source) -> list[tuple[int, bool]]:
    """Return where data (True) and holes begin, as a disk of these bytes tells it."""
    disk = Disk([LayerMap.raw(source, depth=0, virtual_size=source.size)], source.size, Cache(MIB))
    found: list[tuple[int, bool]] = []
    for extent in disk.extents(0, source.size, 10000):
        if not found or found[-1][1] != extent.data:
            found.append((extent.start, extent.data))
    return found


class TestHoles:
    def test_are_told_where_the_server_tells_them(self, place: Path, tmp_path: Path) -> None:
        path, data, far = tmp_path / "sparse", 64 << 10, 3 << 30
        with path.open("wb") as file:
            file.truncate(5 << 30)
            for offset in (MIB, far):
                file.seek(offset)
                file.write(b"x" * data)
        with qemu_nbd(place, path, "-f", "raw") as server, opened(server.url) as source:
            told = runs(source)

        assert [(0, False), (MIB, True), (MIB + data, False), (far, True), (far + data, False)] == told

    def test_are_told_in_all_their_number(self, place: Path, tmp_path: Path) -> None:
        """More than are kept of one answer."""
        path = tmp_path / "sparse"
        with path.open("wb") as file:
            for number in range(800):
                file.seek(number * 128 << 10)
                file.write(b"x" * 4096)
        with qemu_nbd(place, path, "-f", "raw") as server, opened(server.url) as source:
            told = [offset for offset, data in runs(source) if data]

        assert [number * 128 << 10 for number in range(800)] == told

    @pytest.mark.parametrize("words", [["--no-sr"], ["--filter=noextents"]])
    def test_are_data_where_it_does_not(self, words: list[str], place: Path) -> None:
        with nbdkit(place, *words, "memory", "1G") as server, opened(server.url) as source:
            assert [(0, True)] == runs(source)


class TestServerThatFails:
    @pytest.mark.expect_warnings
    def test_is_waited_for_while_it_starts_again(self, place: Path, image: Path, content: bytes) -> None:
        with nbdkit(place, "file", image) as server, opened(server.url) as source, ThreadPoolExecutor(4) as pool:
            reads = [pool.submit(random_reads, source, content, seed, 60) for seed in range(4)]
            for _ in range(3):
                server.kill()
                time.sleep(0.05)
                server.start()
            for read in reads:
                read.result()

    @pytest.mark.expect_warnings
    def test_is_an_error_once_patience_is_over_and_forgotten_when_it_is_back(
        self, place: Path, image: Path, content: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        with nbdkit(place, "file", image) as server, opened(server.url, 1.0) as source:
            server.kill()
            with ThreadPoolExecutor(4) as pool:
                errors = list(pool.map(lambda offset: read_error(source, offset * MIB, 4096), range(4)))
            server.start()
            assert source.read_at(5, 10) == content[5:15]
            assert [errno.EIO] * 4 == errors
            wait_until(lambda: "is back" in caplog.text, "no word of it")
        assert 2 == len(caplog.messages)
        assert f"{server.url}: " in caplog.messages[0]

    @pytest.mark.expect_warnings
    def test_is_never_read_again_if_it_comes_back_with_another_size(self, place: Path, content: bytes) -> None:
        with (
            nbdkit(place, "memory", "1M") as server,
            nbdkit(place.with_name("o"), "memory", "2M") as other,
            opened(server.url) as source,
        ):
            source.read_at(0, 10)
            server.kill()
            os.rename(place.with_name("o"), place)
            assert errno.ESTALE == read_error(source, 0, 10)
            other.kill()
            server.start()
            assert errno.ESTALE == read_error(source, 0, 10)

    @pytest.mark.expect_warnings
    def test_is_an_error_if_it_is_too_slow_and_that_passes(self, place: Path, image: Path, content: bytes) -> None:
        slow = ["--filter=delay", "file", image, "rdelay=30"]
        with nbdkit(place, *slow) as server, opened(server.url, 0.5) as source:
            assert errno.EIO == read_error(source, 0, 4096)
            with nbdkit(place.with_name("o"), "file", image):
                server.kill()
                os.rename(place.with_name("o"), place)
                assert source.read_at(0, 4096) == content[:4096]

    @pytest.mark.expect_warnings
    def test_is_an_error_where_it_says_so_and_only_there(self, place: Path, tmp_path: Path, content: bytes) -> None:
        """Within patience: it is asked once."""
        (tmp_path / "asked").touch()
        script = f"""case $1 in get_size) echo {SIZE};; open) echo h;; thread_model) echo parallel;;
            pread) echo $4 >> {tmp_path}/asked; [ $4 -ge {MIB} ] || {{ echo EIO bad >&2; exit 1; }}
                   head -c $3 /dev/zero;; *) exit 2;; esac"""
        (tmp_path / "export.sh").write_text("#!/bin/sh\n" + script)
        (tmp_path / "export.sh").chmod(0o755)
        with nbdkit(place, "sh", tmp_path / "export.sh") as server, opened(server.url) as source:
            assert errno.EIO == read_error(source, 0, 512)
            assert errno.EIO == read_error(source, MIB - 512, 1024)
            assert source.read_at(MIB, 4096) == bytes(4096)
        assert ["0", str(MIB - 512), str(MIB), str(MIB)] == sorted((tmp_path / "asked").read_text().split(), key=int)

    @pytest.mark.expect_warnings
    def test_ends_with_each_connection_and_is_asked_again(self, place: Path) -> None:
        """It answers one read and hangs up, in the middle of the next."""
        with hostile_server(place, _one_and_a_half) as url, opened(url) as source:
            for offset in range(0, 8 * 4096, 4096):
                assert source.read_at(offset, 4096) == offset.to_bytes(8, "big") * 512

    @pytest.mark.expect_warnings
    @pytest.mark.parametrize("seed", range(4))
    def test_is_an_error_if_what_it_answers_makes_no_sense(self, seed: int, place: Path) -> None:
        """Another handle, another magic number, an unknown error: never the bytes that come with it."""
        magic, error = ((0x67446698, 0), (0x668E33EF, 0), (0x12345678, 0), (0x67446698, 0xFFFFFFFF))[seed]

        def lie(client: socket.socket) -> None:
            newstyle(client, MIB)
            handle = struct.unpack(">8sQQI", client.recv(28, socket.MSG_WAITALL))[1] + (seed == 0)
            client.sendall(struct.pack(">IIQ", magic, error, handle) + b"x" * 4096)
            _drain(client)

        with hostile_server(place, lie) as url, opened(url, 0.5) as source:
            assert errno.EIO == read_error(source, 0, 4096)


def _one_and_a_half(client: socket.socket) -> None:
    newstyle(client, MIB)
    for whole in (True, False):
        _, handle, offset, length = struct.unpack(">8sQQI", client.recv(28, socket.MSG_WAITALL))
        reply = struct.pack(">IIQ", 0x67446698, 0, handle) + offset.to_bytes(8, "big") * (length // 8)
        client.sendall(reply if whole else reply[:100])


def _negotiated(client: socket.socket, size: int, blocks: tuple[int, int, int] | None = None) -> None:
    newstyle(client, size, blocks)
    _drain(client)


def _drain(client: socket.socket) -> None:
    while client.recv(1024):  # until it goes
        pass


class TestClose:
    def test_lets_every_read_fail_that_waits(self, place: Path) -> None:
        asked = threading.Semaphore(0)

        def listen(client: socket.socket) -> None:
            newstyle(client, MIB)
            while client.recv(28, socket.MSG_WAITALL):
                asked.release()

        with hostile_server(place, listen) as url, ThreadPoolExecutor(3) as pool:
            source = open_url(parse_url(url), RemoteSettings(patience=600)).source
            reads = [pool.submit(read_error, source, number * 4096, 4096) for number in range(3)]
            for _ in reads:
                asked.acquire()
            source.close()
            assert [errno.EBADF] * 3 == [read.result(timeout=30) for read in reads]

    @pytest.mark.expect_warnings
    def test_does_not_wait_for_a_server_that_is_gone(self, place: Path) -> None:
        with nbdkit(place, "memory", "1M") as server:
            source = open_url(parse_url(server.url), RemoteSettings(patience=600)).source
            server.kill()
            with ThreadPoolExecutor(1) as pool:
                read = pool.submit(read_error, source, 0, 4096)
                time.sleep(0.1)
                source.close()
                assert errno.EBADF == read.result(timeout=30)


class TestRefusals:
    """One line each, whose reason helps."""

    @pytest.mark.parametrize(
        "url,words",
        [
            ("nbd://127.0.0.1:1/", "Connection refused"),
            ("nbd://no-such-host.invalid/", "no-such-host.invalid"),
            ("nbd+unix:///?socket=/nonexistent/socket", "No such file"),
            ("nbd+unix:///", "?socket=PATH was expected"),
            ("nbd://localhost/?socket=/a", "goes with nbd+unix"),
            ("nbd://localhost/?tls-verify-peer=false", "tls-verify-peer means nothing"),
            ("nbds://localhost/?tls-certificates=/nonexistent", "/nonexistent/ca-cert.pem"),
            ("nbds://localhost/?tls-psk-file=/nonexistent", "/nonexistent: No such file"),
            ("nbds+unix:///?socket=/a&tls-certificates=/b", "only ?tls-psk-file=FILE"),
        ],
    )
    def test_of_what_cannot_be(self, url: str, words: str) -> None:
        assert words in str(refusal(url))

    def test_of_an_export_that_is_not_there_tells_which_are(self, place: Path, image: Path) -> None:
        with qemu_nbd(place, image, "-f", "raw", "-x", "disk\n") as server:
            failure = refusal(server.url.replace("///", "///other"))

        assert "no export named 'other'" in str(failure)
        assert "it has: disk\\x0a" == failure.hint

    def test_of_a_server_that_says_nothing_ends(self, place: Path) -> None:
        with hostile_server(place, lambda client: client.recv(1)) as url:
            assert errno.ETIMEDOUT == refusal(url, 0.3).errno

    @pytest.mark.parametrize("seed", range(20))
    def test_of_what_is_no_protocol(self, seed: int, place: Path) -> None:
        said = (b"NBDMAGICIHAVEOPT\0\3" if seed % 2 else b"") + random.Random(seed).randbytes(4096)
        with hostile_server(place, lambda client: client.sendall(said)) as url:
            assert str(refusal(url)).startswith(f"{url}: cannot open: ")

    @pytest.mark.parametrize("size", [1 << 63, (1 << 64) - 1])
    def test_of_a_size_that_no_disk_has(self, size: int, place: Path) -> None:
        with hostile_server(place, lambda client: _negotiated(client, size)) as url:
            assert "a size that no disk has" in str(refusal(url))

    def test_of_requests_of_a_few_bytes(self, place: Path) -> None:
        with hostile_server(place, lambda client: _negotiated(client, MIB, (1, 512, 512))) as url:
            assert "requests of a few bytes" in str(refusal(url))


@pytest.fixture(scope="module")
def papers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("certtool")
    directory = tmp_path_factory.mktemp("v")
    certificates(directory)
    return directory


class TestEncryption:
    @pytest.fixture
    def server(self, papers: Path, image: Path) -> Iterator[Server]:
        words = ["--tls=require", f"--tls-certificates={papers}/server", "file", image]
        with nbdkit(free_port(), *words) as server:
            yield server

    def test_by_the_right_authority(self, server: Server, papers: Path, content: bytes) -> None:
        with opened(f"{server.url}?tls-certificates={papers}/right") as source:
            random_reads(source, content, 5, 20)

    @pytest.mark.expect_warnings
    def test_is_made_again_with_a_new_connection(
        self, server: Server, papers: Path, content: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        with opened(f"{server.url}?tls-certificates={papers}/right") as source:
            server.kill()
            server.start()
            random_reads(source, content, 8, 5)
            wait_until(lambda: "is back" in caplog.text, "no word of it")
        assert "gnutls" not in caplog.text

    def test_by_the_wrong_one_is_refused(self, server: Server, papers: Path) -> None:
        failure = refusal(f"{server.url}?tls-certificates={papers}/wrong")

        assert "certificate" in str(failure)
        assert "another authority" in (failure.hint or "")

    def test_for_another_name_is_refused(self, server: Server, papers: Path) -> None:
        url = server.url.replace("localhost", "127.0.0.1")

        assert "certificate" in str(refusal(f"{url}?tls-certificates={papers}/right"))

    def test_without_an_authority_is_refused(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """libnbd would trust everybody."""
        monkeypatch.setattr("qcowfs.source.nbd._usual_places", lambda: ("/nonexistent",))

        assert "cannot tell who the server is" in str(refusal(server.url))

    def test_by_the_authority_in_the_usual_place(
        self, server: Server, papers: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("qcowfs.source.nbd._usual_places", lambda: ("/nonexistent", str(papers / "right")))
        with opened(server.url) as source:
            assert source.read_at(0, 100) == content[:100]

    def test_of_a_server_that_demands_it_and_of_one_that_has_it_not(
        self, server: Server, papers: Path, place: Path
    ) -> None:
        assert "nbds:// encrypts" == refusal(server.url.replace("nbds:", "nbd:")).hint
        with nbdkit(free_port(), "memory", "1M") as plain:
            url = plain.url.replace("nbd:", "nbds:")
            assert "refused TLS" in str(refusal(f"{url}?tls-certificates={papers}/right"))

    def test_by_keys_that_both_sides_know(self, place: Path, image: Path, content: bytes, tmp_path: Path) -> None:
        need("psktool")
        for name in ("right", "wrong"):
            keys = ["psktool", "-u", "alice", "-p", tmp_path / name]
            subprocess.run(keys, check=True, capture_output=True, timeout=60)
        words = ["--tls=require", f"--tls-psk={tmp_path}/right", "file", image]
        with nbdkit(place, *words) as server:
            url = server.url.replace("///", "//alice@/")
            with opened(f"{url}&tls-psk-file={tmp_path}/right") as source:
                random_reads(source, content, 6, 20)
            assert "gnutls_handshake" in str(refusal(f"{url}&tls-psk-file={tmp_path}/wrong"))

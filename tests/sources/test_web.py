"""Images on a real web server: nginx, over HTTP and TLS."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.sources.opening import error_of, open_object, opened, refusal
from tests.support import need
from tests.support.mounts import REPOSITORY
from tests.support.nginx import Nginx, nginx

CONTENT = random.Random(7).randbytes((3 << 20) + 17)
FAR = 5 << 30  # past what 32 bits hold


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    need("nginx")
    directory = tmp_path_factory.mktemp("v")
    forbidden = "location /forbidden/ { deny all; } location /get-only/ { limit_except GET { deny all; } }"
    with nginx(directory, server=forbidden) as running:
        for name in ("disk.raw", "a b#c?d%41;é.raw", "get-only/disk.raw"):
            path = running.root / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(CONTENT)
        with open(running.root / "far.raw", "wb") as far:
            far.seek(FAR)
            far.write(CONTENT)
        yield running


def test_every_byte_is_read_from_many_threads(server: Nginx) -> None:
    ranges = [(place, min(70_001, len(CONTENT) - place)) for place in range(0, len(CONTENT), 70_001)]
    with opened(f"{server.base}/disk.raw") as remote, ThreadPoolExecutor(16) as readers:
        parts = list(readers.map(lambda place: remote.source.read_at(*place), ranges))

        assert b"".join(parts) == CONTENT
        assert len(CONTENT) == remote.source.size


def test_a_read_past_the_end_is_short(server: Nginx) -> None:
    with opened(f"{server.base}/disk.raw") as remote:
        assert CONTENT[-5:] == remote.source.read_at(len(CONTENT) - 5, 100)
        assert b"" == remote.source.read_at(len(CONTENT), 100)
        assert b"" == remote.source.read_at(1 << 62, 1)


def test_what_lies_far_is_read(server: Nginx) -> None:
    with opened(f"{server.base}/far.raw") as remote:
        assert bytes(100) + CONTENT[:100] == remote.source.read_at(FAR - 100, 200)
        assert CONTENT[-100:] == remote.source.read_at(FAR + len(CONTENT) - 100, 200)


def test_one_read_may_be_large(server: Nginx) -> None:
    with opened(f"{server.base}/far.raw") as remote:
        assert bytes(30 << 20) + CONTENT == remote.source.read_at(FAR - (30 << 20), (30 << 20) + len(CONTENT))


def test_the_facts_are_those_of_the_file(server: Nginx) -> None:
    status = (server.root / "disk.raw").stat()
    with opened(f"{server.base}/disk.raw") as remote, opened(f"{server.base}/disk.raw") as again:
        assert int(status.st_mtime) * 10**9 == remote.modified_ns
        assert f'"{int(status.st_mtime):x}-{status.st_size:x}"' == remote.version
        assert remote.disk_size is None
        assert remote.source.place() == again.source.place()


def test_names_may_hold_anything(server: Nginx) -> None:
    with opened(f"{server.base}/a%20b%23c%3Fd%2541;é.raw") as remote:
        assert CONTENT[:9] == remote.source.read_at(0, 9)


def test_a_server_without_head_is_enough(server: Nginx) -> None:
    with opened(f"{server.base}/get-only/disk.raw") as remote:
        assert CONTENT[:9] == remote.source.read_at(0, 9)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/none.raw", "there is no such file"),
        ("/forbidden/x", "access denied"),
        ("/get-only/", "access denied"),
    ],
)
def test_what_cannot_be_opened_says_why(server: Nginx, path: str, why: str) -> None:
    assert f"{server.base}{path}: cannot open: {why}" == refusal(server.base + path)


@pytest.mark.expect_warnings
def test_a_file_that_is_replaced_is_stale(server: Nginx) -> None:
    path = server.root / "replaced.raw"
    path.write_bytes(CONTENT)
    with opened(f"{server.base}/replaced.raw") as remote:
        assert CONTENT[:9] == remote.source.read_at(0, 9)
        new = path.with_suffix(".new")
        new.write_bytes(bytes(len(CONTENT)))
        os.utime(new, (1, 1))
        new.replace(path)

        assert "ESTALE" == error_of(remote.source)
        path.write_bytes(CONTENT)
        assert "ESTALE" == error_of(remote.source, 1 << 20)


@pytest.mark.expect_warnings
def test_a_server_that_is_started_again_is_read_from_again(tmp_path: Path) -> None:
    need("nginx")
    with nginx(tmp_path) as first:
        (first.root / "disk.raw").write_bytes(CONTENT)
        remote = open_object(f"{first.base}/disk.raw", patience=1)
        assert CONTENT[:9] == remote.source.read_at(0, 9)
    assert "EIO" == error_of(remote.source)
    with nginx(tmp_path, port=int(first.base.rpartition(":")[2])):
        assert CONTENT[:9] == remote.source.read_at(0, 9)
    remote.source.close()


def test_tls_is_trusted_as_the_system_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("nginx", "openssl")
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    words = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *words, *names, *files], check=True, capture_output=True)
    with nginx(tmp_path, certificate=(certificate, key)) as server:
        (server.root / "disk.raw").write_bytes(CONTENT)
        why = refusal(f"{server.base}/disk.raw")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with opened(f"{server.base}/disk.raw") as remote:
            assert remote.source.read_at(0, len(CONTENT)) == CONTENT

        assert f"{server.base}/disk.raw: cannot open: its certificate is not trusted: self-signed certificate" == why
        plain = f"{server.base.replace('127.0.0.1', 'localhost')}/disk.raw"
        assert "its certificate is not trusted: Hostname mismatch" in refusal(plain)


def test_connections_are_kept(server: Nginx) -> None:
    before = server.connections()
    with opened(f"{server.base}/disk.raw") as remote:
        for place in range(50):
            remote.source.read_at(place * 1000, 10)

    assert server.connections() <= before + 2


def test_commands_that_count_clusters_read_an_image_there(server: Nginx) -> None:
    """They once waited in C with the GIL for a thread that needed it."""
    need("qemu-img")
    for words in ("create -q -f qcow2 IMAGE 1M", "snapshot -c one IMAGE"):
        words_there = words.replace("IMAGE", str(server.root / "disk.qcow2")).split()
        subprocess.run(["qemu-img", *words_there], check=True, timeout=60)
    for verb in ("list", "info"):
        command = [sys.executable, "-m", "qcowfs", verb, f"{server.base}/disk.qcow2"]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True)

        assert "one" in done.stdout

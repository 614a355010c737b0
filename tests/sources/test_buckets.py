"""What is particular to each kind of bucket, asked of a server of our own: addresses, generations, what is missing.

Google's store is judged by nothing else here: its emulators leave out headers that the real one always sends.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.sources.opening import error_of, opened, refusal
from tests.support.badhttp import Answer, BadServer, serve
from tests.support.mounts import REPOSITORY

CONTENT = random.Random(11).randbytes(10_001)
SECRET = "c2VjcmV0"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[BadServer]:
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_", "STORAGE_"))]:
        monkeypatch.delenv(name)
    with serve(CONTENT) as bad:
        yield bad


def test_an_object_of_google_is_read_by_its_generation(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"127.0.0.1:{server.port}")
    server.answers = [Answer(headers={"x-goog-generation": "1234567"})]
    with opened("gs://bucket/a b/ü?x") as remote:
        assert CONTENT[100:200] == remote.source.read_at(100, 100)
        assert '"first" 1234567' == remote.version

    assert "/bucket/a%20b%2F%C3%BC%3Fx" == server.requests[-1].target
    assert '"first"' == server.requests[-1].headers["if-match"]


@pytest.mark.expect_warnings
def test_another_generation_is_another_object(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.port}")
    server.answers = [Answer(headers={"x-goog-generation": number}) for number in ("1", "2")]
    with opened("gs://bucket/disk.raw") as remote:
        assert "ESTALE" == error_of(remote.source)


def test_a_blob_of_azure_is_read_with_a_signature(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ENDPOINT", f"http://127.0.0.1:{server.port}")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", SECRET)
    with opened("az://container/a b/ü?x") as remote:
        assert CONTENT[-100:] == remote.source.read_at(len(CONTENT) - 100, 200)

    assert "/container/a%20b/%C3%BC%3Fx" == server.requests[-1].target
    assert server.requests[-1].headers["authorization"].startswith("SharedKey account:")


@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
@pytest.mark.parametrize(
    "rest", ["user:secret@bucket/key", "bucket:80/key", "bucket", "bucket/", "/key", "bucket//key", "bucket/../key"]
)
def test_what_names_no_object_is_refused(scheme: str, rest: str) -> None:
    message = refusal(f"{scheme}://{rest}")

    assert ": cannot open: " in message
    assert "secret" not in message


def test_what_is_needed_to_sign_is_said(server: BadServer) -> None:
    assert "az://container/disk.raw: cannot open: the settings for this kind of store are wrong" == refusal(
        "az://container/disk.raw"
    )


@pytest.mark.parametrize(("package", "scheme"), [("obstore", "s3"), ("obstore", "gs"), ("botocore", "s3")])
def test_a_library_that_is_not_installed_is_one_line(package: str, scheme: str) -> None:
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from qcowfs.errors import UnsupportedImage\n"
        "from qcowfs.source.remote import RemoteSettings, open_remote\n"
        "from qcowfs.source.url import parse_url\n"
        f"try: open_remote(parse_url('{scheme}://bucket/disk.raw'), RemoteSettings())\n"
        "except UnsupportedImage as error: print(error, error.hint, sep='|')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=True
    )

    why = f"the protocol {scheme}: {package} is not installed"
    assert f"{scheme}://bucket/disk.raw: {why}|pip install 'qcowfs[objects]'\n" == done.stdout

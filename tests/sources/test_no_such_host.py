"""Hosts that nobody knows: one line that says so, whatever the protocol and whoever named the host."""

from __future__ import annotations

from pathlib import Path

import pytest

from qcowfs.chain import open_chain
from qcowfs.errors import SourceError
from qcowfs.gate import Policy
from tests.support import need
from tests.support.mounts import call, one_line
from tests.support.qemu import qemu
from tests.support.remotes import ENVIRONMENTS

HOST = "nowhere.invalid"  # RFC 2606: there never is one
URLS = [
    f"iscsi://{HOST}/iqn.2024-01.example:disks/1",
    f"nbd://{HOST}/disk",
    f"nbds://{HOST}/disk?tls-certificates=.",
    f"http://{HOST}/disk.qcow2",
    f"https://{HOST}/disk.qcow2",
    "s3://bucket/disk.qcow2",
    "gs://bucket/disk.qcow2",
    "az://container/disk.qcow2",
    f"ssh://{HOST}/disk.qcow2",
]
UNKNOWN = ("Name or service not known", "no address of ")
EXIT_STATUS = 10  # qcowfs(1): a server does not answer


def environment_of(url: str) -> dict[str, str]:
    """Return the variables that name the host where the URL does not."""
    scheme = url.partition(":")[0]
    return ENVIRONMENTS[scheme](HOST) if scheme in ENVIRONMENTS else {}


@pytest.fixture(autouse=True)
def _prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need("qemu-img", "qemu-nbd")
    (tmp_path / "ca-cert.pem").touch()  # nobody comes as far as to look into it
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("url", URLS)
def test_of_the_image_that_a_person_names(url: str) -> None:
    done = call("list", url, env=environment_of(url))

    line = one_line(done)
    assert done.returncode == EXIT_STATUS
    assert line.startswith(f"qcowfs: {url.partition('?')[0]}")
    assert any(word in line for word in UNKNOWN), line


@pytest.mark.parametrize("url", [url for url in URLS if "?" not in url])
def test_of_a_backing_file(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of(url).items():
        monkeypatch.setenv(name, value)
    qemu("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", url, "-F", "raw", tmp_path / "top.qcow2", "1M")
    with pytest.raises(SourceError) as raised:
        open_chain(str(tmp_path / "top.qcow2"), Policy(allow_any=True))

    assert url in str(raised.value)
    assert any(word in str(raised.value) for word in UNKNOWN), raised.value

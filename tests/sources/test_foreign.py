"""Formats that QEMU reads for us: their bytes are QEMU's, nothing that they name is opened, no child is left behind."""

from __future__ import annotations

import getpass
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs.chain import Chain, open_chain
from qcowfs.errors import CorruptImage, ImageError, SourceError, UnsupportedImage
from qcowfs.gate import Policy
from qcowfs.source.foreign import FORMATS, open_url
from qcowfs.source.remote import RemoteSettings
from qcowfs.source.url import parse_url
from tests.support import lacking, need
from tests.support.mounts import is_running, wait_until
from tests.support.qemu import qemu
from tests.support.ssh import ssh_server

need("qemu-nbd", "qemu-img")

MIB = 1 << 20
SIZE = 8 * MIB
VARIANTS = [
    *((image_format, "") for image_format in FORMATS),
    ("vmdk", "subformat=streamOptimized"),
    ("vpc", "subformat=fixed"),
    ("vdi", "static=on"),
    ("vhdx", "subformat=fixed"),
]


@pytest.fixture(scope="module")
def content() -> bytes:
    choose = random.Random(7)
    return b"".join(choose.choice((bytes(65536), choose.randbytes(65536))) for _ in range(SIZE >> 16))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    path = tmp_path_factory.mktemp("v") / "disk.raw"
    path.write_bytes(content)
    return path


def made(disk: Path, image: Path, image_format: str, options: str = "") -> Path:
    words = ["-o", options] if options else []
    qemu("qemu-img", "convert", "-f", "raw", "-O", image_format, *words, disk, image)
    return image


def children() -> list[int]:
    """Return the programs of QEMU that this process runs."""
    found = []
    for process in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = process.read_text().partition(")")
        except OSError:
            continue
        if name.endswith("(qemu-nbd") and rest.split()[1] == str(os.getpid()):
            found.append(int(process.parent.name))
    return found


def refusal(image: Path, **words: str) -> ImageError:
    with pytest.raises(ImageError) as raised:
        open_chain(str(image), Policy(), **words)  # type: ignore[arg-type]
    assert "\n" not in f"{raised.value}{raised.value.hint}"
    assert [] == children()
    return raised.value


class TestBytes:
    @pytest.mark.parametrize(("image_format", "options"), VARIANTS)
    def test_are_those_that_qemu_converted(
        self, image_format: str, options: str, tmp_path: Path, disk: Path, content: bytes
    ) -> None:
        image = made(disk, tmp_path / "image", image_format, options)
        with open_chain(str(image), Policy()) as chain:
            (layer,) = chain.layers
            assert image_format == layer.format
            assert layer.source.read_at(0, SIZE) == content
            assert layer.virtual_size >= SIZE  # vpc: whole cylinders
        assert [] == children()

    def test_of_a_backing_file_are_those_too(self, tmp_path: Path, disk: Path, content: bytes) -> None:
        made(disk, tmp_path / "base.vdi", "vdi")
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.vdi", "-F", "vdi", tmp_path / "top.qcow2")
        with open_chain(str(tmp_path / "top.qcow2"), Policy()) as chain:
            assert ["qcow2", "vdi"] == [layer.format for layer in chain.layers]
            assert chain.layers[1].source.read_at(MIB, MIB) == content[MIB : 2 * MIB]


class TestNamesInImages:
    """QEMU would open what they name."""

    def test_of_extents_are_not_followed(self, tmp_path: Path) -> None:
        image = tmp_path / "image.vmdk"
        image.write_text(
            '# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
            'RW 2 FLAT "/etc/passwd" 0\n'
        )
        assert "of several files" in str(refusal(image))

    def test_of_extents_in_an_embedded_text_are_not_followed(self, tmp_path: Path, disk: Path) -> None:
        """A header with a capacity of 0 makes QEMU read the text after it like a file of its own."""
        secret, image = tmp_path / "secret", made(disk, tmp_path / "image.vmdk", "vmdk")
        secret.write_bytes(b"secret" + bytes(1018))
        with image.open("r+b") as file:
            file.seek(12)
            file.write(bytes(8))
            file.seek(512)
            text = 'version=1\nCID=00000001\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
            file.write(f'{text}RW 2 FLAT "{secret}" 0\n\0'.encode())
        qemu("qemu-img", "convert", "-f", "vmdk", "-O", "raw", image, tmp_path / "followed")
        assert (tmp_path / "followed").read_bytes().startswith(b"secret")
        assert "of several files" in str(refusal(image))

    def test_are_refused_by_the_kernel_if_by_nobody_else(
        self, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = "from qcowfs import _sandbox; print(_sandbox.see_only([]))"
        if subprocess.check_output([sys.executable, "-c", program]) != b"True\n":
            lacking("this kernel has no Landlock")
        monkeypatch.setattr("qcowfs.source.foreign.require_alone", lambda *_: None)
        image = tmp_path / "image.vmdk"
        text = 'version=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\n'
        image.write_text(f'# Disk DescriptorFile\n{text}RW 2 FLAT "{disk}" 0\n')
        qemu("qemu-img", "info", "-f", "vmdk", image)
        assert f"QEMU says: Could not open '{disk}': Permission denied" in str(refusal(image))

    @pytest.mark.parametrize("image_format", ["vmdk", "qed"])
    def test_of_parents_are_not_followed_and_not_left_out(self, image_format: str, tmp_path: Path, disk: Path) -> None:
        made(disk, tmp_path / "parent", image_format)
        words = ["-f", image_format, "-b", "parent", "-F", image_format]
        qemu("qemu-img", "create", "-q", *words, tmp_path / "child")

        failure = refusal(tmp_path / "child")

        assert isinstance(failure, UnsupportedImage)
        assert "parent" in str(failure) or "backing file" in str(failure)

    def test_of_vpc_parents_are_not_left_out(self, tmp_path: Path, disk: Path) -> None:
        image = made(disk, tmp_path / "image", "vpc")
        with image.open("r+b") as file:
            file.seek(60)
            file.write((4).to_bytes(4, "big"))  # differencing
        assert "with a parent" in str(refusal(image))


class TestFormats:
    def test_that_nobody_recorded_are_not_guessed_of_a_backing_file(self, tmp_path: Path, disk: Path) -> None:
        """A guest can write any of them to the start of its disk."""
        made(disk, tmp_path / "base", "vdi")
        qemu("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "top", "8M")
        qemu("qemu-img", "rebase", "-u", "-b", "base", "-F", "raw", tmp_path / "top")
        header = (tmp_path / "top").read_bytes()
        (tmp_path / "top").write_bytes(header.replace(b"\xe2\x79\x2a\xca\0\0\0\3raw", b"\0\0\0\1\0\0\0\3raw", 1))
        assert "does not record that it is one" in str(refusal(tmp_path / "top"))

    def test_that_a_person_says_wrongly_are_an_error(self, tmp_path: Path, disk: Path) -> None:
        failure = refusal(disk, image_format="vhdx")

        assert isinstance(failure, SourceError)
        assert f"{disk}: cannot open a vhdx image: QEMU says: " in str(failure)
        assert "/proc/self" not in str(failure)
        assert isinstance(refusal(disk, image_format="vpc"), CorruptImage)

    def test_need_qemu(self, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        image = made(disk, tmp_path / "image", "vdi")
        monkeypatch.setenv("PATH", "/nonexistent")

        failure = refusal(image)

        assert f"{image}: a vdi image: QEMU reads it, and qemu-nbd is not installed" == str(failure)
        assert "install it (Debian: qemu-utils)" == failure.hint


class TestProtocols:
    def test_are_opened_by_qemu_which_says_what_is_wrong(self) -> None:
        with pytest.raises(ImageError) as raised:
            open_url(parse_url("ssh://127.0.0.1:1/image"), RemoteSettings(patience=20))
        assert str(raised.value).startswith("ssh://127.0.0.1:1/image: ")
        assert [] == children()

    def test_are_read_by_qemu(self, disk: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        with ssh_server(disk.parent) as (port, agent):
            monkeypatch.setenv("SSH_AUTH_SOCK", agent)
            url = f"ssh://{getpass.getuser()}@127.0.0.1:{port}{disk}?host_key_check=no"
            source = open_url(parse_url(url), RemoteSettings(patience=30)).source
            assert source.read_at(MIB, MIB) == content[MIB : 2 * MIB]
            source.close()
            with pytest.raises(SourceError, match="No such file"):
                open_url(parse_url(url.replace("disk.raw", "other")), RemoteSettings(patience=30))

    @pytest.mark.expect_warnings
    def test_are_read_by_another_child_if_one_ends(
        self, disk: Path, content: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        need("sshd", "ssh-agent")
        with ssh_server(tmp_path_factory.mktemp("v")) as (port, agent):
            monkeypatch.setenv("SSH_AUTH_SOCK", agent)
            url = f"ssh://{getpass.getuser()}@127.0.0.1:{port}{disk}?host_key_check=no"
            source = open_url(parse_url(url), RemoteSettings(patience=30)).source
            (child,) = children()
            os.kill(child, signal.SIGKILL)

            assert source.read_at(MIB, MIB) == content[MIB : 2 * MIB]
            assert [child] != children()
            source.close()
            assert [] == children()

    def test_rbd_has_a_form_of_its_own(self) -> None:
        with pytest.raises(SourceError, match="not a URL of RBD"):
            open_url(parse_url("rbd://pool/a/b/c"), RemoteSettings())


class TestTheChild:
    @pytest.fixture
    def chain(self, tmp_path: Path, disk: Path) -> Iterator[Chain]:
        with open_chain(str(made(disk, tmp_path / "image", "vdi")), Policy()) as chain:
            yield chain

    @pytest.mark.expect_warnings
    def test_may_end_and_every_read_is_an_error(self, chain: Chain) -> None:
        (child,) = children()
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: not is_running(child), "it does not die")
        with pytest.raises(OSError):
            chain.layers[0].source.read_at(0, 512)

    def test_has_no_socket_that_others_could_find(
        self, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        image = made(disk, tmp_path / "image", "vdi")
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        with open_chain(str(image), Policy()):
            assert [image] == list(tmp_path.iterdir())

    def test_ends_with_a_process_that_is_killed(self, tmp_path: Path, disk: Path) -> None:
        image = made(disk, tmp_path / "image", "vdi")
        program = (
            "import sys; from qcowfs.chain import open_chain; from qcowfs.gate import Policy\n"
            f"chain = open_chain({str(image)!r}, Policy()); print('open', flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "open\n"
            (child,) = [
                int(task) for task in Path(f"/proc/{process.pid}/task").iterdir() for task in _children_of(task)
            ]
            process.kill()
            process.wait()
            wait_until(lambda: not is_running(child), "it lives on")


def _children_of(task: Path) -> list[str]:
    return (task / "children").read_text().split()

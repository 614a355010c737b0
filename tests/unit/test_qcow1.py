"""The header of a qcow version 1 image as an object: real images, as `qemu-img info` has them, and forged ones. R15."""

from __future__ import annotations

import errno
import json
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from qcowfs.errors import CorruptImage, NotAnImage, SourceError
from qcowfs.qcow1 import Header, read_header
from tests.support import forge, need
from tests.support.forge import BytesSource
from tests.support.qemu import qemu


def compare(path: Path) -> Header:
    """The header is what QEMU says; returns it."""
    need("qemu-img")
    header = read_header(BytesSource(path.read_bytes()))
    said = json.loads(qemu("qemu-img", "info", "--output=json", "-f", "qcow", path).stdout)
    name = said.get("backing-filename")

    assert said["virtual-size"] == header.virtual_size
    assert said["cluster-size"] == header.cluster_size
    assert said.get("encrypted", False) is header.encrypted
    assert header.backing_name == (name.encode() if name else None)
    return header


@pytest.mark.parametrize("size", [512, 1 << 20, 1000003, 1 << 32, (1 << 40) + 512])
def test_r15_images_of_qemu_img(tmp_path: Path, size: int) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow"
    qemu("qemu-img", "create", "-q", "-f", "qcow", path, str(size))

    header = compare(path)

    assert (header.cluster_bits, header.l2_bits) == (12, 9)
    assert header.l1_entries == -(-size // (1 << 21))
    assert header.l1_offset == 48


def test_r15_an_overlay_of_qemu_img(tmp_path: Path) -> None:
    """Its clusters have 512 bytes, so that little is copied up."""
    need("qemu-img")
    path, base = tmp_path / "image.qcow", tmp_path / "base.raw"
    base.write_bytes(bytes(1 << 20))
    qemu("qemu-img", "create", "-q", "-f", "qcow", "-b", base.name, "-F", "raw", path)

    header = compare(path)

    assert header.backing_name == b"base.raw"
    assert (header.cluster_bits, header.l2_bits) == (9, 12)


def test_r17_an_encrypted_image_can_be_described(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow"
    options = "encrypt.format=aes,encrypt.key-secret=k"
    qemu("qemu-img", "create", "-q", "--object", "secret,id=k,data=p", "-f", "qcow", "-o", options, path, "1M")

    assert compare(path).encrypted


@pytest.mark.parametrize("cluster_bits", [9, 16])
@pytest.mark.parametrize("l2_bits", [6, 13])
def test_r15_the_l1_table_is_as_long_as_the_size_needs(tmp_path: Path, cluster_bits: int, l2_bits: int) -> None:
    path = tmp_path / "image.qcow"
    reach = 1 << (cluster_bits + l2_bits)
    for size, entries in ((2, 1), (reach, 1), (reach + 1, 2), (5 * reach, 5)):
        path.write_bytes(forge.qcow1(cluster_bits=cluster_bits, l2_bits=l2_bits, size=size))

        assert compare(path).l1_entries == entries


@pytest.mark.parametrize("name", [b"x", b"base\xff.raw", b"x" * 1023])
def test_r15_backing_names_are_any_bytes(name: bytes) -> None:
    assert read_header(BytesSource(forge.qcow1(backing_name=name))).backing_name == name


@pytest.mark.parametrize(("stored", "read"), [(b"base.raw\0junk", b"base.raw"), (b"\0base.raw", None)])
def test_r15_a_backing_name_ends_at_its_first_nul(stored: bytes, read: bytes | None) -> None:
    assert read_header(BytesSource(forge.qcow1(backing_name=stored))).backing_name == read


def test_a_header_is_frozen() -> None:
    header = read_header(BytesSource(forge.qcow1()))

    with pytest.raises(FrozenInstanceError):
        header.size = 1  # type: ignore[misc]


@pytest.mark.parametrize("data", [b"", b"QFI\xfb", b"QFI\xfb\0\0\0", bytes(512)])
def test_r15_what_is_no_image(data: bytes) -> None:
    with pytest.raises(NotAnImage, match=r"^forged\.qcow2: not a qcow image"):
        read_header(BytesSource(data))


def test_r15_version_2_is_another_format() -> None:
    with pytest.raises(NotAnImage, match="version 1"):
        read_header(BytesSource(forge.qcow2(version=2)))


def test_r30_a_cut_header_says_where_it_ends() -> None:
    with pytest.raises(CorruptImage, match="it ends at 0x2f, 0x30 bytes were expected"):
        read_header(BytesSource(forge.qcow1()[:47]))


def test_a_source_that_fails_is_a_source_error_with_its_errno() -> None:
    class FailingSource(BytesSource):
        def read_at(self, offset: int, length: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(SourceError, match="cannot read the header: Input/output error") as caught:
        read_header(FailingSource(b""))

    assert caught.value.errno == errno.EIO

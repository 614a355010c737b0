"""The header of a qcow2 image as objects: real images compared with `qemu-img info`, and forged ones. R1 to R14."""

from __future__ import annotations

import errno
import json
import random
import struct
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from qcowfs import limits
from qcowfs.errors import CorruptImage, NotAnImage, SourceError
from qcowfs.qcow2.header import BitmapsExtension, Header, read_header
from tests.support import forge, need
from tests.support.forge import BytesSource, extension, feature_name
from tests.support.qemu import qemu

CLUSTER = 1 << 16


class CountingSource(BytesSource):
    """Counts what is read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.bytes_read = 0

    def read_at(self, offset: int, length: int) -> bytes:
        data = super().read_at(offset, length)
        self.bytes_read += len(data)
        return data


class FailingSource(BytesSource):
    def read_at(self, offset: int, length: int) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


def header_of(path: Path) -> Header:
    return read_header(BytesSource(path.read_bytes()))


def forged(**fields: Any) -> Header:
    return read_header(BytesSource(forge.qcow2(**fields)))


def info(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu("qemu-img", "info", "--output=json", "-f", "qcow2", path).stdout)
    return found


def as_qemu_says(header: Header) -> dict[str, Any]:
    """Return what `qemu-img info` has of a header."""
    data: dict[str, Any] = {"compat": header.compat, "compression-type": header.compression_name}
    data["refcount-bits"] = header.refcount_bits
    if header.version == 3:
        data |= {"lazy-refcounts": header.lazy_refcounts, "corrupt": header.corrupt, "extended-l2": header.extended_l2}
    if header.data_file_name is not None:
        data |= {"data-file": header.data_file_name.decode(), "data-file-raw": header.data_file_raw}
    found: dict[str, Any] = {"virtual-size": header.virtual_size, "cluster-size": header.cluster_size}
    found |= {"dirty-flag": header.dirty, "format-specific": {"type": "qcow2", "data": data}}
    if header.backing_name is not None:
        found["backing-filename"] = header.backing_name.decode()
    if header.backing_format is not None:
        found["backing-filename-format"] = header.backing_format.decode()
    return found


def compare(path: Path) -> Header:
    """The header is what QEMU says; returns it."""
    header = header_of(path)
    said = info(path)
    unread = {"filename", "format", "actual-size", "full-backing-filename", "snapshots"}

    assert {key: value for key, value in said.items() if key not in unread} == as_qemu_says(header)
    return header


OPTIONS = {
    "version 2": "compat=0.10",
    "version 3": "compat=1.1",
    "512 B": "cluster_size=512",
    "512 B, version 2": "compat=0.10,cluster_size=512",
    "2 MiB": "cluster_size=2M",
    "lazy": "lazy_refcounts=on",
    "zstd": "compression_type=zstd",
    "extended": "extended_l2=on",
    "extended 16 KiB": "extended_l2=on,cluster_size=16k",
    "extended 2 MiB zstd": "extended_l2=on,cluster_size=2M,compression_type=zstd",
    **{f"{1 << order}-bit refcounts": f"refcount_bits={1 << order}" for order in range(7)},
}


@pytest.mark.parametrize("size", [0, 512, 1000448, 1 << 30])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_r1_to_r14_options_of_qemu_img(tmp_path: Path, options: str, size: int) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, str(size))

    header = compare(path)

    assert not header.encrypted
    assert not header.external_data
    assert header.snapshots_count == 0
    assert header.l1_entries * header.l2_entries * header.cluster_size >= size
    assert header.l2_entries * header.l2_entry_size == header.cluster_size


@pytest.mark.parametrize("seed", range(30))
def test_r1_to_r14_random_options(tmp_path: Path, seed: int) -> None:
    """Whatever qemu-img makes of a seed's options is read as QEMU reads it."""
    need("qemu-img")
    generator = random.Random(seed)
    path, base = tmp_path / "image.qcow2", tmp_path / "base.raw"
    base.write_bytes(bytes(1 << 20))
    version = generator.choice(["0.10", "1.1"])
    options = [f"compat={version}", f"cluster_size={1 << generator.randrange(14, 22)}"]
    if version == "1.1":
        options.append(f"refcount_bits={1 << generator.randrange(7)}")
        options += generator.sample(["extended_l2=on", "compression_type=zstd"], generator.randrange(3))
        options += generator.choice([[], [f"data_file={tmp_path / 'd.raw'}"], ["lazy_refcounts=on"]])
    backing = generator.choice([[], ["-b", base.name, "-F", "raw"]])
    size = generator.randrange(1 << generator.randrange(9, 45))
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", ",".join(options), *backing, path, str(size))

    header = compare(path)

    assert header.virtual_size == -(-size // 512) * 512
    assert header.backing_format == (b"raw" if backing else None)


def test_r5_qemu_floors_a_size_to_whole_sectors(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    path.write_bytes(forge.qcow2(size=1000003))

    header = compare(path)

    assert (header.size, header.virtual_size) == (1000003, 999936)


@pytest.mark.parametrize("raw", [True, False])
def test_r38_r39_an_external_data_file(tmp_path: Path, raw: bool) -> None:
    need("qemu-img")
    path, data = tmp_path / "image.qcow2", tmp_path / "data.raw"
    options = f"data_file={data},data_file_raw={'on' if raw else 'off'}"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, "1M")

    header = compare(path)

    assert header.external_data
    assert header.data_file_raw is raw


def test_r10_r11_marks_of_a_dirty_and_corrupt_image(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    path.write_bytes(forge.qcow2(incompatible_features=3))

    header = compare(path)

    assert header.dirty
    assert header.corrupt


def test_r9_names_of_features_as_qemu_writes_them(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "1M")

    names = header_of(path).feature_names

    assert names[0, 0] == "dirty bit"
    assert names[1, 0] == "lazy refcounts"
    assert names[2, 0] == "bitmaps"


def test_r9_the_first_name_of_a_bit_counts() -> None:
    table = feature_name(0, 0, b"first\0junk") + feature_name(0, 0, b"second") + feature_name(2, 0, b"\xff\n")

    names = forged(extensions=[(forge.FEATURE_NAMES, table + b"a piece of another")]).feature_names

    assert dict(names) == {(0, 0): "first", (2, 0): "\udcff\n"}


def test_r2_version_2_reads_nothing_of_version_3() -> None:
    """What would be features and a refcount order is the first extension's data."""
    header = forged(version=2, extensions=[(0xFFFF, b"\xff" * 32), (forge.BACKING_FORMAT, b"raw")])

    assert (header.incompatible, header.compatible, header.autoclear) == (0, 0, 0)
    assert (header.refcount_order, header.header_length, header.zstd) == (4, 72, False)
    assert header.backing_format == b"raw"


@pytest.mark.parametrize("length", [104, 112, 120])
def test_r3_extensions_follow_the_header_wherever_it_ends(length: int) -> None:
    header = forged(header_length=length, extensions=[(forge.BACKING_FORMAT, b"qcow2")])

    assert header.header_length == length
    assert header.backing_format == b"qcow2"


@pytest.mark.parametrize("name", [b"x", b"base\xff\xfe.qcow2", "grün.qcow2".encode(), b"x" * 1023])
def test_r6_backing_names_are_any_bytes(name: bytes) -> None:
    assert forged(backing_name=name).backing_name == name


@pytest.mark.parametrize(("stored", "read"), [(b"base.raw\0junk", b"base.raw"), (b"\0base.raw", None), (b"\0", None)])
def test_r6_a_name_ends_at_its_first_nul(stored: bytes, read: bytes | None) -> None:
    header = forged(backing_name=stored, extensions=[(forge.BACKING_FORMAT, stored), (forge.DATA_FILE, stored)], size=0)

    assert (header.backing_name, header.backing_format, header.data_file_name) == (read, read, read)


def test_r7_extensions_end_before_the_backing_name() -> None:
    """A name that reads like an extension is none."""
    header = forged(backing_name=extension(forge.DATA_FILE, b"data.raw"), extensions=extension(7, b"12345678"))

    assert header.data_file_name is None


def test_r7_nothing_is_read_after_the_end_of_the_list() -> None:
    extensions = extension(0, b"") + extension(forge.BACKING_FORMAT, b"raw")

    assert forged(extensions=extensions).backing_format is None


def test_r7_data_is_padded_to_8_bytes() -> None:
    extensions = [(7, b"x" * length) for length in range(18)] + [(forge.BACKING_FORMAT, b"raw")]

    assert forged(extensions=extensions).backing_format == b"raw"


def test_r8_the_bitmaps_extension() -> None:
    data = forge.bitmaps_extension(3, 96, 5 * CLUSTER)

    header = forged(extensions=[(forge.BITMAPS, data)])

    assert header.bitmaps == BitmapsExtension(count=3, reserved=0, directory_size=96, directory_offset=5 * CLUSTER)
    assert not header.bitmaps_valid
    assert forged(extensions=[(forge.BITMAPS, data)], autoclear_features=1).bitmaps_valid


@pytest.mark.parametrize(("method", "name"), [(1, "aes"), pytest.param(2, "luks", marks=pytest.mark.slow)])
def test_r32_r37_encrypted_images_can_be_described(tmp_path: Path, method: int, name: str) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    secret = ["--object", "secret,id=k,data=passw0rd"]
    options = f"encrypt.format={name},encrypt.key-secret=k" + (",encrypt.iter-time=100" if name == "luks" else "")
    qemu("qemu-img", "create", "-q", *secret, "-f", "qcow2", "-o", options, path, "1M")

    header = header_of(path)

    assert header.encrypted
    assert header.crypt_method == method
    assert info(path)["encrypted"] is True
    assert info(path)["virtual-size"] == header.virtual_size


def test_a_header_is_frozen() -> None:
    header = forged()

    with pytest.raises(FrozenInstanceError):
        header.size = 1  # type: ignore[misc]
    with pytest.raises(TypeError):
        header.feature_names[0, 0] = "dirty"  # type: ignore[index]


@pytest.mark.parametrize("cluster_bits", [9, 16, 21])
def test_an_ordinary_header_costs_one_small_read(cluster_bits: int) -> None:
    source = CountingSource(forge.qcow2(cluster_bits=cluster_bits, backing_name=b"base.raw"))

    assert read_header(source).backing_name == b"base.raw"
    assert source.bytes_read <= 4096


def test_r7_a_long_list_of_extensions_is_read_to_its_end() -> None:
    """In reads that double, not one for each extension."""
    image = bytearray(forge.qcow2(cluster_bits=21))
    for place in range(112, 1 << 20, 8):
        struct.pack_into(">II", image, place, 7, 0)
    image[1 << 20 : (1 << 20) + 16] = extension(forge.BACKING_FORMAT, b"raw")
    source = CountingSource(bytes(image))

    assert read_header(source).backing_format == b"raw"
    assert source.bytes_read < 5 << 20


@pytest.mark.parametrize("data", [b"", b"Q", b"QFI", bytes(512), b"\x7fELF" + bytes(508)])
def test_r1_what_is_no_image(data: bytes) -> None:
    with pytest.raises(NotAnImage, match=r"^forged\.qcow2: not a qcow2 image: it does not start with QFI"):
        read_header(BytesSource(data))


def test_a_source_that_fails_is_a_source_error_with_its_errno() -> None:
    with pytest.raises(SourceError, match="cannot read the header: Input/output error") as caught:
        read_header(FailingSource(b""))

    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("length", [4, 8, 72, 103])
def test_r30_a_cut_header_says_where_it_ends(length: int) -> None:
    with pytest.raises(CorruptImage, match=f"it ends at {length:#x}, 0x(48|68) bytes were expected"):
        read_header(BytesSource(forge.qcow2()[:length]))


def test_r5_r61_the_largest_disk_is_within_the_limits() -> None:
    """What the L1 cap allows in clusters of 2 MiB is less than the cap on sizes, so that one never bites first."""
    largest = limits.MAX_L1_SIZE // 8 << (21 + 18)

    assert largest < limits.MAX_VIRTUAL_SIZE

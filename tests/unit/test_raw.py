"""Raw images, and what never is taken for one by guessing. R45, R46."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qcowfs import raw
from qcowfs._source import FileSource
from tests.support import forge, lacking, need
from tests.support.forge import BytesSource
from tests.support.qemu import qemu

SECTOR = 512


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1000003, (1 << 20) - 1, 1 << 20])
def test_r46_a_raw_disk_has_whole_sectors(tmp_path: Path, size: int) -> None:
    need("qemu-img")
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * size)
    said = json.loads(qemu("qemu-img", "info", "--output=json", "-f", "raw", path).stdout)

    assert said["virtual-size"] == raw.virtual_size(BytesSource(path.read_bytes()))


def test_r46_a_sparse_raw_disk_of_tebibytes(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.touch()
    os.truncate(path, (8 << 40) + 1)
    source = FileSource(os.open(path, os.O_RDONLY), str(path))

    assert raw.virtual_size(source) == (8 << 40) + SECTOR
    source.close()


@pytest.mark.parametrize("image_format", ["vmdk", "vdi", "vpc", "vhdx", "qed", "parallels"])
def test_r45_formats_of_qemu_that_are_no_raw_disks(tmp_path: Path, image_format: str) -> None:
    need("qemu-img")
    path = tmp_path / "image"
    done = qemu("qemu-img", "create", "-q", "-f", image_format, path, "16M", check=False)
    if b"Unknown file format" in done.stderr or b"not supported" in done.stderr:
        lacking(f"this qemu-img does not make {image_format}")

    assert raw.foreign_format(path.read_bytes()[: raw.PROBE_LENGTH]) == image_format


@pytest.mark.slow
def test_r45_a_luks_volume_is_no_raw_disk(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "image"
    words = ["--object", "secret,id=k,data=p", "-f", "luks", "-o", "key-secret=k,iter-time=100"]
    qemu("qemu-img", "create", "-q", *words, path, "1M")

    assert raw.foreign_format(path.read_bytes()[: raw.PROBE_LENGTH]) == "luks"


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 80, b"QFI", b"QE", forge.qcow2()[:80], forge.qcow1()[:80], b"\xeb\x3c\x90mkfs.fat".ljust(80)]
)
def test_r45_what_is_not_foreign(data: bytes) -> None:
    assert raw.foreign_format(data) is None


@pytest.mark.parametrize("place", range(len(raw.FOREIGN)))
def test_r45_every_magic_is_found_where_it_is_and_nowhere_else(place: int) -> None:
    offset, magic, name = raw.FOREIGN[place]
    data = bytes(offset) + magic

    assert offset + len(magic) <= raw.PROBE_LENGTH
    assert raw.foreign_format(data.ljust(raw.PROBE_LENGTH, b"\0")) == name
    assert raw.foreign_format(b"\0" + data) is None
    assert raw.foreign_format(data[:-1]) is None

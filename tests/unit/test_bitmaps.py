"""The bitmap directory as objects: real images compared with `qemu-img info`, and forged ones. R12, R59, R60."""

from __future__ import annotations

import errno
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qcowfs.errors import SourceError
from qcowfs.qcow2.bitmaps import Bitmap, read_bitmaps
from qcowfs.qcow2.header import read_header
from tests.support import forge, need
from tests.support.forge import BytesSource
from tests.support.qemu import qemu, qemu_io


def bitmaps_of(image: bytes) -> tuple[Bitmap, ...]:
    source = BytesSource(image)
    return read_bitmaps(source, read_header(source))


def as_qemu_says(bitmap: Bitmap) -> dict[str, Any]:
    """Return an entry as `qemu-img info` tells it."""
    flags = [name for name, is_set in (("in-use", bitmap.in_use), ("auto", bitmap.auto)) if is_set]
    return {"name": bitmap.name.decode(), "granularity": bitmap.granularity, "flags": flags}


def compare(path: Path) -> tuple[Bitmap, ...]:
    """The directory is what QEMU says; returns it."""
    found = bitmaps_of(path.read_bytes())
    said = json.loads(qemu("qemu-img", "info", "--output=json", "-f", "qcow2", path).stdout)

    assert said["format-specific"]["data"].get("bitmaps", []) == [as_qemu_says(bitmap) for bitmap in found]
    return found


def created(tmp_path: Path, size: str = "16M", options: str = "cluster_size=64k") -> Path:
    need("qemu-img", "qemu-io")
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, size)
    return path


def test_r59_bitmaps_of_qemu_img(tmp_path: Path) -> None:
    path = created(tmp_path)
    qemu("qemu-img", "bitmap", "--add", path, "default")
    qemu("qemu-img", "bitmap", "--add", "-g", "512", path, "finest")
    qemu("qemu-img", "bitmap", "--add", "-g", "2G", path, "coarsest")
    qemu("qemu-img", "bitmap", "--add", "--disable", path, "frozen: grün")

    found = compare(path)

    assert {bitmap.name.decode(): (bitmap.granularity_bits, bitmap.auto) for bitmap in found} == {
        "default": (16, True),
        "finest": (9, True),
        "coarsest": (31, True),
        "frozen: grün": (16, False),
    }
    assert all(bitmap.consistent for bitmap in found)


@pytest.mark.parametrize("size", ["512", "256M", "258M", "300M", "20G"])
@pytest.mark.parametrize("granularity", ["64k", "1M"])
@pytest.mark.parametrize("options", ["cluster_size=512", "cluster_size=64k", "cluster_size=2M,extended_l2=on"])
def test_r60_tables_are_as_long_as_the_disk_needs(tmp_path: Path, options: str, granularity: str, size: str) -> None:
    path = created(tmp_path, size, options)
    qemu("qemu-img", "bitmap", "--add", "-g", granularity, path, "b0")

    (bitmap,) = compare(path)

    assert bitmap.consistent
    assert bitmap.table_offset % 512 == 0
    assert bitmap.table_entries >= 1


def test_r59_bitmaps_after_writes_and_resizes(tmp_path: Path) -> None:
    path = created(tmp_path)
    qemu("qemu-img", "bitmap", "--add", "-g", "512", path, "b0")
    qemu_io(path, "write 0 1M", "write 15M 1M")
    qemu("qemu-img", "resize", "-q", path, "700M")

    (bitmap,) = compare(path)

    assert bitmap.consistent
    assert bitmap.table_entries == 3


def test_r60_a_bitmap_that_was_in_use_when_its_writer_died(tmp_path: Path) -> None:
    path = created(tmp_path)
    qemu("qemu-img", "bitmap", "--add", path, "b0")
    words = ["qemu-io", "-f", "qcow2", "-c", "write 0 1M", "-c", "abort", str(path)]
    subprocess.run(words, capture_output=True, timeout=60)

    (bitmap,) = compare(path)

    assert bitmap.in_use
    assert not bitmap.consistent


def test_r12_bitmaps_are_inconsistent_after_a_writer_that_does_not_know_them(tmp_path: Path) -> None:
    """It clears the autoclear bit. QEMU then forgets them; here they are told, as what they are."""
    path = created(tmp_path)
    qemu("qemu-img", "bitmap", "--add", path, "b0")
    image = bytearray(path.read_bytes())
    image[88:96] = bytes(8)

    (bitmap,) = bitmaps_of(bytes(image))

    assert bitmap.name == b"b0"
    assert not bitmap.consistent


def test_r12_a_resize_by_a_writer_that_does_not_know_them_is_no_corruption() -> None:
    image = forge.qcow2(bitmaps=[forge.Bitmap(granularity_bits=9)], size=1 << 40, autoclear_features=0)

    assert [bitmap.consistent for bitmap in bitmaps_of(image)] == [False]


def test_an_image_without_bitmaps(tmp_path: Path) -> None:
    assert compare(created(tmp_path)) == ()


@pytest.mark.parametrize("length", range(9))
def test_r59_entries_are_padded_to_8_bytes(tmp_path: Path, length: int) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    names = [bytes([character]) * length for character in b"abc"][: 3 if length else 1]
    path.write_bytes(forge.qcow2(bitmaps=[forge.Bitmap(name=name, flags=2) for name in names]))

    assert [bitmap.name for bitmap in compare(path)] == names


def test_every_field_is_where_the_specification_has_it() -> None:
    entry = forge.Bitmap(name=b"name", extra=b"extra", flags=5, granularity_bits=11)
    (bitmap,) = bitmaps_of(forge.qcow2(cluster_bits=9, bitmaps=[entry]))

    assert bitmap == Bitmap(
        name=b"name",
        table_offset=bitmap.table_offset,
        table_entries=1,
        flags=5,
        granularity_bits=11,
        consistent=False,
    )


def test_a_source_that_fails_is_a_source_error_with_its_errno() -> None:
    image = forge.qcow2(bitmaps=[forge.Bitmap()])
    header = read_header(BytesSource(image))

    class FailingSource(BytesSource):
        def read_at(self, offset: int, length: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(SourceError, match="cannot read the bitmap directory: Input/output error") as caught:
        read_bitmaps(FailingSource(image), header)

    assert caught.value.errno == errno.EIO

"""NAME/: the volumes of each point in a real mount, with and without the data plane."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import need
from tests.support.mounts import mounted, qemu
from tests.support.qemu import qemu_io

MIB = 1 << 20
FIRST, SECOND = 1 * MIB, 5 * MIB  # where the partitions begin


@pytest.fixture
def partitioned(tmp_path: Path) -> Path:
    """Return an image whose snapshot "one" has p1, and whose active state has p1 and p3, of other bytes."""
    need("qemu-img", "qemu-io", "sfdisk")
    raw, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "raw", raw, "16M")
    table(raw, "1 : start=2048, size=8192\n")
    qemu("qemu-img", "convert", "-O", "qcow2", raw, image)
    qemu_io(image, f"write -q -P 0x11 {FIRST} 1M")
    qemu("qemu-img", "snapshot", "-c", "one", image)
    table(raw, "1 : start=2048, size=8192\n3 : start=10240, size=4096\n")
    sectors = tmp_path / "sectors"
    with open(raw, "rb") as disk:
        sectors.write_bytes(disk.read(34 * 512))
    qemu_io(image, f"write -q -s {sectors} 0 {34 * 512}", f"write -q -P 0x22 {SECOND} 64k")
    return image


def table(path: Path, lines: str) -> None:
    done = subprocess.run(["sfdisk", "-q", path], input=f"label: gpt\n{lines}", text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("more", [[], ["--no-data-plane"]], ids=["data plane", "plain"])
def test_each_point_shows_its_own_partitions(partitioned: Path, target: Path, more: list[str]) -> None:
    with mounted(partitioned, target, *more):
        assert {"current", "current.raw", "one", "one.raw"} <= set(os.listdir(target))
        assert sorted(os.listdir(target / "one")) == ["p1.raw"]
        assert sorted(os.listdir(target / "current")) == ["p1.raw", "p3.raw"]
        disk = (target / "current.raw").read_bytes()
        first = (target / "current" / "p1.raw").read_bytes()
        assert first == disk[FIRST : FIRST + 4 * MIB]
        assert first[:MIB] == b"\x11" * MIB
        assert (target / "current" / "p3.raw").read_bytes() == disk[SECOND : SECOND + 2 * MIB]


def test_a_partition_has_its_size_and_holes_and_is_read_only(partitioned: Path, target: Path) -> None:
    with mounted(partitioned, target):
        status = os.stat(target / "current" / "p3.raw")
        assert status.st_size == 2 * MIB
        assert status.st_blocks * 512 == 64 << 10
        descriptor = os.open(target / "current" / "p3.raw", os.O_RDONLY)
        try:
            assert os.lseek(descriptor, 0, os.SEEK_HOLE) == 64 << 10
            with pytest.raises(OSError, match="No such device or address"):
                os.lseek(descriptor, 64 << 10, os.SEEK_DATA)
        finally:
            os.close(descriptor)
        with pytest.raises(OSError, match="Read-only file system"):
            os.open(target / "current" / "p3.raw", os.O_RDWR)


def test_a_directory_is_found_by_name_before_anything_was_listed(partitioned: Path, target: Path) -> None:
    with mounted(partitioned, target):
        assert (target / "one" / "p1.raw").stat().st_size == 4 * MIB


def test_a_point_without_partitions_has_no_directory(image: Path, target: Path) -> None:
    with mounted(image, target):
        assert [name for name in os.listdir(target) if not name.endswith(".raw")] == []
        with pytest.raises(FileNotFoundError):
            os.stat(target / "current")

"""Large things are as quick to mount as small ones, and memory stays bounded."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.mount.images import with_many_snapshots
from tests.support import need
from tests.support.mounts import Mounted, call, mounted, qemu, shell

MIB = 1 << 20
SNAPSHOTS = 1000
LAYERS = 40


def peak_memory(mount: Mounted) -> int:
    """Return the most bytes of memory that the daemon has had."""
    lines = Path(f"/proc/{mount.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def first_bytes(path: Path) -> bytes:
    with path.open("rb", buffering=0) as disk:
        return disk.read(2)


def seconds_to_first_byte(image: Path, target: Path, name: str) -> float:
    """Return how long it takes from the command to a byte of the file, once."""
    start = time.monotonic()
    done = call("mount", image, target)
    try:
        with (target / name).open("rb", buffering=0) as disk:
            assert len(disk.read(1)) == 1
        return time.monotonic() - start
    finally:
        assert done.returncode == 0, done.stderr
        call("umount", target)


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("qemu-img", "qemu-io")
    image = tmp_path_factory.mktemp("many") / "many.qcow2"
    with_many_snapshots(image, SNAPSHOTS)
    return image


def test_a_thousand_snapshots_are_listed_and_each_is_readable(many: Path, target: Path) -> None:
    assert len(qemu("qemu-img", "snapshot", "-l", many).splitlines()) == SNAPSHOTS + 2  # QEMU sees them, too

    with mounted(many, target) as mount:
        names = os.listdir(mount.path)
        first = {first_bytes(mount / f"snapshot-{number:04}.raw") for number in range(1, SNAPSHOTS + 1)}
        current = first_bytes(mount / "current.raw")

    assert len(names) == SNAPSHOTS + 2
    assert first == {b"\x42\x42"}
    assert current == b"\x43\x43"


def test_a_thousand_open_disks_need_little_memory(many: Path, target: Path) -> None:
    with mounted(many, target) as mount:
        before = peak_memory(mount)
        disks = [(mount / name).open("rb", buffering=0) for name in os.listdir(target)]
        for disk in disks:
            disk.read(4096)
        opened = len(os.listdir(f"/proc/{mount.pid}/fd"))
        for disk in disks:
            disk.close()
        after = peak_memory(mount)

    assert after - before < 32 * MIB  # a disk is a few hundred bytes; the cache has its own limit
    assert opened < 30  # they all read the same file


def test_ls_does_not_walk_the_tables_and_ls_l_is_quick(many: Path, target: Path) -> None:
    with mounted(many, target):
        start = time.monotonic()
        shell('ls -f "$1"', target)
        short = time.monotonic() - start
        shell('ls -l "$1"', target)
        long = time.monotonic() - start

    assert short < 1
    assert long < 5


@pytest.fixture
def small(tmp_path: Path) -> Path:
    need("qemu-img")
    image = tmp_path / "small.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    return image


@pytest.fixture
def huge(tmp_path: Path) -> Path:
    need("qemu-img", "qemu-io")
    image = tmp_path / "huge.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=2M", image, "64T")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 70368744112128 64k", image)
    return image


def test_mounting_takes_no_longer_for_large_images(small: Path, huge: Path, many: Path, target: Path) -> None:
    best = {}
    for image in (small, huge, many):
        best[image.stem] = min(seconds_to_first_byte(image, target, "current.raw") for _ in range(3))

    # Relative, because machines differ; an image with a thousand names has a thousand names to make.
    assert best["huge"] < best["small"] + 0.3, best
    assert best["many"] < best["small"] + 0.3, best


def test_a_disk_of_64_tib_is_read_at_its_end(huge: Path, target: Path) -> None:
    with mounted(huge, target) as mount:
        with (mount / "current.raw").open("rb", buffering=0) as disk:
            assert disk.seek(0, os.SEEK_END) == 64 << 40
            disk.seek(-64 * 1024, os.SEEK_END)
            last = disk.read()
        memory = peak_memory(mount)

    assert last == b"\x09" * 65536
    assert memory < 150 * MIB


def test_forty_layers_are_read_through(tmp_path: Path, target: Path) -> None:
    need("qemu-img", "qemu-io")
    for layer in range(LAYERS):
        image = tmp_path / f"layer{layer:02}.qcow2"
        backing = ["-b", f"layer{layer - 1:02}.qcow2", "-F", "qcow2"] if layer else []
        qemu("qemu-img", "create", "-q", "-f", "qcow2", *backing, image, "4M")
        qemu("qemu-io", "-f", "qcow2", "-c", f"write -P {layer + 1} {layer * 64}k 64k", image)
    expected = b"".join(bytes([layer + 1]) * 65536 for layer in range(LAYERS)).ljust(4 * MIB, b"\0")

    with mounted(image, target) as mount:
        names = os.listdir(mount.path)
        top = (mount / "current.raw").read_bytes()
        middle = (mount / "layer19.raw").read_bytes()
        link = os.readlink(mount / "latest.raw")

    assert len(names) == LAYERS + 1
    assert link == f"layer{LAYERS - 2:02}.raw"
    assert top == expected
    assert middle == expected[: 20 * 65536].ljust(4 * MIB, b"\0")


def test_a_flood_of_opens_and_closes_leaks_nothing(small: Path, target: Path) -> None:
    with mounted(small, target) as mount:
        path = mount / "current.raw"

        def flood() -> None:
            for _ in range(3000):
                os.close(os.open(path, os.O_RDONLY))

        flood()
        before = peak_memory(mount)
        flood()
        flood()

        assert peak_memory(mount) - before < 2 * MIB


def test_du_adds_up_to_what_the_image_takes(many: Path, target: Path) -> None:
    with mounted(many, target) as mount:
        used = int(shell('du -B1 "$1"', mount / "current.raw").split()[0])

    assert used == MIB

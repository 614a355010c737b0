"""Holes through a real mount: lseek(2), and the programs that use it, see the holes that the image has."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.images import MIB
from tests.support import need
from tests.support.holes import data_ranges, places_to_ask, seek_answer
from tests.support.images import make
from tests.support.mounts import in_foreground, mounted, qemu, shell
from tests.support.qemu import qemu_io, qemu_map, reverted
from tests.support.tables import COPIED, Tables

SIZE = 3 * MIB + 512  # ends within a cluster
KINDS = {
    "plain": (["-f", "qcow2"], ["write -P 1 64k 128k", "write -P 2 1M 1k", "write -z 128k 64k"]),
    "extended": (["-f", "qcow2", "-o", "extended_l2=on"], ["write -P 1 6k 2k", "write -P 2 1M 70k", "write -z 1M 4k"]),
    "compressed": (["-f", "qcow2"], ["write -c -P 1 64k 64k", "write -c -P 2 3M 512"]),
    "zeros": (["-f", "qcow2", "-o", "preallocation=metadata"], ["write -P 1 0 3M", "write -z 1M 1M"]),
    "raw": (["-f", "raw"], ["write -P 1 1M 64k", "write -P 2 2M 4k"]),
}


@pytest.fixture(params=KINDS)
def top(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Return an overlay, with a cluster of its own, over an image of each kind."""
    need("qemu-img", "qemu-io")
    create, commands = KINDS[request.param]
    base, overlay = tmp_path / "base", tmp_path / "top.qcow2"
    qemu("qemu-img", "create", "-q", *create, base, SIZE)
    qemu_io(base, *commands, image_format=create[1])
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", create[1], overlay)
    qemu_io(overlay, "write -P 9 2432k 64k")
    return overlay


def sought(file: int, offset: int, whence: int) -> int | None:
    """Return what lseek(2) answers; None for ENXIO, and any other error as it is."""
    try:
        return os.lseek(file, offset, whence)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def assert_same_as(data: list[tuple[int, int]], path: Path, told: str = "") -> None:
    size = path.stat().st_size
    with opened(path) as file:
        for place in places_to_ask(data, size, 0):
            for whence in (os.SEEK_DATA, os.SEEK_HOLE):
                expected = seek_answer(data, size, place, whence)
                assert expected == sought(file, place, whence), f"{place} {whence} {told}"


def test_lseek_finds_what_qemu_maps(top: Path, target: Path) -> None:
    with mounted(top, target) as mount:
        assert_same_as(data_ranges(qemu_map(top, "qcow2")), mount / "current.raw")


@pytest.mark.parametrize("seed", [2001, 2005, 2010])
def test_lseek_finds_what_qemu_maps_in_random_chains(tmp_path: Path, target: Path, seed: int) -> None:
    need("qemu-img", "qemu-io")
    made = make(seed, tmp_path)

    with mounted(made.top, target, "--allow-backing", "any") as mount:
        assert_same_as(data_ranges(qemu_map(made.top, made.layers[0].format)), mount / "current.raw", f"seed {seed}")


def test_lseek_ends_where_each_snapshot_ended(tmp_path: Path, target: Path) -> None:
    need("qemu-img", "qemu-io")
    image = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    qemu_io(image, "write -P 1 256k 64k")
    qemu("qemu-img", "snapshot", "-c", "small", image)
    qemu("qemu-img", "resize", "-q", image, str(SIZE))
    qemu_io(image, "write -P 2 3M 512", "write -z 256k 64k")
    with reverted(image, "small") as copy:
        small = data_ranges(qemu_map(copy, "qcow2"))

    with mounted(image, target) as mount:
        assert_same_as(small, mount / "small.raw")
        assert_same_as(data_ranges(qemu_map(image, "qcow2")), mount / "current.raw")
        assert (mount / "small.raw").stat().st_size == MIB


def test_a_damaged_table_is_data_and_reading_it_an_error(tmp_path: Path, target: Path) -> None:
    need("qemu-img", "qemu-io")
    image = tmp_path / "bad.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    qemu_io(image, "write -P 1 256k 64k")
    Tables(image).l2(1, COPIED | 0x1_2345_0200)

    with mounted(image, target) as mount:
        assert_same_as([(65536, 131072), (262144, 327680)], mount / "current.raw")
        copied = subprocess.run(
            ["cp", "--sparse=auto", mount / "current.raw", tmp_path / "copy"], capture_output=True, text=True
        )

    assert copied.returncode == 1
    assert "Input/output error" in copied.stderr


@pytest.mark.parametrize("command", ["cp --sparse=auto", "tar"])
def test_a_sparse_copy_has_the_bytes_and_the_holes(top: Path, target: Path, tmp_path: Path, command: str) -> None:
    need("tar")
    raw, copy = tmp_path / "expected.raw", tmp_path / "out" / "current.raw"
    copy.parent.mkdir()
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, raw)
    with mounted(top, target) as mount:
        if command == "tar":
            shell('tar -C "$1" -cSf - current.raw | tar -C "$2" -xf -', mount.path, copy.parent)
        else:
            shell(f'{command} "$1" "$2"', mount / "current.raw", copy)
        data = sum(end - start for start, end in data_ranges(qemu_map(top, "qcow2")))

    shell('cmp "$1" "$2"', raw, copy)
    assert copy.stat().st_blocks * 512 <= data + 64 * 1024


def test_without_the_data_plane_all_is_data(top: Path, target: Path) -> None:
    with mounted(top, target, "--no-data-plane") as mount, opened(mount / "current.raw") as file:
        assert [sought(file, place, os.SEEK_DATA) for place in (0, 5, SIZE - 1, SIZE)] == [0, 5, SIZE - 1, None]
        assert sought(file, 5, os.SEEK_HOLE) == SIZE


def test_a_live_file_is_all_data_and_takes_no_holes_from_the_others(tmp_path: Path, target: Path) -> None:
    """The kernel gives up LSEEK for a whole mount when one answer is ENOSYS."""
    need("qemu-img", "qemu-io")
    image = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "1M")
    qemu_io(image, "write -P 1 256k 64k")
    qemu("qemu-img", "snapshot", "-c", "frozen", image)
    with written_by_another(image), in_foreground(image, target, "--live") as mount:
        with opened(mount / "current.raw") as live:
            assert [sought(live, place, os.SEEK_DATA) for place in (0, 5, MIB - 1, MIB)] == [0, 5, MIB - 1, None]
            assert [sought(live, place, os.SEEK_HOLE) for place in (0, 5, MIB)] == [MIB, MIB, None]
            assert os.pread(live, 3, 256 << 10) == b"\1\1\1"
        with opened(mount / "frozen.raw") as frozen:
            assert sought(frozen, 0, os.SEEK_DATA) == 256 << 10
            assert sought(frozen, 256 << 10, os.SEEK_HOLE) == 320 << 10


@contextmanager
def written_by_another(image: Path) -> Iterator[None]:
    """Hold `image` open for writing in another process, with QEMU's locks."""
    words = ["qemu-io", "-f", "qcow2", str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write("length\n")
        writer.stdin.flush()
        assert "1 MiB" in writer.stdout.readline(), "it is open"
        try:
            yield
        finally:
            writer.stdin.close()
            writer.stdout.close()
            writer.wait()

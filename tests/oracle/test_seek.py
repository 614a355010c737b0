"""Data and holes: SEEK_DATA and SEEK_HOLE are exactly what qemu-img map says. Scenarios by seed, with QEMU's answer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs.chain import Chain, open_chain
from qcowfs.gate import Policy
from qcowfs.snapshot import Point, open_disk, points
from tests.support import need
from tests.support.holes import data_ranges, places_to_ask, seek_answer
from tests.support.images import MadeLayer, make
from tests.support.qemu import CannotRevert, qemu, qemu_io, qemu_map, reverted
from tests.support.tables import COPIED, Tables, active_disk

SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else range(1000, 1024)
MIB = 1 << 20


@contextmanager
def opened(image: Path) -> Iterator[Chain]:
    with open_chain(str(image), Policy(allow=(os.path.realpath(image.parent),))) as chain:
        yield chain


def answers(disk: Disk, places: list[int]) -> list[int | None]:
    return [disk.seek(place, whence) for place in places for whence in (os.SEEK_DATA, os.SEEK_HOLE)]


def qemus_data(layer: MadeLayer, point: Point) -> list[tuple[int, int]]:
    if point.entry is None:
        return data_ranges(qemu_map(layer.path, layer.format))
    with reverted(layer.path, point.entry.id.decode()) as copy:
        return data_ranges(qemu_map(copy, "qcow2"))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.expect_warnings
def test_data_and_holes_of_every_point_are_where_qemu_maps_them(tmp_path: Path, seed: int) -> None:
    """Chains, extended L2 entries, compressed and zero clusters, raw and qcow layers, snapshots of other sizes."""
    need("qemu-img", "qemu-io")
    made = make(seed, tmp_path)
    again = f"again: SEED={seed} make test TESTS=tests/oracle/test_seek.py; commands:\n" + "\n".join(made.commands)

    with opened(made.top) as chain:
        for point in points(chain):
            try:
                data = qemus_data(made.layers[point.depth], point)
            except CannotRevert:
                continue
            places = list(places_to_ask(data, point.virtual_size, seed))
            expected = [
                seek_answer(data, point.virtual_size, place, whence)
                for place in places
                for whence in (os.SEEK_DATA, os.SEEK_HOLE)
            ]
            disk = open_disk(chain, point, Cache(4 * MIB))
            for turn in ("asked first", "asked again"):
                assert expected == answers(disk, places), f"{turn}, depth {point.depth}, {point.snapshot_id!r}; {again}"


@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_a_disk_that_holds_nothing_is_one_hole(tmp_path: Path, image_format: str) -> None:
    need("qemu-img")
    image = tmp_path / f"empty.{image_format}"
    if image_format == "raw":  # QEMU would write its first block
        image.touch()
        os.truncate(image, MIB)
    else:
        qemu("qemu-img", "create", "-q", "-f", image_format, image, "1M")

    with open_chain(str(image), Policy(), image_format=image_format) as chain:
        disk = active_disk(chain)

        assert disk.seek(0, os.SEEK_DATA) is None
        assert disk.seek(5, os.SEEK_HOLE) == 5


def test_r29_an_allocated_zero_cluster_is_a_hole(tmp_path: Path) -> None:
    """Own fixture, with QEMU's answer."""
    need("qemu-img", "qemu-io")
    image = tmp_path / "zero.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", image, "1M")
    qemu_io(image, "write -P 1 0 128k", "write -z 128k 64k", "write -P 1 192k 832k")

    with opened(image) as chain:
        disk = active_disk(chain)

        assert disk.extents(128 << 10, 1, 1)[0].offset is not None
        assert disk.seek(0, os.SEEK_HOLE) == 128 << 10
        assert disk.seek(128 << 10, os.SEEK_DATA) == 192 << 10


@pytest.mark.parametrize("lower", [False, True])
def test_what_a_damaged_table_describes_counts_as_data(tmp_path: Path, lower: bool) -> None:
    """Reading it has to fail: were it a hole, a copy would have zeros there and nobody would know. Own fixture."""
    need("qemu-img", "qemu-io")
    image = tmp_path / "bad.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=64k", image, "1M")
    qemu_io(image, "write -P 1 256k 64k")
    Tables(image).l2(1, COPIED | 0x1_2345_0200)  # not aligned to a cluster
    if lower:
        image = overlaid(image)

    with opened(image) as chain:
        disk = active_disk(chain)
        for _ in range(2):
            assert disk.seek(0, os.SEEK_DATA) == 64 << 10
            assert disk.seek(64 << 10, os.SEEK_HOLE) == 128 << 10
            assert disk.seek(128 << 10, os.SEEK_DATA) == 256 << 10


def overlaid(image: Path) -> Path:
    overlay = image.with_name("overlay.qcow2")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", image.name, "-F", "qcow2", overlay)
    return overlay

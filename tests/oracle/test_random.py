"""The oracle: seeded random images, byte for byte and extent for extent what QEMU says of them.

Left out, because QEMU is not a judge there:
- a snapshot that QEMU does not go back to (no room for its refcounts, or QEMU damaged its own image), and whose size
  is not the active one's, so that `convert -l` is wrong too; and the map of any snapshot that it does not go back to;
- `zero` of extents with data: QEMU looks through to the holes of the host's file where it suspects preallocation;
- data of a state that QEMU cannot read all of: then qcowfs has to fail too, and no more is asked.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from qcowfs._core import Disk
from qcowfs.chain import Chain, open_chain
from qcowfs.errors import ReadFault
from qcowfs.gate import Policy
from qcowfs.snapshot import Point, points
from tests.support import need
from tests.support.content import Content
from tests.support.images import MadeImage, MadeLayer, make
from tests.support.qemu import CannotRevert, convert, qemu_map, reverted
from tests.support.reader import clipped, open_point, read_all, runs_of_disk, runs_of_extents, runs_of_qemu

SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else range(100)
PIECES = 20  # ranges of each point that begin and end anywhere

Map = list[dict[str, Any]]


class Unknown(Exception):
    """QEMU does not tell."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.expect_warnings
def test_every_point_is_what_qemu_reads(tmp_path: Path, seed: int) -> None:
    """Scenarios by seed, with QEMU's answer; each rule of reading by itself is in test_formats.py."""
    need("qemu-img", "qemu-io")
    made = make(seed, tmp_path)
    replay = f"again: SEED={seed} make test TESTS=tests/oracle/test_random.py; commands:\n" + "\n".join(made.commands)

    # Allowed by name: below a version 1 image, which records no format, names are not followed by default.
    with open_chain(str(made.top), Policy(allow=(os.path.realpath(tmp_path),))) as chain:
        found = points(chain)
        assert _expected_points(made) == [(point.depth, point.snapshot_id, point.snapshot_name) for point in found], (
            replay
        )
        for point in found:
            _compare(chain, point, made, f"seed {seed}, depth {point.depth}, {point.snapshot_id!r}; {replay}")


def _expected_points(made: MadeImage) -> list[tuple[int, bytes | None, bytes | None]]:
    expected: list[tuple[int, bytes | None, bytes | None]] = []
    for depth, layer in enumerate(made.layers):
        expected.append((depth, None, None))
        expected += [(depth, identity.encode(), name.encode()) for identity, name in layer.snapshots]
    return expected


def _compare(chain: Chain, point: Point, made: MadeImage, told: str) -> None:
    try:
        expected, extents = _qemus_word(made.layers[point.depth], point)
    except Unknown:
        return
    disk = open_point(chain, point)
    if expected is None:
        with pytest.raises(ReadFault):
            read_all(disk)
        return
    assert len(expected) == point.virtual_size, told
    assert Content(expected) == Content(read_all(disk)), told
    _compare_pieces(disk, expected, made.seed, told)
    if extents is not None:
        _compare_extents(disk, point.depth, extents, made.seed, told)


def _qemus_word(layer: MadeLayer, point: Point) -> tuple[bytes | None, Map | None]:
    if point.entry is None:
        return convert(layer.path, layer.format), qemu_map(layer.path, layer.format)
    identity = point.entry.id.decode()
    try:
        with reverted(layer.path, identity) as copy:
            return convert(copy, "qcow2"), qemu_map(copy, "qcow2")
    except CannotRevert:
        if point.virtual_size != point.layer.virtual_size:
            raise Unknown from None
        return convert(layer.path, "qcow2", "-l", f"snapshot.id={identity}"), None


def _compare_pieces(disk: Disk, expected: bytes, seed: int, told: str) -> None:
    """Ranges that begin and end anywhere, past the end too."""
    generator = random.Random(seed)
    for _ in range(PIECES):
        offset, length = _piece(generator, len(expected))
        assert Content(expected[offset : offset + length]) == Content(disk.pread(offset, length)), (
            f"{offset}+{length}: {told}"
        )


def _compare_extents(disk: Disk, depth: int, said: Map, seed: int, told: str) -> None:
    expected = [run._replace(depth=run.depth + depth) for run in runs_of_qemu(said)]
    assert expected == runs_of_disk(disk), told
    generator = random.Random(seed)
    for _ in range(PIECES):
        offset, length = _piece(generator, disk.virtual_size)
        some = disk.extents(offset, length, 3)
        end = some[-1].start + some[-1].length if some else offset
        assert clipped(expected, offset, end) == runs_of_extents(some), f"{offset}+{length}: {told}"
        assert end == min(offset + length, disk.virtual_size) or len(some) == 3 or not some, told


def _piece(generator: random.Random, size: int) -> tuple[int, int]:
    return generator.randrange(size + 10), generator.randrange(1, 200_000)


@pytest.mark.parametrize("seed", [5, 6])
def test_a_seed_makes_the_same_image_again(tmp_path: Path, seed: int) -> None:
    """Own fixture: the replay command on a failure is worth something."""
    need("qemu-img", "qemu-io")
    first, second = tmp_path / "1", tmp_path / "2"
    first.mkdir()
    second.mkdir()

    one, two = make(seed, first), make(seed, second)

    assert len(one.commands) > 3
    assert one.commands == [command.replace(str(second), str(first)) for command in two.commands]
    for layer, again in zip(one.layers, two.layers, strict=True):
        assert layer.snapshots == again.snapshots
        assert convert(layer.path, layer.format) == convert(again.path, again.format)

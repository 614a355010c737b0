"""The oracle: seeded random images, byte for byte and extent for extent what QEMU says of them.

Left out, because QEMU is not a judge there: a snapshot that QEMU cannot revert to (it found its own image corrupt, or
the L1 table does not fit any more); a state that QEMU itself cannot read (7.2 writes some compressed clusters
that it refuses to read again) has to fail here too, and no more is asked; maps of preallocated images, for which QEMU
looks through to the holes of the host's file; maps of states of which another layer of the chain is preallocated.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from qcowfs.chain import Chain, open_chain
from qcowfs.errors import ReadFault
from qcowfs.gate import Policy
from qcowfs.snapshot import Point, points
from tests.support import need
from tests.support.images import MadeImage, convert, make, qemu_map, reverted
from tests.support.reader import open_point, read_all, runs_of_disk, runs_of_qemu

SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else range(320)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.expect_warnings
def test_every_point_is_what_qemu_reads(tmp_path: Path, seed: int) -> None:
    """R1 to R29, R46 to R48, R51 to R54: chosen scenario by seed, with QEMU's answer."""
    need("qemu-img", "qemu-io")
    made = make(seed, tmp_path)
    replay = f"again: SEED={seed} make test TESTS=tests/oracle/test_random.py; commands:\n" + "\n".join(made.commands)

    # Allowed by name: below a version 1 image, which records no format, names are not followed by default.
    with open_chain(str(made.top), Policy(allow=(os.path.realpath(tmp_path),))) as chain:
        found = points(chain)
        assert sum(layer.snapshots + 1 for layer in made.layers) == len(found), replay
        for point in found:
            _compare(chain, point, made, replay)


def _compare(chain: Chain, point: Point, made: MadeImage, replay: str) -> None:
    layer = made.layers[point.depth]
    try:
        expected = (
            convert(layer.path, layer.format) if point.entry is None else reverted(layer.path, point.entry.ordinal)
        )
    except NotImplementedError:
        return
    disk = open_point(chain, point)
    told = f"seed {made.seed}, {point.kind} at depth {point.depth}, {point.snapshot_name!r}; {replay}"
    if expected is None:
        with pytest.raises(ReadFault):
            read_all(disk)
        return
    assert expected == read_all(disk), told
    _compare_pieces(disk, expected, made.seed, told)
    if point.entry is None and not any(below.preallocated for below in made.layers[point.depth :]):
        said = qemu_map(layer.path, layer.format)
        assert said is not None
        deeper = [run._replace(depth=run.depth + point.depth) for run in runs_of_qemu(said)]
        assert deeper == runs_of_disk(disk), told


def _compare_pieces(disk: object, expected: bytes, seed: int, told: str) -> None:
    """Ranges that begin and end anywhere, past the end too."""
    generator = random.Random(seed)
    for _ in range(20):
        offset = generator.randrange(len(expected) + 10)
        length = generator.randrange(1, 200_000)
        assert expected[offset : offset + length] == disk.pread(offset, length), f"{offset}+{length}: {told}"  # type: ignore[attr-defined]

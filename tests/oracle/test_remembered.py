"""What a chain's layers said is remembered for whole ranges: the answers are those of one who remembers nothing.

Scenarios by seed, with QEMU's bytes; damage is our own fixture.
"""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs.chain import open_chain
from qcowfs.errors import ReadFault
from qcowfs.gate import Policy
from qcowfs.snapshot import open_disk, points
from tests.support import need
from tests.support.content import Content
from tests.support.images import make
from tests.support.qemu import convert, qemu, qemu_io
from tests.support.tables import COPIED, Tables

SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else range(3000, 3016)
CLUSTER = 65536
MIB = 1 << 20
BAD = 5  # the damaged cluster


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.expect_warnings
def test_the_second_answer_is_the_first_and_qemus(tmp_path: Path, seed: int) -> None:
    need("qemu-img", "qemu-io")
    made = make(seed, tmp_path)
    again = "\n".join(
        [f"again: SEED={seed} make test TESTS=tests/oracle/test_remembered.py; commands:", *made.commands]
    )
    expected = convert(made.top, made.layers[0].format)
    if expected is None:
        return  # QEMU cannot read all of it: the oracle's other tests say what then
    dice = random.Random(seed)

    with open_chain(str(made.top), Policy(allow=(os.path.realpath(tmp_path),))) as chain:
        point = points(chain)[0]
        for budget in (32 << 10, 32 << 20):  # things are thrown out all the time, or never
            disk = open_disk(chain, point, Cache(budget), 1)
            ranges = pieces(dice, len(expected))
            for offset, length in [*ranges, *dice.sample(ranges, len(ranges))]:
                fresh = open_disk(chain, point, Cache(MIB), 1)
                assert disk.extents(offset, length, 9) == fresh.extents(offset, length, 9), again
                found = Content(disk.pread(offset, length))
                assert Content(expected[offset : offset + length]) == found, f"{offset}+{length}, {budget}; {again}"


def pieces(dice: random.Random, size: int) -> list[tuple[int, int]]:
    """Cut the disk into pieces of any length, in any order."""
    ends = sorted({0, size, *(dice.randrange(1, size) for _ in range(40))})
    found = [(start, end - start) for start, end in itertools.pairwise(ends)]
    return dice.sample(found, len(found))


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Return the top of three layers, the lowest of which has one bad entry in its L2 table."""
    need("qemu-img", "qemu-io")
    names = [tmp_path / f"layer{number}.qcow2" for number in range(3)]
    for below, name in zip([None, *names], names, strict=False):
        backing = ["-b", below.name, "-F", "qcow2"] if below else []
        qemu("qemu-img", "create", "-q", "-f", "qcow2", *backing, name, str(32 * CLUSTER))
    qemu_io(names[0], f"write -P 1 0 {16 * CLUSTER}")
    qemu_io(names[1], f"write -P 2 {2 * CLUSTER} {CLUSTER}")
    qemu_io(names[2], f"write -P 3 {8 * CLUSTER} {CLUSTER}")
    Tables(names[0]).l2(BAD, COPIED | 0x1_2345_0200)
    return names[2]


def fails(disk: Disk, offset: int, length: int) -> bool:
    try:
        disk.pread(offset, length)
    except ReadFault:
        return True
    return False


@pytest.mark.parametrize("first", [0, 4, BAD, 6, 20])
def test_a_damaged_table_below_fails_its_own_range_and_no_other(damaged: Path, first: int) -> None:
    """Wherever the first read is, and however often: neither the fault nor what is around it changes the other."""
    with open_chain(str(damaged), Policy()) as chain:
        disk = open_disk(chain, points(chain)[0], Cache(MIB), 1)
        fails(disk, first * CLUSTER, CLUSTER)
        for _ in range(3):
            assert [cluster == BAD for cluster in range(32)] == [
                fails(disk, cluster * CLUSTER, CLUSTER) for cluster in range(32)
            ]
            assert not fails(disk, 0, BAD * CLUSTER)
            assert fails(disk, 0, BAD * CLUSTER + 1)
            assert fails(disk, (BAD + 1) * CLUSTER - 1, 1)
            assert not fails(disk, (BAD + 1) * CLUSTER, 20 * CLUSTER)
        assert disk.pread(2 * CLUSTER, 1) + disk.pread(8 * CLUSTER, 1) + disk.pread(9 * CLUSTER, 1) == b"\2\3\1"

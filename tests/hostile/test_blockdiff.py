"""Comparing damaged images: each cluster is told right or told as unreadable, soon, and in little memory.

The judge is `Disk.pread`, cluster by cluster, which the other tests of this directory hold to QEMU's word.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs.blockdiff import differing, may_differ
from qcowfs.chain import open_chain
from qcowfs.errors import QcowfsError, ReadFault
from qcowfs.gate import Policy
from qcowfs.snapshot import open_disk, points
from tests.support import need
from tests.support.images import qemu

pytestmark = [pytest.mark.timeout(20, method="signal"), pytest.mark.expect_warnings]

IMAGES = 40  # damaged images of one test
TOUCHED = 32  # words of a table that damage may hit: clusters of 64 KiB need no more
UNIT = 512  # bytes within which all is one answer: the smallest subcluster here has 2 KiB


@pytest.fixture(scope="module", params=["compat=0.10,cluster_size=4k", "extended_l2=on", "compression_type=zstd"])
def healthy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """An image, and where in the file its L1 table and the first L2 table are."""
    need("qemu-img", "qemu-io")
    path = tmp_path_factory.mktemp("healthy") / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", request.param, path, "2M")
    commands = ["write -P 1 0 300k", "write -c -P 2 1M 64k", "write -z 512k 64k", "write -P 3 1200k 200k"]
    qemu("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), path)
    data = path.read_bytes()
    l1_offset = int.from_bytes(data[40:48], "big")
    return path, [l1_offset, int.from_bytes(data[l1_offset : l1_offset + 8], "big") & 0x00FFFFFFFFFFFE00]


def damage(data: bytes, tables: list[int], generator: random.Random) -> bytes:
    """Change some bits and bytes of some entries of the tables."""
    damaged = bytearray(data)
    for _ in range(generator.randrange(2, 9)):
        place = (
            generator.choice([tables[0], *tables[1:] * 8]) + generator.randrange(TOUCHED) * 8 + generator.randrange(8)
        )
        damaged[place] = generator.choice([0, 1, 0xFF, damaged[place] ^ 1 << generator.randrange(8)])
    return bytes(damaged)


def units(disk: Disk) -> list[bytes | None]:
    """Return the bytes of each unit; None of one that cannot be read."""
    found: list[bytes | None] = []
    for offset in range(0, disk.virtual_size, UNIT):
        try:
            found.append(disk.pread(offset, UNIT))
        except ReadFault:
            found.append(None)
    return found


def marked(ranges: list[tuple[int, int]]) -> set[int]:
    """Return the numbers of the units that `ranges` touch."""
    return {unit for start, length in ranges for unit in range(start // UNIT, -(-(start + length) // UNIT))}


@pytest.mark.parametrize("seed", range(3))
def test_each_unit_of_a_damaged_image_is_told_right(healthy: tuple[Path, list[int]], tmp_path: Path, seed: int) -> None:
    generator = random.Random(seed)
    path, tables = healthy
    with open_chain(str(path), Policy()) as chain:
        cache = Cache(1 << 20)
        old = open_disk(chain, points(chain)[0], cache)
        expected = units(old)
        assert None not in expected
        told = 0
        for number in range(IMAGES):
            damaged = tmp_path / f"{number}.qcow2"
            damaged.write_bytes(damage(path.read_bytes(), tables, generator))
            with open_chain(str(damaged), Policy()) as other:
                told += _compare(old, open_disk(other, points(other)[0], cache), expected)
        assert told > IMAGES // 4


def _compare(old: Disk, new: Disk, expected: list[bytes | None]) -> bool:
    """Compare with what each unit is; tell whether something was found."""
    faults: list[tuple[int, int]] = []
    ranges = list(differing(old, new, granularity=UNIT, on_fault=lambda *fault: faults.append(fault[:2])))
    found = units(new)
    assert {number for number, unit in enumerate(found) if unit is None} == marked(faults)
    different = {n for n, (a, b) in enumerate(zip(expected, found, strict=True)) if b is not None and a != b}
    assert different == marked(ranges)
    assert marked(faults) | different <= marked(list(may_differ(old, new, granularity=UNIT)))
    return bool(faults or ranges)


def test_damage_anywhere_is_an_answer_or_an_error(healthy: tuple[Path, list[int]], tmp_path: Path) -> None:
    generator = random.Random(5)
    path, tables = healthy
    data = path.read_bytes()
    compared = 0
    for number in range(IMAGES):
        damaged = tmp_path / f"{number}.qcow2"
        damaged.write_bytes(damage(data[: generator.randrange(len(data) // 2, len(data))], [0, *tables], generator))
        try:
            with open_chain(str(path), Policy()) as chain, open_chain(str(damaged), Policy()) as other:
                cache = Cache(1 << 20)
                old, new = (open_disk(one, points(one)[0], cache) for one in (chain, other))
                if new.virtual_size < 1 << 40:
                    compared += bool(list(differing(old, new, on_fault=lambda *fault: None)))
        except QcowfsError:
            continue
    assert compared


def test_millions_of_ranges_take_no_memory(tmp_path: Path) -> None:
    """Every second byte differs: at a granularity of 1, the most ranges that there can be."""
    with (tmp_path / "old.raw").open("wb") as old, (tmp_path / "new.raw").open("wb") as new:
        for _ in range(64):
            old.write(bytes(1 << 20))
            new.write(b"\0\1" * (1 << 19))
    cache = Cache(1 << 20)
    names = [str(tmp_path / name) for name in ("old.raw", "new.raw")]
    with (
        open_chain(names[0], Policy(), image_format="raw") as one,
        open_chain(names[1], Policy(), image_format="raw") as two,
    ):
        disks = [open_disk(chain, points(chain)[0], cache) for chain in (one, two)]
        found = differing(disks[0], disks[1], granularity=1)

        assert all((2 * n + 1, 1) == pair for n, pair in enumerate(itertools.islice(found, 1 << 20)))
        found.close()  # type: ignore[attr-defined]  # a generator

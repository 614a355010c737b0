"""Images with random damage: every verb ends soon, with an answer or a named error, and never anything else."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qcowfs import limits
from qcowfs._cache import Cache
from qcowfs.chain import open_chain
from qcowfs.cli import info
from qcowfs.cli import list as list_verb
from qcowfs.errors import QcowfsError
from qcowfs.gate import Policy
from qcowfs.sizes import Sizes
from qcowfs.snapshot import Point, open_disk, points
from tests.support import need
from tests.support.images import qemu

pytestmark = [pytest.mark.timeout(5, method="signal"), pytest.mark.expect_warnings]

IMAGES = 40  # damaged images of one test
TOUCHED = 200  # bytes from the start of a structure that damage may hit


@pytest.fixture(scope="module", params=["compat=0.10", "extended_l2=on", "compression_type=zstd,cluster_size=4k"])
def healthy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[int]]:
    """An image with all kinds of structures, and where in the file they start."""
    need("qemu-img", "qemu-io")
    path = tmp_path_factory.mktemp("healthy") / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", request.param, path, "4M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 300k", "-c", "write -c -P 2 1M 64k", path)
    qemu("qemu-img", "snapshot", "-c", "one", path)
    if "compat" not in request.param:
        qemu("qemu-img", "bitmap", "--add", path, "b0")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 3 64k 300k", "-c", "write -z 2M 64k", path)
    data = path.read_bytes()
    words = [int.from_bytes(data[place : place + 8], "big") for place in (40, 48, 64)]
    tables = [word & 0x00FFFFFFFFFFFE00 for word in words]
    l2_tables = [int.from_bytes(data[table : table + 8], "big") & 0x00FFFFFFFFFFFE00 for table in tables]
    return data, [0, 0, 0, *tables, *[table for table in l2_tables if table < len(data)]]


def damage(data: bytes, starts: list[int], generator: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(generator.randrange(1, 6)):
        place = generator.choice(starts) + generator.randrange(TOUCHED)
        if place < len(damaged):
            damaged[place] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])
    if generator.random() < 0.2:
        del damaged[generator.randrange(len(damaged)) :]
    return bytes(damaged)


def use(path: Path) -> int:
    """Do all that the verbs do; return how many points could be looked at."""
    with open_chain(str(path), Policy()) as chain:
        sizes = Sizes(chain, limits.MAX_LISTED_TABLES)
        list_verb.document(chain)
        info.document(chain, sizes)
        found = points(chain)[:10]
        for point in found:
            look_at(chain, point, sizes)
        return len(found)


def look_at(chain: object, point: Point, sizes: Sizes) -> None:
    sizes.allocated(point)
    try:
        disk = open_disk(chain, point, Cache(1 << 20))  # type: ignore[arg-type]
        disk.extents(0, disk.virtual_size, 100)
        for offset in (0, 1 << 20, max(0, disk.virtual_size - 512)):
            disk.pread(offset, 100_000)
    except QcowfsError:
        pass


@pytest.mark.parametrize("seed", range(25))
def test_damage_is_an_answer_or_a_named_error(healthy: tuple[bytes, list[int]], tmp_path: Path, seed: int) -> None:
    data, starts = healthy
    generator = random.Random(seed)
    path = tmp_path / "damaged.qcow2"
    outcomes = {"used": 0, "refused": 0}
    for _ in range(IMAGES):
        path.write_bytes(damage(data, starts, generator))
        try:
            outcomes["used"] += use(path) > 0
        except QcowfsError as error:
            outcomes["refused"] += 1
            assert "\n" not in str(error)

    assert IMAGES == sum(outcomes.values())
    assert outcomes["used"] > 0, "the damage is too heavy to test anything behind the header"
    assert outcomes["refused"] > 0, "the damage is too light"

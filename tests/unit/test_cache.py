"""One cache for all points: bounded, whatever is read and by how many threads, and right also while it is too small."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs.chain import Chain, open_chain
from qcowfs.gate import Policy
from qcowfs.snapshot import open_disk, points
from tests.support import need
from tests.support.qemu import qemu

MIB = 1 << 20
SIZE = 4 * MIB


@pytest.fixture
def content() -> bytes:
    return b"".join(random.Random(1).choices([b"alpha ", b"beta ", b"gamma ", b"delta "], k=MIB))[:SIZE]


@pytest.fixture
def image(content: bytes, tmp_path: Path) -> Path:
    """Return an overlay without data over a compressed image."""
    need("qemu-img")
    raw, base, top = tmp_path / "raw", tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    raw.write_bytes(content)
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, base)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    return top


def opened(image: Path) -> Chain:
    return open_chain(str(image), Policy())


@pytest.mark.parametrize("budget", [4096, 100_000, MIB, 64 * MIB])
def test_the_budget_holds_and_every_thread_reads_right(image: Path, content: bytes, budget: int) -> None:
    cache = Cache(budget)
    wrong: list[str] = []
    with opened(image) as chain:
        disks = [open_disk(chain, point, cache) for point in points(chain)]

        def work(seed: int) -> None:
            dice = random.Random(seed)
            for _ in range(80):
                offset, length = dice.randrange(SIZE), dice.randrange(1, 300_000)
                disk = dice.choice(disks)
                if disk.pread(offset, length) != content[offset : offset + length]:
                    wrong.append(f"{offset}+{length}")
                disk.seek(offset, dice.choice([os.SEEK_DATA, os.SEEK_HOLE]))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert [] == wrong
    assert cache.used <= cache.budget == budget


def test_what_is_there_needs_no_more_room_when_it_is_read_again(image: Path, content: bytes) -> None:
    cache = Cache(64 * MIB)
    with opened(image) as chain:
        disk = open_disk(chain, points(chain)[0], cache, 1)
        disk.pread(0, SIZE)
        once = cache.used
        assert disk.pread(0, SIZE) == content

    assert once == cache.used > SIZE


def test_points_that_share_clusters_share_their_entries(image: Path) -> None:
    cache = Cache(64 * MIB)
    with opened(image) as chain:
        used = []
        for number, point in enumerate(points(chain), 1):
            open_disk(chain, point, cache, number).pread(0, SIZE)
            used.append(cache.used)

    assert len(used) == 2
    assert used[1] - used[0] < 65536

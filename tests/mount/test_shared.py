"""What one mount has decompressed is for all its readers and points: each cluster is read and decompressed once.

The image lies on a file system that counts how often its compressed clusters are read.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.images import MIB
from tests.support import need
from tests.support.mounts import Mounted, call, mounted, one_line, qemu

pytest.importorskip("pyfuse3")

from tests.support.slow import SlowSource, slow_source

CLUSTERS = 64
CLUSTER = 65536
TABLES_END = 5 * CLUSTER  # header, refcounts, L1 and L2 tables lie before it, as qemu-img convert writes them


@pytest.fixture(params=["zlib", "zstd"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SlowSource]:
    """Return a compressed image with a snapshot that shares all clusters, on a file system that counts reads."""
    need("fusermount3", "qemu-img")
    raw, image = tmp_path / "content.raw", tmp_path / "image.qcow2"
    words = random.Random(1).choices([b"alpha ", b"beta ", b"gamma ", b"delta "], k=MIB)
    raw.write_bytes(b"".join(words)[: CLUSTERS * CLUSTER])
    qemu("qemu-img", "convert", "-c", "-o", f"compression_type={request.param}", "-O", "qcow2", raw, image)
    data_end = image.stat().st_size
    qemu("qemu-img", "snapshot", "-c", "same", image)
    with slow_source(image, tmp_path / "slow", TABLES_END, data_end) as found:
        yield found


@pytest.fixture
def mount(source: SlowSource, target: Path) -> Iterator[Mounted]:
    with mounted(source.path, target) as found:
        yield found
        source.let_go()


def direct(path: Path, offset: int, length: int) -> bytes:
    """Read without the page cache of the mount."""
    with mmap.mmap(-1, length) as buffer:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            got = os.preadv(file, [buffer], offset)
        finally:
            os.close(file)
        return buffer[:got]


def content(tmp_path: Path) -> bytes:
    return (tmp_path / "content.raw").read_bytes()


def test_readers_of_one_cluster_decompress_it_once(mount: Mounted, source: SlowSource, tmp_path: Path) -> None:
    expected = content(tmp_path)[CLUSTER : 2 * CLUSTER]
    before = source.reads

    with ThreadPoolExecutor(3) as pool:
        pieces = [pool.submit(direct, mount / "current.raw", CLUSTER, CLUSTER) for _ in range(3)]
        source.wait_for_reads(1)
        source.let_go()
        assert [expected] * 3 == [piece.result() for piece in pieces]

    assert source.reads - before == 1


def test_points_that_share_a_cluster_share_what_it_holds(mount: Mounted, source: SlowSource, tmp_path: Path) -> None:
    source.let_go()
    expected = content(tmp_path)[7 * CLUSTER : 8 * CLUSTER]
    before = source.reads

    assert expected == direct(mount / "current.raw", 7 * CLUSTER, CLUSTER)
    assert expected == direct(mount / "same.raw", 7 * CLUSTER, CLUSTER)
    assert source.reads - before == 1


@pytest.mark.parametrize("length", [CLUSTER, 4 * CLUSTER, MIB])
def test_decompressing_ahead_does_nothing_twice(
    mount: Mounted, source: SlowSource, tmp_path: Path, length: int
) -> None:
    source.let_go()
    before = source.reads

    found = b"".join(direct(mount / "current.raw", place, length) for place in range(0, CLUSTERS * CLUSTER, length))

    assert found == content(tmp_path)
    assert source.reads - before == CLUSTERS


@pytest.mark.parametrize("size", ["", "0", "-1", "1T", "64k", "lots"])
@pytest.mark.parametrize("form", ["--cache-size={}", "-ocache_size={}"])
def test_a_size_that_no_cache_can_have_is_told_in_one_line(target: Path, tmp_path: Path, form: str, size: str) -> None:
    done = call("mount", form.format(size), tmp_path / "nope", target)

    assert done.returncode == 2
    assert "cache" in one_line(done)

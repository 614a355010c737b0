"""L2 tables full of random entries over a backing file: each cluster is what QEMU reads, and so are the extents.

Forged images by seed, with QEMU's answer. `SEED=N make test TESTS=tests/hostile/test_random_tables.py` runs one seed.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcowfs._core import Disk
from qcowfs.chain import Chain, open_chain
from qcowfs.errors import ReadFault
from qcowfs.gate import Policy
from tests.support import need
from tests.support.content import EIO, Content
from tests.support.qemu import qemu, qemu_reads
from tests.support.tables import COMPRESSED, COPIED, Tables, active_disk, qcowfs_says

pytestmark = [pytest.mark.timeout(5, method="signal"), pytest.mark.expect_warnings]

SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else range(25)
CLUSTERS = 48
KINDS = {
    "version-2": "compat=0.10,cluster_size=512",
    "version-3": "compat=1.1,cluster_size=4096",
    "zstd": "compression_type=zstd,cluster_size=1024",
    "extended": "extended_l2=on,cluster_size=16384",
    "data-file": "data_file={directory}/data.raw,cluster_size=2048",
    "extended-data-file": "extended_l2=on,data_file={directory}/data.raw,cluster_size=16384",
}


@pytest.fixture(scope="module")
def originals() -> dict[str, Path]:
    """The image of each kind, made when its first test asks."""
    return {}


@pytest.fixture
def original(kind: str, originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with all clusters written, over a backing file that differs everywhere."""
    need("qemu-img", "qemu-io")
    if kind not in originals:
        directory = tmp_path_factory.mktemp(kind)
        options = KINDS[kind].format(directory=directory)
        cluster_size = int(options.rpartition("=")[2])
        size = CLUSTERS * cluster_size
        (directory / "base.raw").write_bytes(random.Random(kind).randbytes(size))
        image = originals[kind] = directory / "image.qcow2"
        backing = ["-b", "base.raw", "-F", "raw"]
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, image, str(size))
        qemu("qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {size}", image)
    return originals[kind]


def deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -12)
    return compressor.compress(data) + compressor.flush()


def zstd(data: bytes) -> bytes:
    """One frame of one raw block."""
    return b"\x28\xb5\x2f\xfd\xa0" + struct.pack("<I", len(data)) + (len(data) << 3 | 1).to_bytes(3, "little") + data


@dataclass
class Entries:
    """Random entries that are wrong in one way or another, or right."""

    tables: Tables
    generator: random.Random
    streams: list[tuple[int, int]]
    external: bool

    def place(self) -> int:
        """A host offset: of a cluster, of a table or the header, past the end, or of nothing in particular."""
        clusters = self.tables.path.stat().st_size // self.tables.cluster_size
        offset = self.generator.randrange(clusters) * self.tables.cluster_size
        return self.generator.choice([offset, offset, offset, offset + 512, offset + (1 << 40), 0])

    def compressed(self) -> int:
        offset, length = self.generator.choice(self.streams)
        offset += self.generator.choice([0] * 6 + [1, -1, 512])
        length += self.generator.choice([0] * 6 + [511, 512, -512])
        return self.tables.compressed(offset, max(1, min(length, 2 * self.tables.cluster_size - 512)))

    def entry(self, cluster: int) -> int:
        kind = self.generator.randrange(10)
        if self.external and kind < 7:
            return COPIED | cluster * self.tables.cluster_size  # the only offset that is right
        if kind < 3:
            return self.compressed()
        if kind == 3:
            return self.generator.getrandbits(64)
        flags = self.generator.choice([0, COPIED, COPIED, COPIED | 1, 1, 1 << 57, COMPRESSED])
        return self.place() | flags

    def bits(self) -> int:
        """The second word of an extended entry: seldom both bits of one subcluster."""
        allocated, zero = self.generator.getrandbits(32), self.generator.getrandbits(32)
        return self.generator.choice([allocated | (zero & ~allocated) << 32] * 3 + [zero << 32, allocated, 0])


def forge(kind: str, original: Path, generator: random.Random) -> Path:
    image = original.with_name("forged.qcow2")
    shutil.copyfile(original, image)
    tables = Tables(image)
    pack = zstd if "zstd" in KINDS[kind] else deflate
    streams = [pack((generator.randbytes(3) * tables.cluster_size)[: tables.cluster_size]) for _ in range(4)]
    appended = [(tables.append(stream), len(stream)) for stream in streams]
    entries = Entries(tables, generator, appended, external="data_file" in KINDS[kind])
    for cluster in range(CLUSTERS):
        tables.l2(cluster, entries.entry(cluster), bits=entries.bits() if tables.extended else None)
    return image


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_random_entries(kind: str, seed: int, original: Path) -> None:
    """Right, wrong, and as QEMU reads them."""
    image = forge(kind, original, random.Random(f"{kind} {seed}"))
    size = Tables(image).cluster_size

    with open_chain(str(image), Policy()) as chain:
        disk = active_disk(chain)
        expected = assert_as_qemu_reads(image, disk, size)
        for number, content in enumerate(expected):
            check_extents(chain, disk, number, content, size)


def assert_as_qemu_reads(image: Path, disk: Disk, cluster_size: int) -> list[Content]:
    """Compare each cluster of `disk` with what QEMU reads of `image`, and return that."""
    ranges = [(number * cluster_size, cluster_size) for number in range(CLUSTERS)]
    said = [qcowfs_says(disk, *piece) for piece in ranges]
    expected = qemu_reads(image, ranges)

    assert expected == said, [number for number in range(CLUSTERS) if expected[number] != said[number]]
    return expected


def check_extents(chain: Chain, disk: Disk, number: int, content: Content, cluster_size: int) -> None:
    """What the map says of a cluster is what was read of it; it cannot know of a stream that is bad."""
    try:
        found = disk.extents(number * cluster_size, cluster_size, 100)
    except ReadFault:
        assert content == EIO
        return
    assert sum(extent.length for extent in found) == cluster_size
    if content == EIO:
        assert [extent.compressed for extent in found] == [True]
        return
    for extent in found:
        start = extent.start - number * cluster_size
        if extent.zero:
            assert content[start : start + extent.length] == bytes(extent.length)
        elif extent.offset is not None:
            stored = chain.layers[extent.depth].data.read_at(extent.offset, extent.length)
            assert content[start : start + extent.length] == stored.ljust(extent.length, b"\0")


@pytest.fixture(scope="module", params=["zlib", "zstd"])
def compressed_text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of CLUSTERS compressed clusters, by QEMU."""
    need("qemu-img", "qemu-io")
    directory = tmp_path_factory.mktemp(request.param)
    generator = random.Random(request.param)
    words = [generator.randbytes(generator.randrange(1, 9)) for _ in range(300)]
    text = b" ".join(generator.choice(words) for _ in range(CLUSTERS * 4096))
    (directory / "text.raw").write_bytes(text[: CLUSTERS * 4096])
    options = f"compression_type={request.param},cluster_size=4096"
    image = directory / "image.qcow2"
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, directory / "text.raw", image)
    return image


@pytest.mark.parametrize("seed", SEEDS)
def test_streams_with_flipped_bits(seed: int, compressed_text: Path) -> None:
    """R25, R26: what QEMU takes, and refuses, is what qcowfs takes, and refuses."""
    image = compressed_text.with_name("forged.qcow2")
    shutil.copyfile(compressed_text, image)
    tables, generator = Tables(image), random.Random(seed)
    size = tables.cluster_size
    for number in range(CLUSTERS):
        place = (tables.l2(number) & ((1 << 50) - 1)) + generator.choice([0, 1, 2, 3, 4, 5, 8, 20, 60, 500, 1500])
        tables.word(place, tables.word(place) ^ 1 << generator.randrange(64))

    with open_chain(str(image), Policy()) as chain:
        assert_as_qemu_reads(image, active_disk(chain), size)

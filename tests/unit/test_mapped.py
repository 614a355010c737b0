"""Files that are runs of disks, against the same bytes put together in Python."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs._mapped import Mapped
from qcowfs._source import FileSource
from qcowfs._tables import LayerMap
from qcowfs.inside.reader import INLINE
from qcowfs.inside.record import EXTENT

SIZE = 200_000


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[tuple[list[Disk], list[bytes]]]:
    """Two raw disks and their bytes."""
    contents = [random.Random(seed).randbytes(SIZE) for seed in (1, 2)]
    sources = []
    disks = []
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.raw"
        path.write_bytes(content)
        source = FileSource(os.open(path, os.O_RDONLY), str(path))
        sources.append(source)
        disks.append(Disk([LayerMap.raw(source, depth=0, virtual_size=SIZE)], SIZE, Cache(1 << 20)))
    yield disks, contents
    del disks
    for source in sources:
        source.close()


def random_runs(dice: random.Random, size: int, sources: list[bytes]) -> tuple[list[tuple[int, int, int, int]], bytes]:
    """Return runs with gaps that fit into `size`, and the bytes they make."""
    runs = []
    expected = bytearray(size)
    start = 0
    while True:
        start += dice.choice((0, 0, 1, 4096, dice.randrange(9000)))
        length = dice.choice((1, 512, 4096, dice.randrange(1, 20_000)))
        if start + length > size:
            return runs, bytes(expected)
        number = dice.randrange(len(sources))
        offset = dice.randrange(len(sources[number]) - length)
        runs.append((start, length, number, offset))
        expected[start : start + length] = sources[number][offset : offset + length]
        start += length


def packed(runs: list[tuple[int, int, int, int]]) -> bytes:
    """Return extents of a volume, number 0, or of inline bytes, number 1."""
    return b"".join(EXTENT.pack(start, length, offset + number * INLINE) for start, length, number, offset in runs)


@pytest.mark.parametrize("seed", range(20))
def test_a_volume_reads_as_its_runs_and_zeros_between(seed: int, stored: tuple[list[Disk], list[bytes]]) -> None:
    disks, contents = stored
    dice = random.Random(seed)
    runs, expected = random_runs(dice, 150_000, contents)

    volume = Mapped(150_000, disks, runs)

    assert volume.pread(0, 1 << 20) == expected
    for _ in range(50):
        offset, length = dice.randrange(160_000), dice.randrange(20_000)
        assert volume.pread(offset, length) == expected[offset : offset + length]


@pytest.mark.parametrize("seed", range(20))
def test_a_file_in_a_volume_reads_as_its_extents(seed: int, stored: tuple[list[Disk], list[bytes]]) -> None:
    disks, contents = stored
    dice = random.Random(seed)
    runs, volume_bytes = random_runs(dice, 150_000, contents)
    literal = dice.randbytes(50_000)
    extents, expected = random_runs(dice, 100_000, [volume_bytes, literal])

    file = Mapped(150_000, disks, runs).part(100_000, packed(extents), literal)

    assert file.virtual_size == 100_000
    assert file.pread(0, 1 << 20) == expected
    assert file.pread(99_999, 10) == expected[99_999:]
    assert file.pread(100_000, 10) == b""


@pytest.mark.parametrize("seed", range(20))
def test_what_seek_calls_a_hole_is_zeros_and_every_walk_ends(seed: int, stored: tuple[list[Disk], list[bytes]]) -> None:
    disks, contents = stored
    runs, expected = random_runs(random.Random(seed), 150_000, contents)
    volume = Mapped(150_000, disks, runs)
    data = set()

    place = volume.seek(0, os.SEEK_DATA)
    while place is not None:
        end = volume.seek(place, os.SEEK_HOLE)
        assert end is not None
        assert end > place
        data.update(range(place, end))
        place = volume.seek(end, os.SEEK_DATA)

    assert data == {byte for start, length, _, _ in runs for byte in range(start, start + length)}
    assert all(byte == 0 for place, byte in enumerate(expected) if place not in data)
    assert volume.seek(150_000, os.SEEK_DATA) is None


@pytest.mark.parametrize(
    "extents",
    [
        [(0, 0, 0)],
        [(0, 512, 0), (511, 512, 4096)],
        [(4096, 512, 0), (0, 512, 512)],
        [(0, 9001, 0)],
        [(9000, 1, 0)],
        [(0, 512, 149_900)],
        [(0, 512, 150_000)],
        [(0, 512, INLINE + 1)],
        [(0, (1 << 64) - 1, 1)],
        [((1 << 64) - 1, 2, 0)],
    ],
)
def test_extents_that_no_file_can_have_are_refused(
    extents: list[tuple[int, int, int]], stored: tuple[list[Disk], list[bytes]]
) -> None:
    volume = Mapped(150_000, stored[0], [(0, 150_000, 0, 0)])

    with pytest.raises(ValueError, match="out of order, or outside"):
        volume.part(9000, b"".join(struct.pack("<QQQ", *extent) for extent in extents), bytes(512))


def test_a_run_past_its_disk_is_refused(stored: tuple[list[Disk], list[bytes]]) -> None:
    with pytest.raises(ValueError, match="past its disk"):
        Mapped(SIZE, stored[0], [(0, SIZE, 1, 1)])

"""Holes of a remote source: as the base says, asked once, until what is known is forgotten."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs._blocks import BlockCache, BlockSource
from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs._source import FileSource, Source
from qcowfs._tables import LayerMap

MIB = 1 << 20
SIZE = 64 * MIB
DATA = range(0, SIZE, MIB // 2)  # more extents than answers are remembered; each begins with 64 KiB of data
LENGTH = 64 << 10


@pytest.fixture
def sparse(tmp_path: Path) -> Path:
    path = tmp_path / "sparse"
    with open(path, "wb") as opened:
        opened.truncate(SIZE)
        for start in DATA[1:]:
            opened.seek(start)
            opened.write(b"x" * LENGTH)
    return path


@pytest.fixture
def source(sparse: Path) -> Iterator[BlockSource]:
    source = BlockSource(BlockCache(4 * MIB), FileSource(os.open(sparse, os.O_RDONLY), str(sparse)))
    yield source
    source.close()


def disk_of(source: Source) -> Disk:
    """Make a disk that remembers nothing itself."""
    return Disk([LayerMap.raw(source, depth=0, virtual_size=SIZE)], SIZE, Cache(MIB))


def extents(source: Source) -> list[int]:
    """Return where data and holes begin, in turn."""
    found: list[int] = []
    place: int | None = 0
    while place is not None and place < SIZE:
        place = disk_of(source).seek(place, os.SEEK_HOLE if len(found) % 2 else os.SEEK_DATA)
        found += [] if place is None else [place]
    return found


def test_holes_are_those_of_the_base(source: BlockSource) -> None:
    expected = [edge for start in DATA[1:] for edge in (start, start + LENGTH)]

    assert expected == extents(source) == extents(source)


def test_what_is_known_is_not_asked_again_until_it_is_forgotten(source: BlockSource, sparse: Path) -> None:
    assert DATA[1] == disk_of(source).seek(0, os.SEEK_DATA)
    with open(sparse, "r+b") as opened:
        opened.write(b"y" * LENGTH)

    assert DATA[1] == disk_of(source).seek(0, os.SEEK_DATA)
    assert 0 == disk_of(source.uncached()).seek(0, os.SEEK_DATA)
    source.forget()
    assert 0 == disk_of(source).seek(0, os.SEEK_DATA)

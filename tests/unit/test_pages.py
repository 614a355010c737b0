"""Random readers of a source that is near: pages of their own until a second one of the same block is wanted."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs._blocks import BlockCache, BlockSource
from qcowfs.source.cachedir import CacheDirectory
from tests.support.remotebase import RemoteBase, content_of

KIB, MIB = 1 << 10, 1 << 20
PAGE, BLOCK = 4 * KIB, 64 * KIB
SIZE = 8 * MIB + 12_345
CONTENT = content_of(SIZE)


@pytest.fixture
def base() -> RemoteBase:
    return RemoteBase(CONTENT)


@pytest.fixture
def source(base: RemoteBase) -> Iterator[BlockSource]:
    source = BlockSource(BlockCache(64 * MIB), base.source, near=True)
    yield source
    source.close()


def test_a_page_is_fetched_alone_and_once(source: BlockSource, base: RemoteBase) -> None:
    for _ in range(2):
        assert CONTENT[3 * MIB + PAGE : 3 * MIB + 2 * PAGE] == source.read_at(3 * MIB + PAGE, PAGE)

    assert [(3 * MIB + PAGE, PAGE)] == base.requests


def test_whoever_wants_a_second_page_of_a_block_gets_all_of_it(source: BlockSource, base: RemoteBase) -> None:
    for page in (1, 9, 4, 15, 1):
        place = 3 * MIB + page * PAGE
        assert CONTENT[place : place + PAGE] == source.read_at(place, PAGE)

    assert [(3 * MIB + PAGE, PAGE), (3 * MIB, BLOCK)] == base.requests


def test_pages_of_one_read_are_one_request(source: BlockSource, base: RemoteBase) -> None:
    place = 3 * MIB + 2 * PAGE

    assert CONTENT[place : place + 5 * PAGE] == source.read_at(place, 5 * PAGE)
    assert CONTENT[place + PAGE : place + 3 * PAGE] == source.read_at(place + PAGE, 2 * PAGE)
    assert [(place, 5 * PAGE)] == base.requests


@pytest.mark.parametrize(("offset", "length"), [(PAGE, KIB), (PAGE + 1, PAGE), (PAGE - 512, PAGE), (0, PAGE + 512)])
def test_what_reads_no_whole_pages_reads_tables_and_gets_blocks(
    source: BlockSource, base: RemoteBase, offset: int, length: int
) -> None:
    assert CONTENT[offset : offset + length] == source.read_at(offset, length)
    assert [(0, BLOCK)] == base.requests


def test_a_bad_sector_refuses_its_own_page_alone(source: BlockSource, base: RemoteBase) -> None:
    base.bad = {2 * PAGE + 5}

    assert CONTENT[:PAGE] == source.read_at(0, PAGE)
    assert CONTENT[3 * PAGE : 5 * PAGE] == source.read_at(3 * PAGE, 2 * PAGE)
    with pytest.raises(OSError) as caught:
        source.read_at(PAGE, 2 * PAGE)
    assert errno.EIO == caught.value.errno
    base.bad = set()
    assert CONTENT[PAGE : 3 * PAGE] == source.read_at(PAGE, 2 * PAGE)


def test_a_page_that_was_forgotten_is_fetched_anew(source: BlockSource, base: RemoteBase) -> None:
    source.read_at(MIB, PAGE)
    base.content = content_of(SIZE, seed=2)
    source.forget()

    assert base.content[MIB : MIB + PAGE] == source.read_at(MIB, PAGE)


def test_what_is_kept_on_disk_is_fetched_in_blocks(base: RemoteBase, tmp_path: Path) -> None:
    directory = CacheDirectory(str(tmp_path / "kept"))
    source = BlockSource(BlockCache(64 * MIB), base.source, directory=directory, version="1", near=True)
    source.read_at(3 * MIB + PAGE, PAGE)
    source.close()
    directory.close()

    assert [(3 * MIB, BLOCK)] == base.requests


def test_reads_of_all_kinds_tell_the_truth_and_few_bytes_are_fetched_twice(
    source: BlockSource, base: RemoteBase
) -> None:
    dice = random.Random(7)
    for _ in range(3000):
        length = dice.choice((PAGE, PAGE, 2 * PAGE, 15 * PAGE, BLOCK, 300 * KIB, dice.randrange(1, BLOCK)))
        unit = dice.choice((1, 512, PAGE))
        offset = dice.randrange(SIZE // unit) * unit
        assert CONTENT[offset : offset + length] == source.read_at(offset, length), (offset, length)

    assert SIZE <= base.fetched <= 2 * SIZE

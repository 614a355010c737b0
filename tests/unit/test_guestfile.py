"""A file of a tree as bytes: composed from pages of extents, and what a worker may say of them that is refused."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from qcowfs import limits
from qcowfs._mapped import Mapped
from qcowfs.errors import TreeFault
from qcowfs.inside.guestfile import Broken, file_disk
from qcowfs.inside.reader import INLINE, Extents
from qcowfs.inside.record import Extent
from tests.support.volumes import mapped_file

CONTENT = bytes(range(256)) * 256
EMPTY: tuple[Extent, ...] = ()


class Told:
    """Answers as a Tree would, from pages by the offset that they begin at."""

    name = "current/p1"

    def __init__(self, pages: Mapping[int, Extents | None]) -> None:
        self.pages = pages

    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        assert ino == 12
        assert limit == limits.INSIDE_EXTENTS
        return self.pages[offset]


class Crumbs(Told):
    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        return Extents(EMPTY, offset + 1)


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[Mapped]:
    path = tmp_path / "volume"
    path.write_bytes(b"?" * 512 + CONTENT)
    with mapped_file(path, 512) as found:
        yield found


def test_pages_of_extents_make_one_file(volume: Mapped) -> None:
    tree = Told(
        {
            0: Extents([Extent(0, 10, 256), Extent(10, 3, INLINE + 1)], 20, b"-abc"),
            20: Extents([Extent(30, 2, INLINE), Extent(32, 8, 512)], 100, b"yz"),
        }
    )

    disk = file_disk(tree, volume, 12, 100)

    assert disk is not None
    assert (CONTENT[:10] + b"abc" + bytes(17) + b"yz" + CONTENT[:8]).ljust(100, b"\0") == disk.pread(0, 1000)


def test_an_empty_file_asks_for_nothing(volume: Mapped) -> None:
    disk = file_disk(Told({}), volume, 12, 0)

    assert disk is not None
    assert (0, b"") == (disk.virtual_size, disk.pread(0, 10))


def test_a_compressed_file_has_no_place(volume: Mapped) -> None:
    assert file_disk(Told({0: None}), volume, 12, 5) is None


@pytest.mark.parametrize(
    "pages",
    [
        {0: Extents(EMPTY, 0)},
        {0: Extents(EMPTY, 101)},
        {0: Extents(EMPTY, 50), 50: Extents(EMPTY, 50)},
        {0: Extents(EMPTY, 50), 50: None},
        {0: Extents([Extent(40, 20, 0)], 60), 60: Extents([Extent(59, 1, 0)], 100)},
        {0: Extents([Extent(0, 2, len(CONTENT) - 1)], 100)},
        {0: Extents([Extent(0, 2, INLINE + 1)], 100, b"ab")},
        {0: Extents(EMPTY, 50, b"i" * limits.MAX_FILE_INLINE), 50: Extents(EMPTY, 100, b"i")},
    ],
)
def test_a_contradiction_is_a_fault(volume: Mapped, pages: dict[int, Extents | None]) -> None:
    with pytest.raises(TreeFault, match="current/p1: inode 12: the file's extents contradict") as caught:
        file_disk(Told(pages), volume, 12, 100)

    assert errno.EIO == caught.value.errno


class Torn(Told):
    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        if offset == 50:
            raise TreeFault(self.name, "a chain that breaks off", errno.EIO)
        return super().extents(ino, offset, limit)


def test_of_a_file_that_breaks_off_the_beginning_is_read(volume: Mapped) -> None:
    disk = file_disk(Torn({0: Extents([Extent(0, 50, 256)], 50)}), volume, 12, 100)

    assert isinstance(disk, Broken)
    assert disk.virtual_size == 100
    assert CONTENT[10:50] == disk.pread(10, 40)
    assert disk.pread(100, 10) == b""
    assert [disk.seek(offset, os.SEEK_DATA) for offset in (0, 49, 50, 99, 100)] == [0, 49, 50, 99, None]
    assert [disk.seek(offset, os.SEEK_HOLE) for offset in (0, 50, 99, 100)] == [100, 100, 100, None]
    for offset, length in ((49, 2), (50, 1), (99, 100)):
        with pytest.raises(TreeFault, match="a chain that breaks off"):
            disk.pread(offset, length)


def test_a_file_in_crumbs_ends_with_a_fault(volume: Mapped) -> None:
    with pytest.raises(TreeFault, match="inode 12: the file is in too many pieces"):
        file_disk(Crumbs({}), volume, 12, 1 << 40)

"""Trees that no file system could hold: every walk of them ends, and tells why it went no further."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs import limits
from qcowfs.errors import TreeFault
from qcowfs.inside import readers
from qcowfs.inside.contents import Item
from qcowfs.inside.filesystems import Filesystem
from qcowfs.inside.trees import Trees
from qcowfs.inside.volume import Volume
from qcowfs.inside.walk import File, root_of, walk
from tests.support import wildreader
from tests.support.volumes import mapped_file

KIND = "wild"
DEEPEST = 50
MOST = 5000


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[File]:
    monkeypatch.setitem(readers.READERS, KIND, (wildreader.__name__, "", "nothing"))
    monkeypatch.setattr(limits, "MAX_WALK_DEPTH", DEEPEST)
    monkeypatch.setattr(limits, "MAX_LISTED_ENTRIES", MOST)
    path = tmp_path / "volume"
    path.write_bytes(bytes(4096))
    volume = Volume(name=b"", kind="disk", segments=(), size=4096)
    with mapped_file(path) as mapped, Trees(recover=True) as trees:
        yield root_of(trees.tree("disk", Item(volume, Filesystem(kind=KIND)), mapped), mapped)


def test_a_walk_enters_no_directory_twice(root: File) -> None:
    walked = {path: [name for name, _ in found.troubles] for path, _, found in walk(root, b"")}

    assert [b"self", b"two"] == walked[b""]
    assert b"one" in walked
    assert not {b"self", b"two", b"one/up"} & walked.keys()
    assert [b"up"] == walked[b"one"]


def test_a_walk_ends_above_the_bottom(root: File) -> None:
    walked = {path: found for path, _, found in walk(root, b"") if path.startswith(b"deep")}

    deepest = max(walked, key=len)
    assert DEEPEST == len(walked) == deepest.count(b"/") + 1
    assert ["not listed: there are too many directories, or too deep ones"] == [
        what for _, what in walked[deepest].troubles
    ]


def test_a_walk_counts_directories(root: File, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_WALKED_DIRECTORIES", 10)

    assert len(list(walk(root, b""))) <= 11


def test_a_listing_without_an_end_is_cut(root: File) -> None:
    found = root.resolve(b"endless", follow=True).children()

    assert MOST <= len(found.entries) <= 2 * MOST
    assert [(b"", f"inode {wildreader.ENDLESS}: the directory has too many entries")] == found.troubles


def test_what_came_before_the_damage_is_listed(root: File) -> None:
    found = root.resolve(b"breaks", follow=True).children()

    assert 1000 == len(found.entries)
    assert [(b"", "the second page is damaged")] == found.troubles


def test_bytes_without_a_place_are_asked_for(root: File) -> None:
    data = b"".join(root.resolve(b"one/compressed", follow=True).chunks())

    assert bytes(1 << 20) + b"\1" * (1 << 20) + b"\2" * (1 << 20) == data


def test_a_file_that_ends_before_its_size_is_a_fault(root: File) -> None:
    chunks = root.resolve(b"one/short", follow=True).chunks()

    assert bytes(1 << 20) == next(chunks)
    with pytest.raises(TreeFault, match=f"disk: the file ends at {1 << 20}, and its size is {wildreader.SIZE}"):
        next(chunks)

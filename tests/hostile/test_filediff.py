"""Comparisons and histories of trees that no file system could hold, and of damaged ones: they end, and tell why."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qcowfs import cli, limits
from qcowfs.filediff import NEW, OLD, Change, Comparison
from qcowfs.inside import readers
from qcowfs.inside.contents import Item
from qcowfs.inside.filesystems import Filesystem
from qcowfs.inside.trees import Trees
from qcowfs.inside.volume import Volume
from qcowfs.inside.walk import File, root_of
from qcowfs.renames import with_renames
from tests.hostile.test_inside_commands import PATIENCE, image
from tests.support import wildreader
from tests.support.states import overlays
from tests.support.volumes import mapped_file

__all__ = ["image"]

KIND = "wild"
FIRST = b"breaks/" + b"0" * 20  # where the directory is entered that has several names
DEEPEST = 50
MOST = 5000
Told = list[tuple[int | None, bytes, str]]


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[File, File]]:
    """The roots of the same wild tree in two volumes."""
    monkeypatch.setitem(readers.READERS, KIND, (wildreader.__name__, "", "nothing"))
    monkeypatch.setattr(limits, "MAX_WALK_DEPTH", DEEPEST)
    monkeypatch.setattr(limits, "MAX_LISTED_ENTRIES", MOST)
    volume = Volume(name=b"", kind="disk", segments=(), size=4096)
    with ExitStack() as stack:
        trees = stack.enter_context(Trees(recover=True))
        found = []
        for name in ("old", "new"):
            path = tmp_path / name
            path.write_bytes(name.encode().ljust(4096, b"x"))
            mapped = stack.enter_context(mapped_file(path))
            found.append(root_of(trees.tree(name, Item(volume, Filesystem(kind=KIND)), mapped), mapped))
        yield found[0], found[1]


def compared(old: File | None, new: File | None, *, checksum: bool = False) -> tuple[list[Change], Told]:
    told: Told = []
    comparison = Comparison(
        lambda disk, _depth: disk, checksum=checksum, tell=lambda side, path, what: told.append((side, path, what))
    )
    return list(with_renames(comparison.compare(b"", old, new), comparison, lambda: None)), told


def test_a_comparison_of_wild_trees_ends(roots: tuple[File, File]) -> None:
    changes, told = compared(*roots)

    assert [] == changes
    for side in (OLD, NEW):
        paths = [path for where, path, what in told if where == side and "also in another place" in what]
        assert {b"self", b"one", b"two", FIRST + b"/up"} <= set(paths)
        assert [b"breaks"] == [path for where, path, what in told if where == side and "second page" in what]
        assert [b"deep" + b"/d" * (DEEPEST - 1)] == [
            path for where, path, what in told if where == side and "too deep ones" in what
        ]


def test_what_was_added_ends_too(roots: tuple[File, File]) -> None:
    changes, told = compared(None, roots[NEW])

    assert {"added"} == {change.kind for change in changes}
    assert {NEW} == {side for side, _, _ in told}
    deep = [change.path for change in changes if change.path.startswith(b"deep")]
    assert b"deep" + b"/d" * (DEEPEST - 1) == max(deep, key=len)


def test_bytes_that_only_the_reader_makes_are_compared(roots: tuple[File, File]) -> None:
    changes, told = compared(*roots, checksum=True)

    assert [] == changes
    assert [(None, FIRST + b"/short")] == [(side, path) for side, path, what in told if "the file ends at" in what]


def test_a_file_of_an_exabyte_is_not_compared(roots: tuple[File, File], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_READ_FILE", wildreader.SIZE - 1)

    _, told = compared(*roots, checksum=True)

    what = f"too large to be compared: {wildreader.SIZE} bytes"
    assert {FIRST + b"/compressed", FIRST + b"/short"} == {path for _, path, why in told if why == what}


@pytest.mark.expect_warnings
@pytest.mark.parametrize("seed", range(12))
def test_damage_is_told_in_lines_and_ends_in_time(
    image: bytes, tmp_path: Path, seed: int, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    dice = random.Random(seed)
    raws = [tmp_path / "whole", tmp_path / "damaged"]
    raws[0].write_bytes(image)
    raws[1].write_bytes(harmed(image, dice))
    top = tmp_path / "image.qcow2"
    points = overlays(tmp_path, top, raws)
    for words in (
        ["diff", "--json", str(top), *points],
        ["diff", "--checksum", str(top), *points[::-1]],
        ["history", "--json", str(top), "*/*"],
    ):
        began = time.monotonic()
        code = cli.main(words)
        said = capsysbinary.readouterr()
        errors = said.err.decode()

        assert code in (0, 1, 17), errors
        assert all(line.startswith(("qcowfs: ", "hint: ")) for line in errors.splitlines()), errors
        assert "internal error" not in errors
        assert time.monotonic() - began < PATIENCE
        if "--json" in words and said.out:
            assert (errors != "") == (json.loads(said.out)["errors"] != [])


def harmed(image: bytes, dice: random.Random) -> bytes:
    """Return the image with some wrong bytes behind its superblock."""
    data = bytearray(image)
    used = [at for at in range(4096, len(data), 1024) if any(data[at : at + 1024])]
    for at in dice.sample(used, dice.choice([1, 5, 40])):
        data[at + dice.randrange(1024)] = dice.randrange(256)
    return bytes(data)

"""What proves that files are equal by where they are stored, against their bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from qcowfs import stored
from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs._mapped import Mapped
from qcowfs._source import FileSource
from qcowfs._tables import LayerMap
from qcowfs.errors import QcowfsError
from qcowfs.inside.reader import INLINE
from qcowfs.inside.record import EXTENT
from qcowfs.stored import Piece, fingerprint, pieces, same_bytes, same_place

BLOCK = 4096
BLOCKS = 16
SIZE = BLOCK * BLOCKS
Run = tuple[int, int, int, int]


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[list[Disk]]:
    """Two disks of one file and one of another with the same bytes: every fourth block is a hole."""
    contents = bytearray(random.Random(1).randbytes(SIZE))
    for number in range(0, BLOCKS, 4):
        contents[number * BLOCK : (number + 1) * BLOCK] = bytes(BLOCK)
    sources, found = [], []
    for name in ("one", "one", "other"):
        path = tmp_path / name
        with path.open("wb") as file:
            file.truncate(SIZE)
            for number in range(BLOCKS):
                if number % 4:
                    file.seek(number * BLOCK)
                    file.write(contents[number * BLOCK : (number + 1) * BLOCK])
        source = FileSource(os.open(path, os.O_RDONLY), str(path))
        sources.append(source)
        found.append(Disk([LayerMap.raw(source, depth=0, virtual_size=SIZE)], SIZE, Cache(1 << 20)))
    yield found
    for source in sources:
        source.close()


class FileOf:
    """Which file a disk of the fixture is."""

    def __init__(self, disks: Sequence[Disk]) -> None:
        self._disks = disks

    def __call__(self, disk: Disk, depth: int) -> object:
        assert depth == 0
        return {0: "one", 1: "one", 2: "other"}[self._disks.index(disk)]


@pytest.fixture
def file_of(disks: list[Disk]) -> FileOf:
    return FileOf(disks)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail whoever reads what is compared."""

    def read(*_: object) -> bool:
        raise AssertionError("it was read")

    monkeypatch.setattr(stored, "_same_range", read)


def whole(disks: Sequence[Disk], number: int) -> Mapped:
    return Mapped(SIZE, disks, [(0, SIZE, number, 0)])


def test_the_pieces_have_no_gaps_and_say_where_they_are(disks: list[Disk], file_of: FileOf) -> None:
    mapped = Mapped(4 * BLOCK, disks, [(BLOCK, BLOCK, 0, 5 * BLOCK), (2 * BLOCK, BLOCK, 2, 8 * BLOCK)])

    assert [
        Piece(0, BLOCK, None, True),
        Piece(BLOCK, BLOCK, ("one", 5 * BLOCK), False),
        Piece(2 * BLOCK, BLOCK, None, True),
        Piece(3 * BLOCK, BLOCK, None, True),
    ] == [piece._replace(place=None) if piece.zero else piece for piece in pieces(mapped, file_of)]


@pytest.mark.usefixtures("unread")
def test_the_same_file_is_equal_without_being_read(disks: list[Disk], file_of: FileOf) -> None:
    assert same_bytes(whole(disks, 0), whole(disks, 1), file_of)
    assert same_place(whole(disks, 0), whole(disks, 1), file_of)


def test_another_file_is_equal_only_by_its_bytes(disks: list[Disk], file_of: FileOf) -> None:
    assert not same_place(whole(disks, 0), whole(disks, 2), file_of)
    assert same_bytes(whole(disks, 0), whole(disks, 2), file_of)


def test_what_is_at_hand_is_read(disks: list[Disk], file_of: FileOf) -> None:
    extents = EXTENT.pack(0, 3, INLINE)
    one, same, other = (whole(disks, 0).part(3, extents, text) for text in (b"abc", b"abc", b"abd"))

    assert not same_place(one, same, file_of)
    assert same_bytes(one, same, file_of)
    assert not same_bytes(one, other, file_of)
    assert fingerprint(one, file_of) is None


def test_what_cannot_be_read_is_no_proof(disks: list[Disk], file_of: FileOf, tmp_path: Path) -> None:
    path = tmp_path / "closed"
    path.write_bytes(bytes(SIZE))
    source = FileSource(os.open(path, os.O_RDONLY), str(path))
    broken = [Disk([LayerMap.raw(source, depth=0, virtual_size=SIZE)], SIZE, Cache(1 << 20))]
    source.close()
    mapped = Mapped(SIZE, broken, [(0, SIZE, 0, 0)])

    assert [Piece(0, SIZE, None, False)] == list(pieces(mapped, file_of))
    assert fingerprint(mapped, file_of) is None
    with pytest.raises(QcowfsError):
        same_bytes(mapped, mapped, file_of)


def random_file(dice: random.Random, disks: Sequence[Disk], like: list[Run] | None) -> list[Run]:
    """Return runs of blocks; those of `like`, but for some, if it is given."""
    found = []
    for number in range(BLOCKS):
        if like is not None and dice.random() < 0.95:
            same = [run for run in like if run[0] == number * BLOCK]
            # The bytes of all disks are the same.
            found += [
                (*run[:2], dice.randrange(len(disks)) if dice.random() < 0.05 else run[2], run[3]) for run in same
            ]
        elif dice.random() < 0.8:
            found.append((number * BLOCK, BLOCK, dice.randrange(len(disks)), dice.randrange(BLOCKS) * BLOCK))
    return found


@pytest.mark.parametrize("seed", range(200))
def test_no_proof_is_wrong(disks: list[Disk], file_of: FileOf, seed: int) -> None:
    dice = random.Random(seed)
    runs = random_file(dice, disks, None)
    one, other = (Mapped(SIZE, disks, these) for these in (runs, random_file(dice, disks, runs)))
    equal = one.pread(0, SIZE) == other.pread(0, SIZE)
    marks = fingerprint(one, file_of), fingerprint(other, file_of)

    assert equal == same_bytes(one, other, file_of)
    assert equal or not same_place(one, other, file_of)
    assert same_place(one, other, file_of) == (marks[0] == marks[1])


def test_proofs_are_found(disks: list[Disk], file_of: FileOf) -> None:
    """A random test in which nothing is ever proven, or nothing ever differs, would not fail."""
    dice = random.Random(0)
    found = []
    for _ in range(100):
        runs = random_file(dice, disks, None)
        pair = [Mapped(SIZE, disks, these) for these in (runs, random_file(dice, disks, runs))]
        found.append((same_place(*pair, file_of), same_bytes(*pair, file_of)))

    assert {(True, True), (False, True), (False, False)} == set(found)


def test_different_sizes_differ(disks: list[Disk], file_of: FileOf) -> None:
    short = Mapped(SIZE - 1, disks, [(0, SIZE - 1, 0, 0)])

    assert not same_bytes(short, whole(disks, 0), file_of)
    assert not same_place(short, whole(disks, 0), file_of)
    assert fingerprint(short, file_of) != fingerprint(whole(disks, 0), file_of)

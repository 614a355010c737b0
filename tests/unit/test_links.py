"""Links that stay in their tree: never above its root, whatever the target says."""

from __future__ import annotations

import random

import pytest

from qcowfs.errors import TreeFault
from qcowfs.vfs import links
from qcowfs.vfs.links import Depths, contained

ROOT = 1 << 40
DIRECTORY, LINK = 0o040755, 0o120777


@pytest.mark.parametrize(
    ("target", "depth", "expected"),
    [
        (b"name", 0, b"name"),
        (b"a/b", 3, b"a/b"),
        (b"/etc/passwd", 0, b"etc/passwd"),
        (b"/etc/passwd", 2, b"../../etc/passwd"),
        (b"/", 0, b"."),
        (b"/", 2, b"../.."),
        (b"../x", 0, b"x"),
        (b"../x", 1, b"../x"),
        (b"../../../x", 1, b"../x"),
        (b"a/../../x", 1, b"../x"),
        (b"/../x", 1, b"../x"),
        (b"./a//b/.", 1, b"a/b"),
        (b"..", 0, b"."),
        (b"\xff/..", 0, b"."),
    ],
)
def test_a_target_leads_up_to_the_root_at_most(target: bytes, depth: int, expected: bytes) -> None:
    assert contained(target, depth) == expected


@pytest.mark.parametrize("seed", range(20))
def test_no_target_leads_out(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(500):
        depth = chance.randrange(5)
        target = b"".join(chance.choice([b"..", b".", b"a", b"bc", b"/", b"//", b"/.."]) for _ in range(12))
        up = 0
        for place, name in enumerate(parts := contained(target, depth).split(b"/")):
            if name == b"..":
                up += 1
                assert all(before == b".." for before in parts[:place]), (target, parts)
        assert up <= depth, (target, depth)


def test_a_depth_is_learned_from_lookups() -> None:
    depths = Depths(ROOT)
    assert depths.learn(ROOT, ROOT | 5, DIRECTORY)
    assert depths.learn(ROOT | 5, ROOT | 6, DIRECTORY)
    for directory, link in ((ROOT, 7), (ROOT | 5, 8), (ROOT | 6, 9)):
        assert depths.learn(directory, ROOT | link, LINK)

    assert [depths.of(ROOT | number) for number in (7, 8, 9)] == [0, 1, 2]


def test_of_two_places_the_upper_one_counts() -> None:
    depths = Depths(ROOT)
    depths.learn(ROOT, ROOT | 5, DIRECTORY)
    for directory in (ROOT | 5, ROOT, ROOT | 5):
        depths.learn(directory, ROOT | 7, LINK)

    assert depths.of(ROOT | 7) == 0


def test_no_place_is_ever_forgotten_and_learned_again_as_a_deeper_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_PLACES", 4)
    depths = Depths(ROOT)
    depths.learn(ROOT, ROOT | 5, DIRECTORY)
    for number in (10, 11, 12, 13):
        depths.learn(ROOT, ROOT | number, LINK)
        depths.learn(ROOT | 5, ROOT | number, LINK)

    assert depths.of(ROOT | 10) == depths.of(ROOT | 11) == 0
    with pytest.raises(TreeFault):
        depths.of(ROOT | 12)


def test_a_link_that_is_also_where_nobody_knows_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_PLACES", 3)
    depths = Depths(ROOT)
    depths.learn(ROOT, ROOT | 5, DIRECTORY)
    depths.learn(ROOT | 5, ROOT | 7, LINK)
    assert depths.learn(ROOT, ROOT | 6, DIRECTORY)  # one too many
    depths.learn(ROOT | 6, ROOT | 7, LINK)

    with pytest.raises(TreeFault):
        depths.of(ROOT | 7)


def test_a_directory_has_one_place() -> None:
    depths = Depths(ROOT)
    for directory, number in ((ROOT, 5), (ROOT | 5, 6), (ROOT | 6, 7)):
        assert depths.learn(directory, ROOT | number, DIRECTORY)

    assert depths.learn(ROOT | 6, ROOT | 7, DIRECTORY)
    for directory, number in ((ROOT, 7), (ROOT | 7, 5), (ROOT | 5, 5), (ROOT | 5, 0)):
        assert not depths.learn(directory, ROOT | number, DIRECTORY)


def test_files_take_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_PLACES", 2)
    depths = Depths(ROOT)
    for number in range(10, 20):
        assert depths.learn(ROOT, ROOT | number, 0o100644)
    depths.learn(ROOT, ROOT | 7, LINK)

    assert depths.of(ROOT | 7) == 0

"""Links that stay in their tree: never above its root, whatever the target says."""

from __future__ import annotations

import random

import pytest

from qcowfs.errors import TreeFault
from qcowfs.vfs import links
from qcowfs.vfs.links import Depths, contained

ROOT = 1 << 40


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
    depths.learn(ROOT, ROOT | 5)
    depths.learn(ROOT | 5, ROOT | 6)
    depths.learn(ROOT | 6, ROOT | 7)

    assert [depths.of(ROOT | number) for number in (5, 6, 7)] == [0, 1, 2]


def test_of_two_places_the_upper_one_counts() -> None:
    depths = Depths(ROOT)
    depths.learn(ROOT, ROOT | 5)
    depths.learn(ROOT | 5, ROOT | 7)
    depths.learn(ROOT, ROOT | 7)
    depths.learn(ROOT | 5, ROOT | 7)

    assert depths.of(ROOT | 7) == 0


def test_what_was_forgotten_has_to_be_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "MAX_DEPTHS", 2)
    depths = Depths(ROOT)
    for number in (5, 6, 7):
        depths.learn(ROOT, ROOT | number)

    with pytest.raises(TreeFault):
        depths.of(ROOT | 5)
    assert depths.of(ROOT | 6) == depths.of(ROOT | 7) == 0

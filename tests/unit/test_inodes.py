"""Inode numbers: stable, never shared, never the two that FUSE keeps for itself."""

from __future__ import annotations

import pytest

from qcowfs.vfs import inodes
from qcowfs.vfs.inodes import ROOT, Inodes


def test_the_root_is_number_one() -> None:
    assert Inodes().number(b"/") == ROOT == 1


def test_a_path_has_the_same_number_in_every_mount() -> None:
    one, two = Inodes(), Inodes()
    two.number(b"/something-else.raw")

    assert one.number(b"/current.raw") == two.number(b"/current.raw")


def test_the_numbers_are_a_promise_to_what_remembers_them() -> None:
    # Backup tools and NFS clients keep them between versions of qcowfs, too.
    assert Inodes().number(b"/current.raw") == 7421083599216921931


def test_a_path_asked_for_twice_has_one_number() -> None:
    numbers = Inodes()

    assert numbers.number(b"/a.raw") == numbers.number(b"/a.raw")


def test_numbers_fit_in_a_signed_integer() -> None:
    numbers = Inodes()

    assert all(1 < numbers.number(b"/%d" % place) < 1 << 63 for place in range(10_000))


def test_two_paths_that_hash_alike_get_two_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes, "_hashed", lambda path, attempt: 100 + attempt)
    numbers = Inodes()

    assert [numbers.number(path) for path in (b"/a", b"/b", b"/a", b"/c")] == [100, 101, 100, 102]


@pytest.mark.parametrize("taken", [0, ROOT])
def test_a_hash_that_is_reserved_is_passed_over(monkeypatch: pytest.MonkeyPatch, taken: int) -> None:
    monkeypatch.setattr(inodes, "_hashed", lambda path, attempt: taken if attempt == 0 else 77)

    assert Inodes().number(b"/a") == 77


def test_a_tree_has_numbers_that_no_path_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes, "_hashed", lambda path, attempt: (5 << 40) + attempt * (1 << 40) + 3)
    numbers = Inodes()

    assert numbers.tree(b"/a/p1") == 5 << 40
    assert numbers.number(b"/a.raw") == (6 << 40) + 3
    assert numbers.tree(b"/b/p1") == 7 << 40
    assert numbers.tree(b"/a/p1") == 5 << 40


def test_a_tree_never_has_the_roots_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes, "_hashed", lambda path, attempt: attempt << 40)

    assert Inodes().tree(b"/a/p1") == 1 << 40


def test_a_path_that_becomes_something_else_has_another_number() -> None:
    numbers = Inodes()
    files = [numbers.number(b"/a.raw", turn) for turn in range(3)]
    trees = [numbers.tree(b"/a", turn) for turn in range(3)]

    assert len({*files, *trees}) == 6
    assert files[0] == numbers.number(b"/a.raw") == Inodes().number(b"/a.raw")
    assert trees[2] == numbers.tree(b"/a", 2)


def test_where_all_numbers_are_taken_a_tree_gets_none_and_nothing_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inodes, "_hashed", lambda path, attempt: 5 << 40)
    numbers = Inodes()
    numbers.number(b"/a.raw")

    assert numbers.tree(b"/a/p1") is None

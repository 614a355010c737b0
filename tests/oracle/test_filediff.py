"""`diff` of files against the kernel's mounts of the same bytes: what it tells, done to the old tree, makes the new."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support import need
from tests.support.crash import mounted
from tests.support.mounts import call
from tests.support.states import State, make_states

STATES = 31
STEPS = 60
MTIME = 0
Facts = tuple[Any, ...]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[State]]:
    need("mke2fs", "qemu-img", "losetup")
    directory = tmp_path_factory.mktemp("states")
    image = directory / "image.qcow2"
    return image, make_states(directory, image, STATES, steps=STEPS, seed=int(os.environ.get("SEED", "1")))


def raw(entry: dict[str, Any], key: str) -> bytes:
    return base64.b64decode(entry[f"{key}_b64"]) if f"{key}_b64" in entry else os.fsencode(entry[key])


def document(image: Path, *words: str | Path) -> list[dict[str, Any]]:
    done = call("diff", "--json", image, *words)
    assert "" == done.stderr
    found = json.loads(done.stdout)
    assert [] == found["errors"]
    assert done.returncode == (1 if found["changes"] else 0)
    changes = found["changes"]
    assert isinstance(changes, list)
    return changes


def held(facts: Facts) -> Facts:
    """Return what counts as contents: a link's target, a file's size and bytes."""
    size = facts[5] if stat.S_ISREG(facts[0]) else 0
    return stat.S_IFMT(facts[0]), size, facts[9]


def kept(facts: Facts) -> Facts:
    """Return what counts as metadata."""
    mtime = None if stat.S_ISDIR(facts[0]) else facts[7][MTIME]
    return facts[0], facts[2], facts[3], facts[4], mtime, facts[8]


def check(old: State, new: State, changes: list[dict[str, Any]]) -> None:
    """Check that `changes` are what differs between two states: all of it, and nothing else."""
    by_kind: dict[str, dict[bytes, dict[str, Any]]] = {}
    for change in changes:
        assert raw(change, "path") not in by_kind.setdefault(change["change"], {})
        by_kind[change["change"]][raw(change, "path")] = change
    renamed = {path: raw(change, "old_path") for path, change in by_kind.get("renamed", {}).items()}
    sources = {path: before(path, renamed) for path in new.guest if path not in by_kind.get("added", {})}

    assert len(set(sources.values())) == len(sources)
    assert set(by_kind.get("removed", {})) == old.guest.keys() - set(sources.values())
    assert set(by_kind.get("added", {})) <= new.guest.keys()
    told: dict[str, set[bytes]] = {"modified": set(), "metadata": set(), "type": set()}
    for path, source in sources.items():
        kind = difference(old.guest[source], new.guest[path])
        if kind:
            told[kind].add(path)
    assert told == {kind: set(by_kind.get(kind, {})) for kind in told}
    check_renames(old, new, renamed, by_kind)


def before(path: bytes, renamed: dict[bytes, bytes]) -> bytes:
    """Return the old path of what has a new one."""
    if path in renamed:
        return renamed[path]
    parent, slash, name = path.rpartition(b"/")
    return before(parent, renamed) + slash + name if slash else path


def difference(old: Facts, new: Facts) -> str:
    if stat.S_IFMT(old[0]) != stat.S_IFMT(new[0]):
        return "type"
    if held(old) != held(new):
        return "modified"
    return "metadata" if kept(old) != kept(new) else ""


def check_renames(
    old: State, new: State, renamed: dict[bytes, bytes], by_kind: dict[str, dict[bytes, dict[str, Any]]]
) -> None:
    """Check that each rename is of one inode, and that no plain file is told as deleted and added that was moved."""
    for path, source in renamed.items():
        assert old.inodes[source] == new.inodes[path]
        assert path not in old.guest or difference(old.guest[path], new.guest[path]) == "" or source not in new.guest
        assert stat.S_IFMT(old.guest[source][0]) == stat.S_IFMT(new.guest[path][0])
        if not stat.S_ISDIR(new.guest[path][0]):
            assert aged(old, source) == aged(new, path) or held(old.guest[source]) == held(new.guest[path])
    removed = {aged(old, path) for path in by_kind.get("removed", {}) if not stat.S_ISDIR(old.guest[path][0])}
    added = {aged(new, path) for path in by_kind.get("added", {}) if not stat.S_ISDIR(new.guest[path][0])}
    assert set() == removed & added


def aged(state: State, path: bytes) -> Facts:
    facts = state.guest[path]
    return state.inodes[path], stat.S_IFMT(facts[0]), facts[5], facts[7][MTIME]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(1, STATES))
def test_what_is_told_makes_the_new_tree_of_the_old(states: tuple[Path, list[State]], number: int) -> None:
    image, all_states = states
    old, new = all_states[number - 1], all_states[number]

    changes = document(image, old.point, new.point)

    check(old, new, changes)
    assert changes == sorted(changes, key=lambda change: raw(change, "path").split(b"/"))


@pytest.mark.slow
def test_the_storms_change_everything(states: tuple[Path, list[State]]) -> None:
    """A comparison of trees that do not differ would pass, too."""
    image, found = states
    pairs = itertools.pairwise(found[:8])
    kinds = [change["change"] for old, new in pairs for change in document(image, old.point, new.point)]

    assert all(kind in kinds for kind in ("added", "removed", "modified", "metadata", "type", "renamed"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [3, 4])
def test_all_contents_are_compared_with_checksum(states: tuple[Path, list[State]], number: int) -> None:
    image, found = states
    old, new = found[number - 1], found[number]

    assert document(image, old.point, new.point) == document(image, "--checksum", old.point, new.point)


@pytest.mark.slow
@pytest.mark.parametrize("number", [5, 6, 7, 8])
def test_rsync_sees_the_same(states: tuple[Path, list[State]], number: int, tmp_path: Path) -> None:
    need("rsync")
    image, found = states
    old, new = found[number - 1], found[number]
    copies = [shutil.copy(state.raw, tmp_path / name) for state, name in ((old, "old"), (new, "new"))]
    with mounted(copies[0]) as before, mounted(copies[1]) as after:
        words = ["-aAXn", "--delete", "--checksum", "--itemize-changes", "--8-bit-output", "--out-format=%i %n"]
        said = subprocess.run(["rsync", *words, f"{after}/", f"{before}/"], check=True, capture_output=True).stdout

    assert rsync_lines(said) == unfolded(old, new, document(image, old.point, new.point))


def rsync_lines(said: bytes) -> set[tuple[str, bytes]]:
    """Return what rsync would do to the old tree, as (added, removed or changed, path)."""
    found = set()
    for line in said.splitlines():
        what, _, path = line.partition(b" ")
        path = path.strip().rstrip(b"/")
        if what == b"*deleting":
            found.add(("removed", path))
        elif what[2:].strip(b"+") == b"":
            found.add(("added", path))
        elif what[2:].strip(b".t") or what[1:2] != b"d":  # a directory's time
            found.add(("changed", path))
    return {(what, path) for what, path in found if path not in (b"", b".")}


def unfolded(old: State, new: State, changes: list[dict[str, Any]]) -> set[tuple[str, bytes]]:
    """Return what is told in the same form: without renames."""
    told = {("removed", path) for path in old.guest.keys() - new.guest.keys()}
    told |= {("added", path) for path in new.guest.keys() - old.guest.keys()}
    for change in changes:
        path = raw(change, "path")
        if change.get("differs") == ["mtime"] and seconds(change["old"]) == seconds(change["new"]):
            continue  # rsync sees no fractions of a second here
        if change["change"] in ("modified", "metadata") and path in old.guest:
            told.add(("changed", path))
        elif change["change"] == "type":  # it is deleted, and another is made
            told |= {("removed", path), ("added", path)} if change["old"]["type"] == "directory" else {("added", path)}
    return {(what, path) for what, path in told if path}


def seconds(side: dict[str, Any]) -> str:
    return str(side["mtime"]).partition(".")[0]

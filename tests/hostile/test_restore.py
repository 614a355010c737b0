"""Trees that no file system could hold, and damaged ones, restored: nothing lands outside, and what can be is there."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowfs import cli, limits
from qcowfs.inside import readers
from qcowfs.inside.contents import Item
from qcowfs.inside.filesystems import Filesystem
from qcowfs.inside.trees import Trees
from qcowfs.inside.volume import Volume
from qcowfs.inside.walk import File, Place, root_of
from qcowfs.restore import content, draft
from qcowfs.restore.destination import Destination
from qcowfs.restore.directory import Existing
from qcowfs.restore.ledger import Ledger, Listener
from qcowfs.restore.restorer import Restorer
from tests.hostile.test_inside_commands import PATIENCE, damaged, image
from tests.support import namesakes, wildreader
from tests.support.volumes import mapped_file

__all__ = ["image"]  # a fixture
KIND = "wild"
DEEPEST = 30


class Told(Listener):
    """What a restore said, by the paths that it said it of."""

    def __init__(self) -> None:
        self.done: list[bytes] = []
        self.errors: list[tuple[bytes, str]] = []
        self.warnings: list[str] = []

    def restored(self, path: bytes, place: Place) -> None:
        self.done.append(path)

    def skipped(self, path: bytes, why: str) -> None:
        raise AssertionError(path)

    def failed(self, path: bytes, what: str, hint: str | None) -> None:
        self.errors.append((path, what))

    def warned(self, path: bytes, what: str) -> None:
        self.warnings.append(what)

    def moved(self, path: bytes, count: int) -> None:
        assert count > 0


@contextmanager
def tree(monkeypatch: pytest.MonkeyPatch, path: Path, module: str) -> Iterator[File]:
    monkeypatch.setitem(readers.READERS, KIND, (module, "", "nothing"))
    path.write_bytes(bytes(4096))
    volume = Volume(name=b"", kind="disk", segments=(), size=4096)
    with mapped_file(path) as mapped, Trees(recover=True) as trees:
        yield root_of(trees.tree("disk", Item(volume, Filesystem(kind=KIND)), mapped), mapped)


def restore(root: Place, target: Path, existing: Existing, **more: bool) -> Told:
    told = Told()
    at = Destination(os.fsencode(target), existing, directories=True, several=False)
    try:
        Restorer(Ledger(told), lambda: None, **more).restore(root, at.directory, at.name, at.shown)
    finally:
        at.close()
    return told


@pytest.mark.parametrize("existing", Existing)
@pytest.mark.parametrize("merged", [False, True])
def test_namesakes_never_replace_or_lead_to_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: Existing, merged: bool
) -> None:
    target, outside = tmp_path / "target", tmp_path / "outside"
    outside.mkdir()
    if merged:
        target.mkdir()
    with tree(monkeypatch, tmp_path / "volume", namesakes.__name__) as root:
        told = restore(root, target, existing)

    assert [] == os.listdir(outside)
    assert {"a", "b", "c", "d", "e"} == set(os.listdir(target))
    assert "../outside" == os.readlink(target / "a") == os.readlink(target / "b")
    assert b"bytes" == (target / "c").read_bytes() == (target / "e").read_bytes()
    assert (target / "d").is_char_device()
    names = [os.path.relpath(path, os.fsencode(target)) for path, _ in told.errors]
    assert [b"a", b"c", b"d", b"e", b"a", b"b"] == names
    assert "restored without its extended attributes: the attributes are damaged" == told.errors[3][1]


def test_a_restore_of_what_has_no_end_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_WALK_DEPTH", DEEPEST)
    monkeypatch.setattr(limits, "MAX_WALKED_ENTRIES", 5000)
    with tree(monkeypatch, tmp_path / "volume", wildreader.__name__) as root:
        told = restore(root, tmp_path / "target", Existing.KEPT, verify=True, keep_damaged=True)

    errors = {os.path.relpath(path, os.fsencode(tmp_path / "target")): what for path, what in told.errors}
    assert "not restored: the directory is also in another place, or in itself" == errors[b"self"] == errors[b"one/up"]
    assert "has too many entries" in errors[b"endless"]
    assert "the second page is damaged" == errors[b"breaks"]
    (deep,) = [path for path in errors if path.startswith(b"deep/")]
    assert DEEPEST == deep.count(b"/")
    assert "not restored: the directories are too deep" == errors[deep]
    assert f"bytes {1 << 20} to {wildreader.SIZE - 1} cannot be read" in errors[b"one/short"]
    assert b"\1" == (tmp_path / "target/one/compressed").read_bytes()[1 << 20 :][:1]
    assert wildreader.SIZE == (tmp_path / "target/one/short").stat().st_size
    assert (tmp_path / "target/one/compressed").stat().st_blocks < wildreader.SIZE // 512, "the first MiB is zeros"


@pytest.mark.parametrize("existing", Existing)
def test_a_file_system_without_nameless_files_and_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: Existing
) -> None:
    """As FAT is, which no kernel here mounts: what it answers is answered in its place."""

    def refuse(*words: object, **named: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(draft, "PROC", "/nowhere")
    monkeypatch.setattr(draft.os, "link", refuse)
    target = tmp_path / "target"
    target.mkdir()
    (target / "c").write_bytes(b"ours")
    with tree(monkeypatch, tmp_path / "volume", namesakes.__name__) as root:
        told = restore(root, target, existing)

    renamed = {"c.~1~"} if existing is Existing.RENAMED else set()
    assert {"a", "b", "c", "d", "e"} | renamed == set(os.listdir(target)), "and no temporary names"
    assert (b"ours" if existing is Existing.KEPT else b"bytes") == (target / "c").read_bytes()
    assert b"bytes" == (target / "e").read_bytes()
    assert b"e" in {os.path.relpath(path, os.fsencode(target)) for path in told.done}


def test_what_reads_back_otherwise_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A medium that forgets is not to be had: the last byte is changed behind the back of the restore."""
    honest = content.write

    def forgetful(place: Place, descriptor: int, *more: object) -> None:
        honest(place, descriptor, *more)  # type: ignore[arg-type]
        os.pwrite(descriptor, b"X", 4)

    monkeypatch.setattr(content, "write", forgetful)
    with tree(monkeypatch, tmp_path / "volume", namesakes.__name__) as root:
        told = restore(root, tmp_path / "target", Existing.KEPT, verify=True)

    assert "not restored: what was written reads back otherwise" in {what for _, what in told.errors}
    assert not (tmp_path / "target/c").is_file()
    assert not (tmp_path / "target/e").exists()


@pytest.mark.expect_warnings
@pytest.mark.parametrize("seed", range(25))
def test_damage_is_told_in_lines_and_the_rest_restored(
    image: bytes, tmp_path: Path, seed: int, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(damaged(image, random.Random(seed)))
    began = time.monotonic()
    words = ["--json", "--image-format", "raw", str(path), "current:", str(tmp_path / "target")]
    code = cli.main(["restore", *words])
    said = capsysbinary.readouterr()
    errors = said.err.decode()

    assert code in (0, 1, 17), errors
    assert all(line.startswith(("qcowfs: ", "hint: ")) for line in errors.splitlines()), errors
    assert "internal error" not in errors
    assert time.monotonic() - began < PATIENCE
    if said.out:
        document = json.loads(said.out)
        assert (code == 0) == (document["errors"] == [])
        assert all(os.path.lexists(os.fsencode(one["path"])) for one in document["restored"] if "path_b64" not in one)

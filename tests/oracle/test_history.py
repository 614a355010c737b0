"""`history` against the kernel's mounts of the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcowfs import cli, history, limits
from qcowfs.cli.inside import open_inside
from qcowfs.errors import QcowfsError, UnsupportedImage
from tests.oracle.test_filediff import held, raw
from tests.oracle.test_inside_commands import damaged, output
from tests.oracle.test_lock import typing
from tests.support import need
from tests.support.crash import mounted
from tests.support.disks import run
from tests.support.guests import Guest, bare_image, make_tree
from tests.support.images import qemu
from tests.support.mounts import call
from tests.support.states import State, make_states, overlays

__all__ = ["damaged"]

STATES = 8
MTIME = 0


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[State]]:
    need("mke2fs", "qemu-img", "losetup")
    directory = tmp_path_factory.mktemp("states")
    image = directory / "image.qcow2"
    return image, make_states(directory, image, STATES, steps=40, seed=int(os.environ.get("SEED", "2")))


def document(image: Path, path: str) -> dict[bytes, list[dict[str, Any]]]:
    done = call("history", "--json", image, path)
    assert (0, "") == (done.returncode, done.stderr)
    found = json.loads(done.stdout)
    assert [] == found["errors"]
    return {raw(file, "path"): file["versions"] for file in found["files"]}


def contents(guest: Guest, path: bytes) -> Any:
    """Return what makes a version of a path; None if it is not there."""
    if path not in guest:
        return None
    facts = guest[path]
    if not stat.S_ISDIR(facts[0]):
        return held(facts)
    inside = [name for name in guest if name.rpartition(b"/")[0] == path and name != path]
    return sorted((name, stat.S_IFMT(guest[name][0]), guest[name][5], guest[name][7][MTIME]) for name in inside)


def expected(states: list[State], path: bytes) -> list[tuple[int | None, list[str], bool]]:
    """Return number, points, and whether it reappeared, of each version."""
    found: list[tuple[int | None, list[str], bool]] = []
    last: Any = None
    count = 0
    for state in states:
        now = contents(state.guest, path)
        if now is None and not found:
            continue
        if found and now == last:
            found[-1][1].append(state.point)
            continue
        count += now is not None
        found.append((None if now is None else count, [state.point], bool(found) and last is None))
        last = now
    return found


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["*", "*/*", "*/*/*"])
def test_the_versions_of_everything(states: tuple[Path, list[State]], pattern: str) -> None:
    image, all_states = states
    depth = pattern.count("/")
    paths = {path for state in all_states for path in state.guest if path and path.count(b"/") == depth}

    found = document(image, pattern)

    told = {
        path: [(version["number"], version["points"], version["reappeared"]) for version in versions]
        for path, versions in found.items()
    }
    assert {path: expected(all_states, path) for path in paths} == told


@pytest.mark.slow
def test_the_hashes_are_those_of_the_bytes(states: tuple[Path, list[State]]) -> None:
    image, _ = states
    checked = 0
    for path, versions in document(image, "*").items():
        numbers: dict[str, int] = {}
        for version in versions:
            if version["deleted"] or version["type"] == "directory":
                continue
            assert version["same_as"] == numbers.get(version["sha256"])
            numbers.setdefault(version["sha256"], version["number"])
            if version["type"] == "file" and checked < 15:
                data = output("cat", image, f"{version['point']}:{os.fsdecode(path)}")
                assert (hashlib.sha256(data).hexdigest(), len(data)) == (version["sha256"], version["size"])
                checked += 1
    assert checked == 15


@pytest.fixture(scope="module")
def motd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image in which /etc/motd is written, touched, changed, lost, and written again as it was."""
    need("mke2fs", "qemu-img")
    directory = tmp_path_factory.mktemp("motd")
    disk = directory / "disk"
    disk.touch()
    os.truncate(disk, 16 << 20)
    run("mke2fs", "-q", "-F", "-t", "ext4", disk)
    steps: list[Callable[[Path], object]] = [
        lambda file: file.parent.mkdir(),
        lambda file: file.write_bytes(b"hello\n" * 1000),
        lambda file: os.utime(file, ns=(1, 1)),
        lambda file: file.write_bytes(b"bye\n"),
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b"hello\n" * 1000),
    ]
    raws = []
    for number, step in enumerate(steps):
        with mounted(disk) as at:
            step(at / "etc" / "motd")
        raws.append(shutil.copy(disk, directory / f"raw{number}"))
    image = directory / "image.qcow2"
    overlays(directory, image, raws)
    return image


def test_a_table_tells_the_story(motd: Path) -> None:
    done = call("history", motd, "/etc//motd")
    rows = [line.split() for line in done.stdout.splitlines()]
    digest = hashlib.sha256(b"hello\n" * 1000).hexdigest()

    assert (0, "") == (done.returncode, done.stderr)
    assert ["1", "layer1", "2", digest[:12]] == [rows[1][column] for column in (0, 1, 4, 9)]
    assert [["1", "layer1"], ["2", "layer3"], ["-", "layer4"], ["3", "current"]] == [row[:2] for row in rows[1:]]
    assert "deleted" == rows[3][-1]
    assert done.stdout.splitlines()[4].endswith("reappeared, as version 1")


def test_one_path_is_asked_for_without_wildcards(motd: Path) -> None:
    words = cli.build_parser(["history"]).parse_args(["history", str(motd), ""])
    with open_inside(words) as inside:
        found = history.versions(inside, b"etc/motd", pytest.fail)
        assert {b"etc/motd": found} == history.histories(inside, b"etc/mot?", pytest.fail)
        assert [] == history.versions(inside, b"etc/mot?", pytest.fail)

    assert [(1, ("layer1", "layer2")), (2, ("layer3",)), (None, ("layer4",)), (3, ("current",))] == [
        (version.number, version.points) for version in found
    ]


def test_what_is_being_written_is_left_out(motd: Path, tmp_path: Path) -> None:
    need("qemu-io", "stdbuf")
    image = motd.with_name("top.qcow2")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", motd, "-F", "qcow2", image)
    with typing(image, tmp_path):
        done = call("history", image, "etc/motd")
        refused = call("diff", image, motd.stem, "current")

    why = "cannot look into current: another process has it open for writing"
    for said in (done, refused):
        assert UnsupportedImage.exit_code == said.returncode
        assert said.stderr.splitlines()[0].endswith(why)
    assert [["1", "layer1"], ["2", "layer3"], ["-", "layer4"], ["3", "image"]] == [
        line.split()[:2] for line in done.stdout.splitlines()[1:]
    ]


def test_what_two_points_share_is_read_once(
    motd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    real = history._bytes_digest

    def counted(place: history.Place) -> str:
        read.append(place.name)
        return real(place)

    monkeypatch.setattr(history, "_bytes_digest", counted)
    assert cli.main(["history", str(motd), "etc/motd"]) == 0

    capsys.readouterr()
    assert ["layer1", "layer3"] == read[:2]
    assert "layer2" not in read


def test_a_name_is_meant_as_it_is_where_it_is_there(tmp_path: Path) -> None:
    need("mke2fs")
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in ("[a]", "a", ".hidden", "b"):
        (tree / name).write_text(name)
    image, disk = tmp_path / "image.qcow2", tmp_path / "disk"
    run("mke2fs", "-q", "-t", "ext4", "-d", tree, disk, "8M")
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, image)

    assert [b"[a]"] == [*document(image, "[a]")]
    assert [b"a", b"b"] == [*document(image, "[ab]")]
    assert [b".hidden"] == [*document(image, ".*")]
    assert [b"[a]", b"a", b"b", b"lost+found"] == [*document(image, "*")]


def test_what_no_point_has_is_an_error(motd: Path) -> None:
    for path in ("etc/nothing", "etc/motd/below", "nowhere/*"):
        done = call("history", motd, path)
        assert (17, f"qcowfs: {motd}: {path}: no point has it\n") == (done.returncode, done.stderr)


def test_too_many_paths_are_an_error(
    motd: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_HISTORY_PATHS", 1)

    assert cli.main(["history", str(motd), "*"]) == 1
    assert "qcowfs: more than 1 paths are like the pattern\n" == capsys.readouterr().err


def test_damage_is_told_and_is_no_deletion(damaged: Path, tmp_path: Path) -> None:
    """Where a point cannot tell, the others do."""
    whole, broken = tmp_path / "whole.raw", tmp_path / "broken.raw"
    qemu("qemu-img", "convert", "-O", "raw", damaged, broken)
    run("sh", "-c", 'cp "$0" "$1" && { e2fsck -fy "$1" || true; }', broken, whole)
    image = tmp_path / "image.qcow2"
    overlays(tmp_path, image, [whole, broken, whole])

    done = call("history", "--json", image, "dir/bad")
    versions = json.loads(done.stdout)["files"][0]["versions"]
    listed = call("history", "--json", image, "dir/*")

    assert 1 == done.returncode
    assert done.stderr.startswith("qcowfs: layer1:dir/bad: ")
    assert [["layer0", "current"]] == [version["points"] for version in versions]
    assert listed.stderr.startswith("qcowfs: layer1:dir/bad: ")
    found = {file["path"]: file["versions"] for file in json.loads(listed.stdout)["files"]}
    assert {"dir/bad": [["layer0", "current"]], "dir/good": [["layer0", "layer1", "current"]]} == {
        path: [version["points"] for version in those] for path, those in found.items()
    }


def test_a_version_is_restored_by_its_number(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path = tmp_path_factory.mktemp("v")  # a socket in it must not have a long path
    image = tmp_path / "image.qcow2"
    bare_image(tmp_path, image)
    for number, content in ((1, b"UUID=1 / ext4 defaults 0 1\n"), (2, b"# changed\n")):
        copy = tmp_path / f"fstab.{number}"
        assert cli.main(["restore", str(image), "--version", str(number), "etc/fstab", str(copy)]) == 0
        assert copy.read_bytes() == content

    for number, path in (("3", "etc/fstab"), ("1", "etc/nothing")):
        assert cli.main(["restore", str(image), "--version", number, path, str(tmp_path / "none")]) == 17
        assert f"no version {number} of {path}" in capsys.readouterr().err
    for number in ("0", "-1", "x", "1.5"):
        assert cli.main(["restore", str(image), f"--version={number}", "etc/fstab", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_a_version_is_of_the_path_that_was_given(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    """POINT:PATH of one point may read like that of another: both may have colons."""
    need("mke2fs", "qemu-img")
    disk, image = tmp_path / "disk", tmp_path / "image.qcow2"

    def fill(root: Path) -> None:
        for name in ("x:y", "y"):
            (root / name).write_text(name)

    make_tree(disk, 16 << 20, fill)
    qemu("qemu-img", "convert", "-O", "qcow2", disk, image)
    for point in ("a", "a:x"):
        qemu("qemu-img", "snapshot", "-c", point, image)

    assert 0 == cli.main(["restore", "--version", "1", str(image), "x:y", "-"])
    assert b"x:y" == capsysbinary.readouterr().out
    assert 0 == cli.main(["restore", "--version", "1", str(image), "x:y", str(tmp_path / "out")])
    assert "x:y" == (tmp_path / "out").read_text()


def test_a_snapshot_that_is_deleted_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """What its clusters hold may be anything by then. What reads files of points checks it at the end."""
    need("mke2fs", "qemu-img", "qemu-io", "stdbuf")
    disk, image = tmp_path / "disk", tmp_path / "image.qcow2"
    make_tree(disk, 16 << 20, lambda root: (root / "file").write_text("1"))
    qemu("qemu-img", "convert", "-O", "qcow2", disk, image)
    qemu("qemu-img", "snapshot", "-c", "a", image)
    args = cli.build_parser(["cat"]).parse_args(["cat", str(image), "a:file"])
    with typing(image, tmp_path):
        with open_inside(args) as inside:
            assert b"1" == b"".join(inside.find("a:file", follow=True).place.chunks())
        with pytest.raises(QcowfsError, match="the snapshot was deleted or changed"), open_inside(args) as inside:
            inside.find("a:file", follow=True)
            with image.open("r+b") as file:  # the header counts one snapshot less
                file.seek(60)
                file.write(bytes(4))


def test_the_image_as_it_is_now_is_the_newest_whatever_its_date(
    tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel stamps a file by a clock that is some milliseconds behind the one of a snapshot's date."""
    directory = tmp_path_factory.mktemp("v")
    image = directory / "image.qcow2"
    bare_image(directory, image)
    os.utime(image, (1, 1))

    assert cli.main(["history", "--json", str(image), "etc/fstab"]) == 0
    (path,) = json.loads(capsys.readouterr().out)["files"]
    assert [version["points"] for version in path["versions"]] == [["before"], ["current"]]

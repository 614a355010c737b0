"""`qcowfs diff` of files as a person calls it: volumes, paths, output, what is damaged, and how long it takes."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from qcowfs import cli, limits, stored
from tests.oracle.test_filediff import raw
from tests.oracle.test_inside_commands import damaged
from tests.support import need
from tests.support.crash import mounted
from tests.support.disks import run
from tests.support.forgefat import Exfat, Fat
from tests.support.guests import Guest, make_tree, partitioned_image, volume_group
from tests.support.images import qemu
from tests.support.mounts import call
from tests.support.states import CLUSTER, overlays, write_differences

__all__ = ["damaged"]

MIB = 1 << 20
FILES = 24_000
IN_EACH = 100
LENGTH = 3000  # bytes of each
SECONDS = 2.0
CHANGED = 20


class Partitioned(NamedTuple):
    image: Path
    before: dict[str, Guest]
    now: dict[str, Guest]
    disk: Path


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory: pytest.TempPathFactory) -> Partitioned:
    directory = tmp_path_factory.mktemp("parts")
    image = directory / "parts.qcow2"
    before, now, _ = partitioned_image(directory, image)
    return Partitioned(image, before, now, directory / "before-disk")


def lines(*words: str | Path, code: int = 1) -> list[str]:
    """Return what `diff` prints if it has nothing to complain of."""
    done = call("diff", *words)
    assert (code, "") == (done.returncode, done.stderr)
    return done.stdout.splitlines()


def test_all_volumes_are_compared(partitioned: Partitioned) -> None:
    document = json.loads(call("diff", "--json", partitioned.image, "before", "current").stdout)

    gone = {b"p2/" + path for path in partitioned.before["p2"].keys() - partitioned.now["p2"].keys()}
    assert gone == {raw(change, "path") for change in document["changes"] if change["change"] == "removed"}
    assert {"p1/etc/fstab": "metadata", "p2/etc/fstab": "modified"} == {
        change["path"]: change["change"] for change in document["changes"] if change["change"] != "removed"
    }
    assert ("before", "current") == (document["old"]["point"], document["new"]["point"])


def test_the_same_point_does_not_differ(partitioned: Partitioned) -> None:
    assert [] == lines(partitioned.image, "before", "before", code=0)
    assert [] == lines("--checksum", partitioned.image, "before", "before", code=0)
    assert [] == json.loads("\n".join(lines("--json", partitioned.image, "before", "before", code=0)))["changes"]


def test_two_images_are_compared_by_their_bytes(partitioned: Partitioned, tmp_path: Path) -> None:
    copy = tmp_path / "a:copy.qcow2"
    shutil.copy(partitioned.image, copy)

    assert [] == lines("--checksum", f"{partitioned.image}:before", f"{copy}:before", code=0)
    assert lines(partitioned.image, "before", "current") == lines(f"{partitioned.image}:before", f"{copy}:current")


def test_only_some_paths(partitioned: Partitioned) -> None:
    image = partitioned.image

    assert ["M p2/etc/fstab", "D p2/var/log", "D p2/var/log/up"] == lines(
        image, "before", "current", "p2/etc/fstab", "p2/var/log/"
    )
    assert ["m etc/fstab"] == lines(image, "before:p1", "current:p1")
    assert ["M p2.raw"] == lines(image, "before", "current", "p2.raw")
    assert [] == lines(image, "before", "before", "p2.raw", code=0)
    done = call("diff", image, "before", "current", "p2/nothing")
    assert (17, f"qcowfs: {image}: p2/nothing: it is in neither of the points\n") == (done.returncode, done.stderr)


def test_what_is_asked_for_twice_is_told_once(partitioned: Partitioned) -> None:
    once = lines(partitioned.image, "before", "current", "p2/etc")

    assert once
    for paths in (["p2/etc"], ["p2/etc/fstab"], ["p2//etc/", "p2/./etc"]):
        assert once == lines(partitioned.image, "before", "current", *paths, "p2/etc")
    two = lines(partitioned.image, "before", "current", "p2/etc/fstab", "p1/etc", "p2/etc")
    assert sorted([*once, *lines(partitioned.image, "before", "current", "p1/etc")]) == sorted(two)


@pytest.mark.parametrize("path", ["p1/../p2/etc", "../p1/./../p2/etc", "/p2/../p1/../p2/etc"])
def test_the_way_back_out_of_a_volume_is_that_of_a_mount(partitioned: Partitioned, path: str) -> None:
    image = partitioned.image

    assert lines(image, "before", "current", "p2/etc") == lines(image, "before", "current", path)
    assert call("ls", image, f"before:{path}").stdout == call("ls", image, "before:p2/etc").stdout
    assert 17 == call("diff", image, "before", "current", path.replace("p1", "p7")).returncode


def test_an_error_is_no_difference(partitioned: Partitioned) -> None:
    image = partitioned.image
    for words in ((image, "before", "current"), ("--blocks", image, "before", "current")):
        full = ["sh", "-c", 'exec "$@" >/dev/full', "sh", sys.executable, "-m", "qcowfs", "diff"]
        done = call(*words, command=full)
        assert (3, "qcowfs: standard output: No space left on device\n") == (done.returncode, done.stderr)


def test_totals(partitioned: Partitioned) -> None:
    words = ("--stat", partitioned.image, "before", "current")
    table = {line.split()[-1]: line.split()[:-1] for line in lines(*words)[1:]}
    document = json.loads(call("diff", "--json", *words).stdout)["directories"]

    assert ["0", "700", "0", "0", "0", "0"] == table["p2/many"]
    assert ["0", "0", "0", "1", "0", "0"] == table["p1/etc"]
    count = len(lines(*words[1:]))  # with two that are none removed, and a name of two lines
    assert count - 3 == int(table["(all)"][1]) == sum(directory["removed"] for directory in document)


def test_names_can_be_read_by_programs_and_by_people(partitioned: Partitioned) -> None:
    assert "D p2/\x1b[31mred" in call("diff", partitioned.image, "before", "current").stdout


def test_volumes_come_and_go_and_are_compared_as_a_whole(partitioned: Partitioned, tmp_path: Path) -> None:
    need("sfdisk")
    disks = [tmp_path / f"disk{number}" for number in range(4)]
    for disk in disks:
        shutil.copy(partitioned.disk, disk)
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", "--delete", disks[1], "2")
    with open(disks[2], "r+b") as file:
        file.seek(42 * MIB)
        file.write(bytes(40 * MIB))
    with open(disks[3], "r+b") as file:
        file.seek(42 * MIB)
        file.write(bytes(39 * MIB) + b"x" + bytes(MIB - 1))
    image = tmp_path / "image.qcow2"
    points = overlays(tmp_path, image, disks)

    assert ["D p2"] == lines(image, points[0], points[1])
    assert ["A p2"] == lines(image, points[1], points[0])
    assert ["M p2.raw"] == lines(image, points[2], points[3])
    done = call("diff", image, points[0], points[2])
    assert (10, "M p2.raw\n") == (done.returncode, done.stdout)
    assert done.stderr.startswith(
        f"qcowfs: {points[2]}:p2: nothing known is on it; the volume is compared as a whole\n"
    )


def test_a_volume_that_is_not_there_as_a_whole_is_told_once(tmp_path: Path) -> None:
    need("lvm", "qemu-img")
    _, images = volume_group(tmp_path)
    others = ("--with", images[1])

    assert [] == lines(*others, images[0], "both", "both", code=0)
    for words, where in ((others, ["current:vg-lv.raw"]), ((), ["both:vg-lv.raw", "current:vg-lv.raw"])):
        done = call("diff", *words, images[0], "both", "current")
        assert (10, "") == (done.returncode, done.stdout)
        assert where == [line.split(": ")[1] for line in done.stderr.splitlines() if not line.startswith("hint: ")]
        assert done.stderr.count("is missing\n") == len(where)
        assert done.stderr.count("hint: --with adds the image of another disk") == len(where)
    done = call("diff", *others, images[0], "both", "current", "vg-lv")
    assert (10, "") == (done.returncode, done.stdout)
    assert done.stderr.startswith("qcowfs: current:vg-lv: the physical volume ")
    history = call("history", *others, images[0], "vg-lv/l*")
    assert history.returncode == 1
    assert "both" in history.stdout
    assert history.stderr.count("qcowfs: current:vg-lv: the physical volume ") == history.stderr.count("qcowfs: ") == 1


def test_a_disk_that_was_one_file_system_is_another_thing(partitioned: Partitioned, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    make_tree(bare, 40 * MIB, lambda root: (root / "file").write_bytes(b"x"))
    os.truncate(bare, partitioned.disk.stat().st_size)
    image = tmp_path / "image.qcow2"
    points = overlays(tmp_path, image, [bare, partitioned.disk])

    assert ["T ."] == lines(image, *points)


def test_what_is_damaged_is_told_and_the_rest_is_compared(damaged: Path, tmp_path: Path) -> None:
    raw, image = tmp_path / "whole.raw", tmp_path / "image.qcow2"
    qemu("qemu-img", "convert", "-O", "raw", damaged, raw)
    with mounted(raw) as at:
        (at / "dir" / "good").write_bytes(b"other")
        (at / "dir" / "more").write_bytes(b"more")
    before = tmp_path / "before.raw"
    qemu("qemu-img", "convert", "-O", "raw", damaged, before)
    points = overlays(tmp_path, image, [before, raw])

    done = call("diff", image, *points)
    document = json.loads(call("diff", "--json", image, *points).stdout)

    assert (10, "M dir/good\nA dir/more\n") == (done.returncode, done.stdout)
    assert [f"qcowfs: {point}:dir/bad: " for point in points] == [
        line[: len(f"qcowfs: {point}:dir/bad: ")] for line, point in zip(done.stderr.splitlines(), points, strict=True)
    ]
    assert ["dir/bad", "dir/bad"] == [error["path"] for error in document["errors"]]
    assert ["good", "more"] == [change["path"].removeprefix("dir/") for change in document["changes"]]


def test_what_was_renamed(tmp_path: Path) -> None:
    disk, before, image = tmp_path / "disk", tmp_path / "before", tmp_path / "image.qcow2"
    make_tree(disk, 16 * MIB, plant)
    shutil.copy(disk, before)
    with mounted(disk) as at:
        (at / "a").rename(at / "b")
        os.link(at / "b" / "x", at / "0 a link, and no rename")
        (at / "b" / "out").rename(at / "z")
        (at / "b" / "sub").rename(at / "b" / "sub2")
        (at / "b" / "sub2" / "changed").write_bytes(b"anew")
        (at / "gone" / "kept").rename(at / "kept")
        (at / "gone").rmdir()
        (at / "link").rename(at / "other link")
        (at / "fifo").rename(at / "b" / "fifo")
        (at / "touched").rename(at / "touched later")
        os.utime(at / "touched later", ns=(1, 1))
    points = overlays(tmp_path, image, [before, disk])

    assert [
        "A 0 a link, and no rename",
        "R a -> b",
        "R fifo -> b/fifo",
        "R a/sub -> b/sub2",
        "M b/sub2/changed",
        "D gone",
        "R gone/kept -> kept",
        "R link -> other link",
        "R touched -> touched later",
        "m touched later",
        "R a/out -> z",
    ] == lines(image, *points)


def plant(root: Path) -> None:
    for directory in ("a/sub", "gone/kept/below"):
        (root / directory).mkdir(parents=True)
    for name in ("a/x", "a/y", "a/out", "a/sub/same", "a/sub/changed", "gone/kept/below/file", "touched"):
        (root / name).write_bytes(name.encode() * 100)
    (root / "link").symlink_to("nowhere")
    os.mkfifo(root / "fifo")


def test_a_number_that_is_used_again_is_no_rename(tmp_path: Path) -> None:
    kinds = ("file", "empty", "dir", "link")
    raws = [tmp_path / when for when in ("old", "new")]
    numbers = []
    for raw_disk in raws:
        make_tree(raw_disk, 16 * MIB, lambda root, when=raw_disk.name: [make(root, when, kind) for kind in kinds])
        with mounted(raw_disk, "ro") as at:
            numbers.append([(at / f"{raw_disk.name} {kind}").lstat().st_ino for kind in kinds])
    image = tmp_path / "image.qcow2"
    points = overlays(tmp_path, image, raws)

    assert numbers[0] == numbers[1]
    found = lines(image, *points)
    assert {*"AD"} == {line[0] for line in found}
    assert "D old dir/inner" in found


def make(root: Path, when: str, kind: str) -> None:
    path = root / f"{when} {kind}"
    if kind == "dir":
        path.mkdir()
        (path / "inner").write_text(when)
        for number in range(2):
            (path / f"{number} of {when}").write_text(when)
    elif kind == "link":
        path.symlink_to(when)
    else:
        path.write_text("" if kind == "empty" else when * 5000)


def test_only_checksum_finds_what_no_inode_tells(tmp_path: Path) -> None:
    """Bytes that changed behind the file system's back."""
    before, after, image = tmp_path / "before", tmp_path / "after", tmp_path / "image.qcow2"
    make_tree(before, 16 * MIB, lambda root: (root / "file").write_bytes(b"to be found" * 1000))
    data = before.read_bytes()
    after.write_bytes(data.replace(b"to be found", b"to be FOUND", 1))
    points = overlays(tmp_path, image, [before, after])

    assert [] == lines(image, *points, code=0)
    assert ["M file"] == lines("--checksum", image, *points)


@pytest.mark.parametrize("kind", ["fat", "exfat"])
def test_what_has_no_change_time_is_compared_by_where_it_is(kind: str, tmp_path: Path) -> None:
    """On FAT whoever writes a file sets all of its times: an equal directory entry proves nothing."""
    images = [tmp_path / "before.raw", tmp_path / "after.raw"]
    for image, content in zip(images, (b"before", b"after!"), strict=True):
        tree = {"dir": {"changed": content, "same": b"same"}}
        image.write_bytes(Fat(32, tree).finish() if kind == "fat" else Exfat(tree).finish())

    assert ["M dir/changed"] == lines("--image-format", "raw", *images)
    assert [] == lines("--image-format", "raw", images[0], images[0], code=0)


def test_two_files_are_compared_by_their_own_paths(tmp_path: Path) -> None:
    """A path behind each point may mean a file, and it need not be the same path."""
    image = tmp_path / "image.qcow2"

    def fill(root: Path) -> None:
        (root / "one").write_text("1")
        (root / "two").write_text("2")
        (root / "directory").mkdir()

    raw_disk = tmp_path / "disk"
    make_tree(raw_disk, 16 * MIB, fill)
    (point,) = overlays(tmp_path, image, [raw_disk])

    assert ["M ."] == lines(image, f"{point}:one", f"{point}:two")
    assert [] == lines(image, f"{point}:one", f"{point}:one", code=0)
    assert ["T ."] == lines(image, f"{point}:one", f"{point}:directory")
    assert 17 == call("diff", image, f"{point}:one/", f"{point}:two").returncode


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """An image of many files, and the names of two points: some files changed, and a directory was renamed."""
    need("mke2fs", "qemu-img")
    directory = tmp_path_factory.mktemp("large")
    raws = [directory / name for name in ("before", "after")]

    def fill(root: Path) -> None:
        for number in range(FILES):
            if number % IN_EACH == 0:
                (root / f"d{number // IN_EACH}").mkdir()
            (root / f"d{number // IN_EACH}" / f"f{number % IN_EACH}").write_bytes((b"%05d" % number * LENGTH)[:LENGTH])

    raws[0].touch()
    os.truncate(raws[0], 400 * MIB)
    run("mke2fs", "-q", "-F", "-t", "ext4", "-N", "30000", raws[0])
    with mounted(raws[0]) as at:
        fill(at)
    run("cp", "--sparse=always", *raws)
    with mounted(raws[1]) as at:
        for number in range(CHANGED):
            (at / f"d{number}" / "f0").write_bytes(b"changed")
        os.utime(at / "d30" / "f1", ns=(1, 1))
        (at / "d50").rename(at / "renamed")
    image = directory / "image.qcow2"
    yield image, overlays(directory, image, raws)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of what is read to be compared."""
    lengths: list[int] = []
    real = stored._same_range

    def same_range(old: stored.Bytes, new: stored.Bytes, start: int, length: int) -> bool:
        lengths.append(length)
        return real(old, new, start, length)

    monkeypatch.setattr(stored, "_same_range", same_range)
    return lengths


@pytest.mark.slow
def test_what_did_not_change_costs_little_and_is_not_read(
    large: tuple[Path, list[str]], capsysbinary: pytest.CaptureFixture[bytes], read: list[int]
) -> None:
    image, points = large
    began = time.process_time()
    assert cli.main(["diff", str(image), *points]) == 1
    used = time.process_time() - began
    changed = [f"M d{number}/f0" for number in range(CHANGED)]

    assert sorted([*changed, "m d30/f1", "R d50 -> renamed"]) == sorted(
        capsysbinary.readouterr().out.decode().split("\n")[:-1]
    )
    assert used < SECONDS
    assert sum(read) <= 2 * LENGTH, "more than the one file whose time differs"
    assert cli.main(["diff", "--checksum", str(image), *points]) == 1
    assert sum(read) <= FILES * LENGTH / 20, "more than what shares its clusters with something that changed"


def test_equal_compressed_clusters_are_not_read(tmp_path: Path, read: list[int]) -> None:
    raw, after, image = tmp_path / "raw", tmp_path / "after", tmp_path / "image.qcow2"
    make_tree(raw, 16 * MIB, lambda root: [(root / name).write_bytes(b"abc" * MIB) for name in ("one", "two")])
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, image)
    qemu("qemu-img", "snapshot", "-c", "before", image)
    shutil.copy(raw, after)
    with mounted(after) as root, (root / "two").open("r+b") as file:
        file.write(b"X")
    write_differences(raw, after, image)

    assert 1 == cli.main(["diff", "--checksum", str(image), "before", "current"])
    assert 0 < sum(read) <= 2 * CLUSTER


@pytest.mark.slow
@pytest.mark.expect_warnings
def test_too_many_differences_are_told_without_renames(
    large: tuple[Path, list[str]], capsysbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, points = large
    monkeypatch.setattr(limits, "MAX_RENAME_CHANGES", 50)

    assert cli.main(["diff", str(image), *points]) == 1

    said = capsysbinary.readouterr()
    found = said.out.decode().splitlines()
    assert said.err.decode() == (
        "qcowfs: warning: there are too many differences to look for renames: they are told as deleted and added\n"
    )
    assert 2 * (IN_EACH + 1) == len([line for line in found if line.startswith(("D d50", "A renamed"))])
    assert sorted(found, key=lambda line: line[2:].split("/")) == found

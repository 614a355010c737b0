"""The story of `make demo`, held to the guest's, QEMU's and the kernel's answers.

Evidence: a chosen scenario on a real virtual machine; the guest prints the checksum, QEMU converts each point.
"""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from demo.story import SNAPSHOT, Story
from demo.transcript import Transcript
from tests.support.guests import loop_mounted
from tests.support.mounts import REPOSITORY, Person, mounted, qemu, script, shell
from tests.support.trees import describe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("root")]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Return the story after its first act: the images are there."""
    directory = tmp_path_factory.mktemp("v")
    programs = tmp_path_factory.mktemp("bin")
    script(programs / "qcowfs")
    told = Story(directory, Transcript(directory, out=sys.stdout))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        told.make_images()
    return told


@pytest.fixture(scope="module")
def image(story: Story) -> Path:
    return story.points.with_name("snapshot_test.img")


@pytest.fixture(scope="module")
def points(story: Story, image: Path) -> Iterator[Path]:
    """Mount the image for all tests of this file."""
    with mounted(image, story.points) as mount:
        yield mount.path


def files_of(disk: Path, where: Path) -> dict[str, str]:
    """Return name and SHA-256 of the files in the ext4 on `disk`, as the kernel reads them."""
    where.mkdir()
    subprocess.run(["mount", "-o", "ro,loop,noload", disk, where], check=True, timeout=30)
    try:
        files = [path for path in where.iterdir() if path.is_file()]
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    finally:
        subprocess.run(["umount", where], check=True, timeout=30)


def listed(image: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "qcowfs", "list", "--json", str(image)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=30)
    return list(json.loads(done.stdout)["points"])


def test_every_point_of_the_story_is_listed(image: Path) -> None:
    points = {point["path"]: (point["kind"], point["depth"], point["layer"]) for point in listed(image)}

    assert points["current.raw"][:2] == ("active", 0)
    assert points[f"{SNAPSHOT}.raw"][:2] == ("snapshot", 0)
    assert points["data.raw"][:2] == ("layer", 1)
    assert points["data.raw"][2].endswith("data.qcow2")


def test_the_mount_shows_what_list_says(image: Path, points: Path) -> None:
    paths = {point["path"] for point in listed(image)}
    files = {path.name for path in points.iterdir() if not path.is_symlink()}

    assert paths | {path.removesuffix(".raw") for path in paths} == files


def test_the_deleted_file_is_read_back_from_before_its_deletion(story: Story, points: Path, tmp_path: Path) -> None:
    files = files_of(points / "data.raw", tmp_path / "files")

    assert {"data1.dat": story.checksum} == files


def test_the_points_after_the_deletion_hold_the_other_file(points: Path, tmp_path: Path) -> None:
    now = files_of(points / "current.raw", tmp_path / "now")
    after = files_of(points / f"{SNAPSHOT}.raw", tmp_path / "after")

    assert ["data2.dat"] == list(now)
    assert now == after


@pytest.mark.parametrize("point", ["current", SNAPSHOT, "data"])
def test_the_files_are_what_the_kernel_shows_after_recovery(points: Path, tmp_path: Path, point: str) -> None:
    """The kernel gets a copy that it may write: it replays the journal, as at the guest's next boot."""
    copy = tmp_path / "copy.raw"
    shell('cp --sparse=always "$1" "$2"', points / f"{point}.raw", copy)

    with loop_mounted(copy, "noatime") as kernel:
        assert describe(kernel) == describe(points / point)


def test_an_ordinary_user_restores_the_deleted_file_with_cp(
    story: Story, image: Path, ordinary: Person, tmp_path: Path
) -> None:
    """No root, no loop device; and what is not there at a point is not there."""
    image.parent.chmod(0o711)
    (tmp_path / "mnt").mkdir()
    ordinary.own(tmp_path / "mnt")
    ordinary.own(tmp_path)

    with mounted(image, tmp_path / "mnt", person=ordinary) as mount:
        shell('cp "$1/data/data1.dat" "$2"', mount.path, tmp_path / "restored.dat", person=ordinary)
        listed = shell('cd "$1"; ls -A data current "$2"', mount.path, SNAPSHOT, person=ordinary)
        different = shell('diff -rq "$1/current" "$1/$2"', mount.path, SNAPSHOT, person=ordinary)

    assert hashlib.sha256((tmp_path / "restored.dat").read_bytes()).hexdigest() == story.checksum
    assert listed.split() == [
        *(f"{SNAPSHOT}:", "data2.dat", "lost+found"),
        *("current:", "data2.dat", "lost+found"),
        *("data:", "data1.dat", "lost+found"),
    ]
    assert different == ""


@pytest.mark.parametrize(
    ("point", "words"),
    [
        ("current", ("snapshot_test.img",)),
        (SNAPSHOT, ("-l", f"snapshot.name={SNAPSHOT}", "snapshot_test.img")),
        ("data", ("data.qcow2",)),
    ],
)
def test_qemu_reads_the_same_bytes(
    image: Path, points: Path, tmp_path: Path, point: str, words: tuple[str, ...]
) -> None:
    converted = tmp_path / "converted.raw"
    options, name = words[:-1], words[-1]
    qemu("qemu-img", "convert", "-O", "raw", *options, image.with_name(name), converted)

    assert filecmp.cmp(converted, points / f"{point}.raw", shallow=False)


def test_the_exported_chain_is_the_points(image: Path, points: Path, tmp_path: Path) -> None:
    """A backing file, a snapshot made by QMP and the state after it become files of their own, which QEMU reads."""
    words = ["export", "-c", "--all", str(tmp_path / "chain"), str(image)]
    subprocess.run([sys.executable, "-m", "qcowfs", *words], check=True, capture_output=True, timeout=120)

    names = [path.stem for path in (tmp_path / "chain").iterdir()]
    assert {point["name"] for point in listed(image)} == set(names)
    for name in names:
        converted = tmp_path / f"{name}.raw"
        qemu("qemu-img", "check", "-q", tmp_path / "chain" / f"{name}.qcow2")
        qemu("qemu-img", "convert", "-O", "raw", tmp_path / "chain" / f"{name}.qcow2", converted)
        assert filecmp.cmp(converted, points / f"{name}.raw", shallow=False), name


def commands_of_readme() -> set[str]:
    """Return the command lines of the session that README.md says is from the demo."""
    session = (REPOSITORY / "README.md").read_text().split("`make demo`", 1)[1].split("That is the checksum", 1)[0]
    found = {line.strip() for line in session.splitlines() if line.startswith(("    $", "    guest#", "    nobody$"))}
    assert len(found) > 5
    return found


def test_the_demo_tells_the_story_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transcript ends with exit code 0; the mounts and the files are gone."""
    tmp_path.chmod(0o711)
    script(tmp_path / "qcowfs")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "demo.story"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "The same checksum as in the guest" in done.stdout
    assert set() == commands_of_readme() - set(done.stdout.splitlines())
    assert "nobody$ cp points/data/data1.dat restored.dat" in done.stdout
    assert ["qcowfs"] == [path.name for path in tmp_path.iterdir()]
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()

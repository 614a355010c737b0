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
from tests.support.mounts import mounted, qemu, script

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("root")]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Return the story after its first act: the images are there."""
    directory = tmp_path_factory.mktemp("story")
    told = Story(directory, Transcript(directory, out=sys.stdout))
    told.make_images()
    return told


@pytest.fixture(scope="module")
def image(story: Story) -> Path:
    return story.points.with_name("snapshot_test.img")


@pytest.fixture(scope="module")
def points(story: Story, image: Path) -> Iterator[Path]:
    """Mount the image for all tests of this file."""
    story.points.mkdir()
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
    files = {path.name for path in points.iterdir() if not path.is_symlink()}

    assert {point["path"] for point in listed(image)} == files


def test_the_deleted_file_is_read_back_from_before_its_deletion(story: Story, points: Path, tmp_path: Path) -> None:
    files = files_of(points / "data.raw", tmp_path / "files")

    assert {"data1.dat": story.checksum} == files


def test_the_points_after_the_deletion_hold_the_other_file(points: Path, tmp_path: Path) -> None:
    now = files_of(points / "current.raw", tmp_path / "now")
    after = files_of(points / f"{SNAPSHOT}.raw", tmp_path / "after")

    assert ["data2.dat"] == list(now)
    assert now == after


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


def test_the_demo_tells_the_story_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transcript ends with exit code 0; the mounts and the files are gone."""
    script(tmp_path / "qcowfs")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    command = [sys.executable, "-m", "demo.story"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=240)

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert "The same checksum as in the guest" in done.stdout
    assert ["qcowfs"] == [path.name for path in tmp_path.iterdir()]
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()

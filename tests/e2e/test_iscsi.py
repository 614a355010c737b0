"""A virtual machine whose disk, and whose snapshots, lie on an iSCSI target: QEMU writes them, qcowfs reads them.

Evidence: a chosen scenario on a real virtual machine; the guest prints checksums, QEMU converts each state.
"""

from __future__ import annotations

import filecmp
import hashlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.iscsi import Target
from tests.support.mounts import mounted, qemu
from tests.support.vm import Machine

pytestmark = pytest.mark.slow

LUN_SIZE = 96 << 20  # bytes
DISK_SIZE = "64M"


@dataclass
class Story:
    """What is there after the machine was switched off.

    Attributes:
        target: LUN 1 holds the disk as it was first, LUN 2 the overlay after the first snapshot.
        top: the overlay after the second one, a local file.
        lost: the checksum of a file that was removed after the first snapshot.
        late: the checksum of one that was written after the second.
    """

    target: Target
    top: Path
    lost: str
    late: str


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    directory = tmp_path_factory.mktemp("i")
    target = Target(directory)
    try:
        yield told(target, directory)
    finally:
        target.close()


def told(target: Target, directory: Path) -> Story:
    for lun in (1, 2):
        with (directory / f"lun{lun}").open("wb") as file:
            file.truncate(LUN_SIZE)
        target.add(lun, directory / f"lun{lun}")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", target.url(1), DISK_SIZE)
    overlays = [target.url(2), str(directory / "top.qcow2")]
    for below, overlay in zip([target.url(1), target.url(2)], overlays, strict=True):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", overlay)
    with Machine([target.url(1)], directory=directory) as machine:
        machine.run("mkfs.ext4 -q /dev/vda && mkdir /disk && mount /dev/vda /disk")
        machine.run("head -c 2000001 /dev/urandom > /disk/lost.dat && sync")
        lost = machine.run("sha256sum < /disk/lost.dat").split()[0]
        take_snapshot(machine, overlays[0])
        machine.run("rm /disk/lost.dat && echo two > /disk/two && sync")
        take_snapshot(machine, overlays[1])
        machine.run("head -c 1000001 /dev/urandom > /disk/late.dat && sync")
        late = machine.run("sha256sum < /disk/late.dat").split()[0]
        machine.poweroff()
    return Story(target, directory / "top.qcow2", lost, late)


def take_snapshot(machine: Machine, overlay: str) -> None:
    machine.qmp("blockdev-snapshot-sync", device="disk0", snapshot_file=overlay, format="qcow2", mode="existing")


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_restored_from_before_while_the_target_is_killed_and_started(story: Story, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with mounted(story.target.url(2), tmp_path / "mnt") as mount:
        names = {path.name for path in mount.path.iterdir()}
        story.target.freeze()
        copy = subprocess.Popen(["cp", mount / "lun1" / "lost.dat", tmp_path / "restored.dat"])
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                copy.wait(0.3)  # it waits for what nobody sends
            story.target.kill()
            story.target.start()
            assert 0 == copy.wait(30)
        finally:
            copy.kill()
            copy.wait()

    assert {"current.raw", "current", "lun1.raw", "lun1"} <= names
    assert story.lost == checksum(tmp_path / "restored.dat")


def test_a_local_overlay_shows_every_state_that_qemu_does(story: Story, tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    target = story.target
    states = {"current": str(story.top), "lun2": target.url(2), "lun1": target.url(1)}
    with mounted(story.top, tmp_path / "mnt", "--allow-backing", target.url(2)) as mount:
        assert story.late == checksum(mount / "current" / "late.dat")
        assert b"two\n" == (mount / "lun2" / "two").read_bytes()
        assert story.lost == checksum(mount / "lun1" / "lost.dat")
        for name, image in states.items():
            qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, tmp_path / f"{name}.raw")
            assert filecmp.cmp(tmp_path / f"{name}.raw", mount / f"{name}.raw", shallow=False), name

"""`qcowfs mount --qmp`: the disk of a running machine, by its monitor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs.qmp.address import Address
from qcowfs.qmp.monitor import Monitor
from tests.support import need
from tests.support.monitors import stopped_machine
from tests.support.mounts import Person, call, mounted, one_line, wait_until
from tests.support.qemu import qemu, qemu_io

pytest.importorskip("qemu.qmp")
SNAPSHOT_LINE = "the mount is empty: the disk has no snapshot yet"


@pytest.fixture
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the monitor of a machine whose `disk0` has a snapshot and a base, and whose `disk1` has neither."""
    need("qemu-system-x86_64", "qemu-img", "qemu-io", "setpriv")
    path = tmp_path_factory.mktemp("v")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path / "base.qcow2", "1M")
    qemu_io(path / "base.qcow2", "write -P 1 0 1M")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", path / "top.qcow2")
    qemu_io(path / "top.qcow2", "write -P 2 0 1M")
    qemu("qemu-img", "snapshot", "-c", "before", path / "top.qcow2")
    qemu_io(path / "top.qcow2", "write -P 3 0 1M")
    qemu("qemu-img", "create", "-q", "-f", "raw", path / "disk.raw", "1M")
    words = [
        *("-blockdev", "driver=qcow2,node-name=n0,file.driver=file,file.filename=top.qcow2"),
        *("-device", "virtio-blk-pci,drive=n0,id=disk0"),
        *("-drive", "if=none,id=disk1,format=raw,file=disk.raw", "-device", "virtio-blk-pci,drive=disk1"),
    ]
    with stopped_machine(path, *words, cwd=path) as monitor:
        yield monitor


def first_bytes(target: Path) -> dict[str, int]:
    return {path.stem: path.read_bytes()[0] for path in target.glob("*.raw") if not path.is_symlink()}


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], {"base": 1, "before": 2}), (["--live"], {"base": 1, "before": 2, "current": 3})],
)
def test_frozen_layers_and_snapshots_of_a_device_are_shown_and_its_present_state_with_live(
    machine: Path, target: Path, options: list[str], expected: dict[str, int]
) -> None:
    with mounted(f"--qmp={machine}:disk0", target, *options):
        assert expected == first_bytes(target)


def test_the_image_on_top_is_found_after_a_snapshot(machine: Path, target: Path) -> None:
    new = machine.with_name("new.qcow2")
    taken = call("snapshot", "--qmp", machine, "disk0", new)

    with mounted(f"--qmp={machine}:disk0", target):
        shown = first_bytes(target)

    assert 0 == taken.returncode, taken.stderr
    assert {"base": 1, "top@before": 2, "top": 3} == shown


def test_a_mount_follows_the_device_to_the_new_image_on_top(machine: Path, target: Path) -> None:
    """The daemon and `qcowfs snapshot` share the monitor, which serves one client at a time."""
    with mounted(f"--qmp={machine}:disk0", target):
        before = first_bytes(target)
        for name in ("second", "third"):
            taken = call("snapshot", "--qmp", machine, "disk0", machine.with_name(f"{name}.qcow2"))
            assert 0 == taken.returncode, taken.stderr
        wait_until((target / "second.raw").exists, "the mount does not follow")
        after = first_bytes(target)
        latest = os.readlink(target / "latest.raw")

    assert {"base": 1, "before": 2} == before
    assert {"base": 1, "top@before": 2, "top": 3, "second": 3} == after
    assert "second.raw" == latest


def test_an_empty_mount_fills_with_the_first_snapshot(machine: Path, target: Path) -> None:
    with mounted(f"--qmp={machine}:disk1", target):
        assert [] == os.listdir(target)
        taken = call("snapshot", "--qmp", machine, "disk1", machine.with_name("second.qcow2"))
        wait_until((target / "disk.raw").exists, f"the mount does not follow: {taken.stderr}")


def test_a_raw_disk_without_a_snapshot_is_an_empty_mount_with_a_word_why(machine: Path, target: Path) -> None:
    done = call("mount", "--qmp", f"{machine}:disk1", target)
    shown = os.listdir(target)
    ended = call("umount", target)

    assert (0, 0, []) == (done.returncode, ended.returncode, shown)
    assert done.stderr.splitlines()[-1].endswith(SNAPSHOT_LINE)


def test_with_the_mount_option_the_source_is_the_monitor_and_the_device(machine: Path, target: Path) -> None:
    """As mount(8) calls it, for a line of fstab."""
    done = call(f"{machine}:disk0", target, "-o", "rw,qmp")
    shown = first_bytes(target)
    ended = call("umount", target)

    assert (0, 0) == (done.returncode, ended.returncode), done.stderr
    assert {"base": 1, "before": 2} == shown


def test_a_machine_that_waits_for_its_migration_is_not_kept_from_its_image(
    tmp_path_factory: pytest.TempPathFactory, target: Path
) -> None:
    """It has the image open, and locks nothing before it goes on."""
    need("qemu-system-x86_64", "qemu-img", "qemu-io", "setpriv")
    path = tmp_path_factory.mktemp("v")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path / "disk.qcow2", "1M")
    qemu("qemu-img", "snapshot", "-c", "before", path / "disk.qcow2")
    drive = f"if=none,id=disk0,format=qcow2,file={path}/disk.qcow2"
    words = ["-drive", drive, "-device", "virtio-blk-pci,drive=disk0", "-incoming", "defer"]
    with stopped_machine(path, *words) as socket, mounted(f"--qmp={socket}:disk0", target):
        shown = set(first_bytes(target))
        with Monitor(Address(path=str(socket))) as monitor:
            monitor.execute("cont")

    assert {"before"} == shown


def test_a_monitor_of_somebody_else_is_told_in_one_line(machine: Path, target: Path, ordinary: Person) -> None:
    if ordinary.is_me:
        pytest.skip("whoever runs the tests is an ordinary user")
    machine.parent.chmod(0o755)
    ordinary.own(target)

    done = call("mount", "--qmp", f"{machine}:disk0", target, person=ordinary)

    assert f"qcowfs: {machine}: cannot be connected to: Permission denied" == one_line(done)

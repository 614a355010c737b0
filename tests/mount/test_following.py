"""A mount follows its images: what appears and disappears, and what becomes of files that are open meanwhile.

Evidence: chosen scenarios, made by qemu-img and by QEMU's block layer, which has the images open as a machine has.
"""

from __future__ import annotations

import errno
import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import need
from tests.support.mounts import in_foreground, mounted, qemu, wait_until
from tests.support.writer import DISK, Writer

MIB = 1 << 20
STALE = (errno.ESTALE, errno.EIO)
QUICK = "import qcowfs.follow as f; f.LOOK_SECONDS = 0.02; "
NO_INOTIFY = "f.POLL_SECONDS = 0.05\ndef none(): raise OSError(24, 'none left')\nf.open_inotify = none"
BY_HAND = "f.Follower._has_changed = lambda self: False"  # nothing is noticed


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return an image full of 1, with a snapshot `first` of that."""
    need("qemu-img", "qemu-io", "qemu-system-x86_64")
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", path)
    qemu("qemu-img", "snapshot", "-q", "-c", "first", path)
    return path


def told(code: str = "") -> dict[str, str]:
    return {"QCOWFS_TEST_BEFORE": QUICK + code}


def names(target: Path) -> set[str]:
    return {name for name in os.listdir(target) if name.endswith(".raw")}


def wait_names(target: Path, expected: set[str]) -> None:
    wait_until(lambda: names(target) == expected, f"{expected} were expected in {target}")


def wait_replaced(path: Path, number: int) -> None:
    """Wait until the name is there, and that of another inode."""

    def replaced() -> bool:
        with suppress(OSError):
            return os.stat(path).st_ino != number
        return False

    wait_until(replaced, "it is the same")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Read the file past the kernel's cache."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def byte_at(descriptor: int, offset: int) -> int:
    """Return the byte that a block is full of."""
    with mmap.mmap(-1, 4096) as block:
        assert os.preadv(descriptor, [block], offset) == 4096
        (found,) = set(block[:])
        return found


@pytest.fixture(params=["the data plane", "python"])
def plane(request: pytest.FixtureRequest) -> list[str]:
    return [] if request.param == "the data plane" else ["--no-data-plane"]


@pytest.mark.parametrize("how", ["inotify", "polling"])
def test_a_snapshot_appears_and_another_disappears(disk: Path, target: Path, how: str) -> None:
    with (
        Writer(disk) as writer,
        mounted(disk, target, env=told(NO_INOTIFY if how == "polling" else "")) as mount,
        opened(mount / "first.raw") as first,
    ):
        assert not (mount / "second.raw").exists()  # the kernel remembers that there is none
        before = os.stat(mount / "first.raw")
        writer.write(2, 0, 4 * MIB)
        writer.snapshot("second")
        wait_names(target, {"first.raw", "second.raw", "latest.raw"})
        link, byte = os.readlink(mount / "latest.raw"), (mount / "second.raw").read_bytes()[0]
        after, still = os.stat(mount / "first.raw"), byte_at(first, MIB)
        writer.delete("second")
        wait_names(target, {"first.raw", "latest.raw"})
        at_last, found = os.readlink(mount / "latest.raw"), (mount / "second.raw").exists()
        and_still = byte_at(first, 2 * MIB)

    assert (before, 1, 1) == (after, still, and_still)
    assert ("second.raw", 2, "first.raw", False) == (link, byte, at_last, found)


def test_a_name_that_is_used_again_is_another_file(disk: Path, target: Path, plane: list[str]) -> None:
    """Its id is used again, too. Who has the old one open hears ESTALE, and never reads the new one."""
    with Writer(disk) as writer, mounted(disk, target, *plane, env=told()) as mount:
        number = os.stat(mount / "first.raw").st_ino
        with opened(mount / "first.raw") as first:
            writer.delete("first")
            writer.write(2, 0, 4 * MIB)
            writer.snapshot("first")
            with pytest.raises(OSError) as caught:
                byte_at(first, 0)
            wait_replaced(mount / "first.raw", number)
            with opened(mount / "first.raw") as second:
                bytes_read = {byte_at(second, place * MIB) for place in range(4)}
            with pytest.raises(OSError) as caught_again:
                byte_at(first, MIB)
        log = mount.log.read_text()

    assert caught.value.errno in STALE and caught_again.value.errno in STALE
    assert bytes_read == {2}
    assert log.count("the snapshot was deleted") == 1


def test_a_listing_that_is_older_than_what_it_lists_leaves_nothing_behind(
    disk: Path, target: Path, plane: list[str]
) -> None:
    """The kernel remembers for ever what a listing tells it: that must not be what is gone."""
    with Writer(disk) as writer, mounted(disk, target, *plane, env=told()) as mount:
        number = os.stat(mount / "first.raw").st_ino
        with os.scandir(target) as listing:  # it is opened, and nothing was read
            writer.delete("first")
            writer.write(2, 0, 4 * MIB)
            writer.snapshot("first")
            wait_replaced(mount / "first.raw", number)
            listed = {entry.name: entry.inode() for entry in listing}
        found = os.stat(mount / "first.raw").st_ino

    assert found != number
    assert number not in listed.values()


def test_an_overlay_of_a_machine_freezes_the_active_state_and_a_commit_takes_it_away(
    disk: Path, target: Path, tmp_path: Path
) -> None:
    with Writer(disk) as writer, mounted(disk, target, env=told()) as mount:
        assert names(target) == {"first.raw", "latest.raw"}
        writer.write(3, 0, 4 * MIB)
        overlay = str(tmp_path / "overlay.qcow2")
        writer.qmp("blockdev-snapshot-sync", device=DISK, snapshot_file=overlay, format="qcow2")
        wait_names(target, {"current.raw", "first.raw", "latest.raw"})
        with opened(mount / "current.raw") as current, opened(mount / "first.raw") as first:
            writer.write(4, 0, MIB)
            frozen = {byte_at(current, place * MIB) for place in range(4)}
            writer.qmp("block-commit", job_id="job", device=DISK)
            writer.wait_event("BLOCK_JOB_READY")
            writer.qmp("block-job-complete", device="job")
            writer.wait_event("BLOCK_JOB_COMPLETED")
            with pytest.raises(OSError) as caught:
                byte_at(current, 0)
            wait_names(target, {"first.raw", "latest.raw"})
            still = byte_at(first, 0)

    assert frozen == {3}
    assert caught.value.errno in STALE
    assert still == 1


def test_without_locks_nothing_is_read_of_a_state_that_a_machine_writes(
    disk: Path, target: Path, plane: list[str]
) -> None:
    with mounted(disk, target, "--no-lock", *plane, env=told()) as mount, opened(mount / "current.raw") as current:
        before = byte_at(current, 0)
        with Writer(disk) as writer:
            writer.write(5, 0, MIB)
            with pytest.raises(OSError) as caught:
                byte_at(current, 0)
            wait_names(target, {"first.raw", "latest.raw"})
        wait_names(target, {"current.raw", "first.raw", "latest.raw"})
        with opened(mount / "current.raw") as again:
            after = byte_at(again, 0)

    assert caught.value.errno in STALE
    assert (before, after) == (1, 5)


def test_an_image_that_is_replaced_is_shown_and_open_files_stay_as_they_were(disk: Path, target: Path) -> None:
    other = disk.with_name("other.qcow2")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", other, "1M")
    with mounted(disk, target, env=told()) as mount, opened(mount / "first.raw") as first:
        os.rename(other, disk)
        wait_names(target, {"current.raw"})
        size, byte = os.stat(mount / "current.raw").st_size, byte_at(first, MIB)

    assert (size, byte) == (MIB, 1)


def test_an_image_that_a_link_on_its_way_leads_to_is_followed(disk: Path, target: Path) -> None:
    """Nobody tells of that, and the locks on the image that was opened keep nobody from it."""
    for name, size in (("old", "4M"), ("new", "1M")):
        disk.with_name(name).mkdir()
        qemu("qemu-img", "create", "-q", "-f", "qcow2", disk.with_name(name) / "disk.qcow2", size)
    link, other = disk.with_name("link"), disk.with_name("other")
    link.symlink_to("old")
    other.symlink_to("new")
    with mounted(link / "disk.qcow2", target, env=told("f.POLL_SECONDS = 0.05")) as mount:
        before = os.stat(mount / "current.raw").st_size
        os.rename(other, link)
        wait_until(lambda: os.stat(mount / "current.raw").st_size == MIB, "it is the same")

    assert before == 4 * MIB


def test_a_machine_that_copies_its_base_into_its_image_has_no_base_any_more(
    disk: Path, target: Path, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk, "-F", "qcow2", overlay)
    with Writer(overlay) as writer, mounted(overlay, target, env=told()) as mount, opened(mount / "disk.raw") as base:
        before = names(target)
        writer.qmp("block-stream", job_id="job", device=DISK)
        writer.wait_event("BLOCK_JOB_COMPLETED")
        wait_names(target, set())
        still = byte_at(base, MIB)

    assert {"disk.raw", "disk@first.raw", "latest.raw"} == before
    assert still == 1


def test_an_image_that_cannot_be_opened_leaves_the_mount_as_it_is(disk: Path, target: Path) -> None:
    good, bad = disk.with_name("good.qcow2"), disk.with_name("bad.qcow2")
    os.link(disk, good)
    bad.write_bytes(b"QFI\xfb" + bytes(200))
    with mounted(disk, target, "--no-lock", env=told()) as mount:
        os.rename(bad, disk)
        wait_until(lambda: "goes on as it is" in mount.log.read_text(), "nothing in the log")
        mount.signal(signal.SIGHUP)
        shown, byte = names(target), (mount / "first.raw").read_bytes()[0]
        qemu("qemu-img", "snapshot", "-q", "-c", "second", good)
        os.rename(good, disk)
        mount.signal(signal.SIGHUP)
        wait_names(target, {"current.raw", "first.raw", "second.raw", "latest.raw"})
        log = mount.log.read_text()

    assert (shown, byte) == ({"current.raw", "first.raw", "latest.raw"}, 1)
    assert log.count("goes on as it is") == 1


def test_sighup_looks_at_once(disk: Path, target: Path) -> None:
    with Writer(disk) as writer, mounted(disk, target, env=told(BY_HAND)) as mount:
        writer.snapshot("second")
        before = names(target)
        mount.signal(signal.SIGHUP)
        wait_names(target, {"first.raw", "second.raw", "latest.raw"})

    assert before == {"first.raw", "latest.raw"}


def test_sighup_looks_at_once_in_the_foreground_too(disk: Path, target: Path) -> None:
    with Writer(disk) as writer, in_foreground(disk, target, env=told(BY_HAND)) as mount:
        writer.snapshot("second")
        mount.signal(signal.SIGHUP)
        wait_names(target, {"first.raw", "second.raw", "latest.raw"})


def test_files_inside_are_those_of_the_name_now(tmp_path: Path, target: Path) -> None:
    """A directory of a snapshot goes with it, and what takes its name is read anew."""
    need("qemu-img", "mkfs.ext4")
    raws = []
    for number in range(2):
        content = tmp_path / str(number)
        content.mkdir()
        (content / "file").write_text(f"{number}\n")
        raws.append(tmp_path / f"{number}.raw")
        qemu("mkfs.ext4", "-q", "-d", content, raws[-1], "8M")
    image = tmp_path / "disk.qcow2"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raws[0], image)
    qemu("qemu-img", "snapshot", "-q", "-c", "a", image)
    with mounted(image, target, "--no-lock", env=told()) as mount:
        number, text = os.stat(mount / "a").st_ino, (mount / "a" / "file").read_text()
        qemu("qemu-img", "snapshot", "-q", "-d", "a", image)
        qemu("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", raws[1], image)
        qemu("qemu-img", "snapshot", "-q", "-c", "a", image)
        wait_replaced(mount / "a", number)
        later = (mount / "a" / "file").read_text()

    assert (text, later) == ("0\n", "1\n")

"""Images that another process writes: their frozen points are shown, what changes only with --live, as it is now."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import need
from tests.support.mounts import PATIENCE, call, mounted, qemu

MIB = 1 << 20


class Writer:
    """qemu-io with an image open for writing, as a running VM has it: the lock bytes are QEMU's."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def do(self, command: str) -> None:
        """Run a command of qemu-io, and wait until it is done and on disk."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{command}\nflush\nlength\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            assert "error" not in line.lower() and "failed" not in line.lower(), line
            if line.strip().endswith(("MiB", "GiB")):  # the answer to "length"
                return
        raise AssertionError("qemu-io ended")


@contextmanager
def writing(image: Path) -> Iterator[Writer]:
    need("qemu-io", "stdbuf")
    # Neither may its answers wait in a buffer, nor our commands in its own: it polls its input for each line.
    words = ["stdbuf", "-i0", "-oL", "qemu-io", "-f", "qcow2", str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        writer = Writer(process)
        writer.do("flush")
        try:
            yield writer
        finally:
            process.stdin.write("quit\n")  # type: ignore[union-attr]
            process.stdin.close()  # type: ignore[union-attr]
            process.stdout.read()  # type: ignore[union-attr]
            process.wait(PATIENCE)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Return an image with a snapshot `frozen` full of 1, and 2 in its active state."""
    need("qemu-img", "qemu-io")
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "4M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 4M", path)
    qemu("qemu-img", "snapshot", "-q", "-c", "frozen", path)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 1M", path)
    return path


LEFT_OUT = "is left out: another process has the image open for writing; --live shows it as it is at each read\n"


def test_the_active_state_is_left_out_and_one_line_names_live(disk: Path, target: Path) -> None:
    with writing(disk):
        done = call("mount", disk, target)
        names = sorted(os.listdir(target))
        content = (target / "frozen.raw").read_bytes()
        ended = call("umount", target)

    assert (done.returncode, ended.returncode) == (0, 0)
    assert done.stderr == f"qcowfs: warning: {disk}: current.raw {LEFT_OUT}"
    assert names == ["frozen.raw", "latest.raw"]
    assert content == b"\x01" * (4 * MIB)


def test_a_frozen_point_stays_while_the_writer_writes(disk: Path, target: Path) -> None:
    with writing(disk) as writer, mounted(disk, target) as mount:
        before = (mount / "frozen.raw").read_bytes()
        for number in range(8):
            writer.do(f"write -P {number + 3} {number * 512}k 512k")
        descriptor = os.open(mount / "frozen.raw", os.O_RDONLY | os.O_DIRECT)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        after = (mount / "frozen.raw").read_bytes()

    assert before == after == b"\x01" * (4 * MIB)


def test_live_shows_each_change_at_the_next_read(disk: Path, target: Path) -> None:
    with writing(disk) as writer, mounted(disk, target, "--live") as mount:
        with (mount / "current.raw").open("rb", buffering=0) as live:
            seen = [os.pread(live.fileno(), 2, 0)]
            writer.do("write -P 7 0 64k")
            seen.append(os.pread(live.fileno(), 2, 0))
            writer.do("write -P 8 2M 64k")
            seen.append(os.pread(live.fileno(), 2, 2 * MIB))
        whole = (mount / "current.raw").read_bytes()

    assert seen == [b"\x02\x02", b"\x07\x07", b"\x08\x08"]
    assert whole[: 64 * 1024] == b"\x07" * 64 * 1024
    assert len(whole) == 4 * MIB


def test_live_shows_a_resize(disk: Path, target: Path) -> None:
    qemu("qemu-img", "snapshot", "-q", "-d", "frozen", disk)
    with writing(disk) as writer, mounted(disk, target, "-o", "live") as mount:
        before = (mount / "current.raw").stat().st_size
        writer.do("truncate 6M")
        after = (mount / "current.raw").stat().st_size
        with (mount / "current.raw").open("rb", buffering=0) as live:
            end = os.pread(live.fileno(), 4096, 6 * MIB - 10)

    assert (before, after, end) == (4 * MIB, 6 * MIB, bytes(10))


def test_an_image_that_is_only_its_active_state_is_an_empty_mount(disk: Path, target: Path) -> None:
    qemu("qemu-img", "snapshot", "-q", "-d", "frozen", disk)
    with writing(disk):
        done = call("mount", disk, target)
        names = os.listdir(target)
        call("umount", target)

    assert (done.returncode, names) == (0, [])
    assert done.stderr.endswith(LEFT_OUT)


def test_a_base_that_is_written_makes_all_above_it_live(disk: Path, target: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", disk.name, "-F", "qcow2", top)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 5 3M 64k", top)
    qemu("qemu-img", "snapshot", "-q", "-c", "of the overlay", top)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 6 3M 64k", top)
    with writing(disk) as writer:
        with mounted(top, target) as mount:
            frozen = sorted(os.listdir(mount.path))
        with mounted(top, target, "--live") as mount:
            names = sorted(os.listdir(mount.path))
            writer.do("write -P 9 0 64k")
            found = {
                name: ((mount / name).read_bytes()[:2], (mount / name).read_bytes()[3 * MIB : 3 * MIB + 2])
                for name in ("current.raw", "of the overlay.raw", "disk.raw", "disk@frozen.raw")
            }

    assert frozen == ["disk@frozen.raw", "latest.raw"]
    assert names == ["current.raw", "disk.raw", "disk@frozen.raw", "latest.raw", "of the overlay.raw"]
    assert found == {
        "current.raw": (b"\x09\x09", b"\x06\x06"),
        "of the overlay.raw": (b"\x09\x09", b"\x05\x05"),
        "disk.raw": (b"\x09\x09", b"\x01\x01"),
        "disk@frozen.raw": (b"\x01\x01", b"\x01\x01"),
    }


def test_while_it_is_mounted_qemu_does_not_change_an_image(disk: Path, target: Path) -> None:
    with mounted(disk, target):
        tried = subprocess.run(["qemu-img", "snapshot", "-d", "frozen", disk], capture_output=True, text=True)
    freed = subprocess.run(["qemu-img", "snapshot", "-d", "frozen", disk], capture_output=True, text=True)

    assert tried.returncode != 0
    assert "lock" in tried.stderr
    assert freed.returncode == 0


@pytest.mark.parametrize("option", [["--no-lock"], ["-o", "no_lock"], ["-o", "nolock"]])
def test_without_the_lock_qemu_may(disk: Path, target: Path, option: list[str]) -> None:
    with mounted(disk, target, *option):
        tried = subprocess.run(["qemu-img", "snapshot", "-c", "more", disk], capture_output=True, text=True)

    assert (tried.returncode, tried.stderr) == (0, "")


def test_a_live_file_whose_header_breaks_is_eio_and_the_rest_goes_on(disk: Path, target: Path) -> None:
    with writing(disk), mounted(disk, target, "--live") as mount:
        head = disk.read_bytes()[:8]
        with disk.open("r+b") as file:
            file.write(b"\0" * 8)
        names = sorted(os.listdir(mount.path))
        with pytest.raises(OSError) as failure:
            (mount / "current.raw").stat()
        frozen = (mount / "frozen.raw").read_bytes()
        with disk.open("r+b") as file:
            file.write(head)
        size = (mount / "current.raw").stat().st_size

    assert names == ["current.raw", "frozen.raw", "latest.raw"]
    assert failure.value.errno in (errno.EIO, errno.EINVAL)
    assert frozen == b"\x01" * (4 * MIB)
    assert size == 4 * MIB

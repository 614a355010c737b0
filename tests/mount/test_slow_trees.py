"""A source that does not answer holds up those who look into one directory of one tree, and nobody else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import need
from tests.support.crash import mounted as loop_mounted
from tests.support.disks import run
from tests.support.mounts import PATIENCE, Mounted, call, mounted, qemu, wait_until

pytest.importorskip("pyfuse3")

from tests.support.slow import SlowSource, slow_source

PLANES = pytest.mark.parametrize("more", [[], ["--no-data-plane"]], ids=["data plane", "plain"])
KIB = 1 << 10
GROUP = 8192  # blocks
BLOCK = 64 * KIB  # in which a worker reads
LISTERS = 70  # at once: more than the data plane has threads
LIST = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
count = int(sys.argv[2])
with ThreadPoolExecutor(count) as pool:
    print({tuple(found) for found in pool.map(os.listdir, [sys.argv[1]] * count)})
"""


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SlowSource]:
    """Show a file system in which the directory `slow` cannot be read for now."""
    need("fusermount3", "mke2fs", "debugfs")
    disk = tmp_path / "base.raw"
    run("truncate", "-s", "40M", disk)
    run("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-O", "^flex_bg", disk)
    with loop_mounted(disk) as root:
        (root / "quick").mkdir()
        (root / "quick" / "file").write_text("here\n")
        for number in range(20):
            (root / f"slow{number}" / "other").mkdir(parents=True)
    # A directory in another group of blocks than all else that is needed: where each is, chance decides.
    quick = group_of(disk, "/quick"), 0
    slow = next(f"slow{number}" for number in range(20) if group_of(disk, f"/slow{number}") not in quick)
    run("debugfs", "-w", "-R", f"link /{slow} /slow", disk)
    place = block_of(disk, f"/{slow}") * KIB // BLOCK * BLOCK
    with slow_source(disk, tmp_path / "source", place, place + BLOCK) as found:
        yield found


def block_of(disk: Path, path: str) -> int:
    return int(run("debugfs", "-R", f"blocks {path}", disk).split()[0])


def group_of(disk: Path, path: str) -> int:
    return block_of(disk, path) // GROUP


@contextmanager
def mounted_slowly(source: SlowSource, target: Path, *more: str) -> Iterator[Mounted]:
    image = target.with_name("top.qcow2")
    qemu("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", source.path, "-F", "raw", image, "40M")
    qemu("qemu-img", "snapshot", "-c", "one", image)
    with mounted(image, target, "--allow-backing", "any", *more) as mount:
        try:
            yield mount
        finally:
            source.let_go()


@contextmanager
def listers(directory: Path, source: SlowSource) -> Iterator[subprocess.Popen[str]]:
    """Have a slow directory listed many times at once; the first one's read waits, and the others for the first one."""
    words = [sys.executable, "-c", LIST, str(directory), str(LISTERS)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        try:
            source.wait_for_reads(1)
            yield process
        finally:
            source.let_go()
            process.kill()


@PLANES
def test_others_are_answered_while_a_directory_is_slow(source: SlowSource, target: Path, more: list[str]) -> None:
    overdue = threading.Timer(PATIENCE, source.let_go)  # what waits for the source cannot even be killed
    with mounted_slowly(source, target, *more) as mount, listers(target / "current" / "slow", source) as waiting:
        overdue.start()
        for _ in range(3):
            assert (target / "one" / "quick" / "file").read_text() == "here\n"
            assert os.listdir(target / "one" / "quick") == ["file"]
            assert "current.raw" in os.listdir(target)
            os.statvfs(target)
            with (target / "current.raw").open("rb") as raw:
                assert os.pread(raw.fileno(), 2, KIB + 56) == b"\x53\xef"
            assert mount.ask("user.qcowfs.pid")
        assert overdue.is_alive()
        overdue.cancel()
        source.let_go()
        assert waiting.communicate(timeout=PATIENCE)[0] == "{('other',)}\n"


@PLANES
def test_a_signal_ends_the_mount_while_a_directory_is_slow(source: SlowSource, target: Path, more: list[str]) -> None:
    with mounted_slowly(source, target, *more) as mount, listers(target / "current" / "slow", source):
        mount.signal(signal.SIGTERM)
        wait_until(lambda: not mount.is_mounted(), "it is still mounted")
        source.let_go()
        mount.wait_gone()


@PLANES
def test_an_umount_does_not_wait_for_a_slow_directory(source: SlowSource, target: Path, more: list[str]) -> None:
    with mounted_slowly(source, target, *more) as mount, listers(target / "current" / "slow", source):
        assert call("umount", "--lazy", target).returncode == 0
        assert not mount.is_mounted()
        source.let_go()
        mount.wait_gone()

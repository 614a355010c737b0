"""A source that does not answer holds up those who read from it, and nobody else. Nothing here depends on time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.mount.images import MIB
from tests.support import need
from tests.support.mounts import PATIENCE, Mounted, mounted, qemu, shell, wait_until
from tests.support.qemu import qemu_io

pytest.importorskip("pyfuse3")

from tests.support.slow import SlowSource, slow_source

WORKERS = min(2 * len(os.sched_getaffinity(0)), 16)
READ = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)  # what a shell runs in the background ignores it
file = os.open(sys.argv[1], os.O_RDONLY)
sys.stdout.buffer.write(os.pread(file, 512, int(sys.argv[2])))
"""


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SlowSource]:
    need("fusermount3")
    file = tmp_path / "base.raw"
    file.write_bytes(random.Random(1).randbytes(16 * MIB))
    with slow_source(file, tmp_path / "slow", MIB, 16 * MIB) as found:
        yield found


@pytest.fixture
def image(source: SlowSource, tmp_path: Path) -> Path:
    """Return an overlay over the slow source: everything before 1 MiB is quick, and holds sevens."""
    need("qemu-img", "qemu-io")
    top = tmp_path / "top.qcow2"
    qemu("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", source.path, "-F", "raw", top, 16 * MIB)
    qemu_io(top, "write -P 7 0 1M")
    return top


@pytest.fixture
def mount(image: Path, source: SlowSource, target: Path) -> Iterator[Mounted]:
    with mounted(image, target, "--allow-backing", "any") as found:
        yield found
        source.let_go()


@contextmanager
def waiting_readers(mount: Mounted, source: SlowSource, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Let `count` processes read what is slow, far from each other, and wait until the source has their reads."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", READ, str(mount / "current.raw"), str(place_of(number))], stdout=subprocess.PIPE
        )
        for number in range(count)
    ]
    try:
        source.wait_for_reads(count)
        yield processes
    finally:
        source.let_go()
        for process in processes:
            process.kill()
            process.communicate(timeout=PATIENCE)


def place_of(number: int) -> int:
    return 2 * MIB + number * MIB // 2


def answered(processes: list[subprocess.Popen[bytes]], source: SlowSource) -> None:
    """Let the reads go, and check that each has its bytes."""
    content = behind(source)
    source.let_go()
    for number, process in enumerate(processes):
        said, _ = process.communicate(timeout=PATIENCE)
        assert said == content[place_of(number) : place_of(number) + 512]


def behind(source: SlowSource) -> bytes:
    return source.path.parent.with_name("base.raw").read_bytes()


def quick(mount: Mounted) -> None:
    """Ask for everything that does not need the source."""
    for _ in range(3):
        with (mount / "current.raw").open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 4096, 8192) == b"\7" * 4096
            assert os.lseek(file.fileno(), 5, os.SEEK_DATA) == 5
        assert "current.raw" in shell('ls -l "$1"', mount.path)
        assert os.getxattr(mount / "current.raw", "user.qcowfs.kind") == b"active"


def test_others_read_and_list_while_all_threads_but_one_wait_for_a_source(mount: Mounted, source: SlowSource) -> None:
    with waiting_readers(mount, source, WORKERS - 1) as readers:
        quick(mount)
        answered(readers, source)


def test_more_slow_reads_than_threads_are_all_answered(mount: Mounted, source: SlowSource) -> None:
    with waiting_readers(mount, source, WORKERS) as readers:
        more = subprocess.Popen(
            [sys.executable, "-c", READ, str(mount / "current.raw"), str(place_of(WORKERS))], stdout=subprocess.PIPE
        )
        answered([*readers, more], source)
        quick(mount)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_reader_that_dies_while_its_read_waits_harms_nobody(mount: Mounted, source: SlowSource, number: int) -> None:
    """The kernel sends INTERRUPT, and keeps the reader until its read is answered."""
    with waiting_readers(mount, source, WORKERS - 1) as readers:
        readers[0].send_signal(number)
        quick(mount)
        source.let_go()
        assert readers[0].wait(PATIENCE) != 0
        quick(mount)


def test_a_file_may_be_closed_while_the_kernel_reads_ahead_in_it(mount: Mounted, source: SlowSource) -> None:
    file = os.open(mount / "current.raw", os.O_RDONLY)
    os.posix_fadvise(file, 2 * MIB, 128 << 10, os.POSIX_FADV_WILLNEED)
    os.close(file)
    source.wait_for_reads(1)

    source.let_go()

    with (mount / "current.raw").open("rb", buffering=0) as again:
        assert os.pread(again.fileno(), 128 << 10, 2 * MIB) == behind(source)[2 * MIB : 2 * MIB + (128 << 10)]


def test_a_signal_lets_a_slow_read_have_its_answer(image: Path, source: SlowSource, target: Path) -> None:
    with mounted(image, target, "--allow-backing", "any") as mount:
        with waiting_readers(mount, source, WORKERS - 1) as readers:
            mount.signal(signal.SIGTERM)
            wait_until(lambda: not mount.is_mounted(), "it is still mounted")
            answered(readers, source)
        mount.wait_gone()


def test_a_forced_end_waits_for_the_source_and_no_longer(image: Path, source: SlowSource, target: Path) -> None:
    with mounted(image, target, "--allow-backing", "any") as mount, waiting_readers(mount, source, WORKERS - 1):
        mount.signal(signal.SIGTERM)
        wait_until(lambda: not mount.is_mounted(), "it is still mounted")
        mount.signal(signal.SIGTERM)
        source.let_go()
        mount.wait_gone()

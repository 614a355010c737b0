"""Never wrong data: snapshots are deleted and their clusters written again while readers compare what they read.

Evidence: a chosen scenario, made by QEMU's block layer. Each snapshot is full of one byte, so what an open file returns
is right if it is always the same.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import threading
from pathlib import Path

import pytest

from tests.support import need
from tests.support.mounts import mounted, qemu, wait_until
from tests.support.nbd import nbdkit
from tests.support.writer import Writer

MIB = 1 << 20
SIZE = 2 * MIB
ROUNDS = 10
READERS = 2
QUICK = "import qcowfs.follow as f; f.LOOK_SECONDS = f.POLL_SECONDS = 0.02"
EXPECTED = {errno.ESTALE, errno.EIO, errno.ENOENT}


class Reader(threading.Thread):
    """Opens the snapshot again and again, and reads it until it fails."""

    def __init__(self, path: Path, seed: int) -> None:
        super().__init__()
        self._path = path
        self._dice = random.Random(seed)
        self.stop = threading.Event()
        self.wrong: list[str] = []
        self.errors: set[int] = set()
        self.seen: set[int] = set()
        self.blocks = 0

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                descriptor = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
            except OSError as error:
                self.errors.add(error.errno or 0)
                continue
            try:
                self._read(descriptor)
            except OSError as error:
                self.errors.add(error.errno or 0)
            finally:
                os.close(descriptor)

    def _read(self, descriptor: int) -> None:
        expected = -1
        with mmap.mmap(-1, 64 << 10) as block:
            while not self.stop.is_set():
                offset = self._dice.randrange(SIZE // len(block)) * len(block)
                assert os.preadv(descriptor, [block], offset) == len(block)
                found = set(block[:])
                expected = min(found) if expected < 0 else expected
                if found != {expected}:
                    self.wrong.append(f"{found} at {offset:#x}, {expected} before")
                self.seen.add(expected)
                self.blocks += 1


def play(writer: Writer, readers: list[Reader]) -> None:
    for number in range(1, ROUNDS + 1):
        writer.write(number, 0, SIZE)
        writer.snapshot("s")
        wait_until(lambda number=number: all(number in one.seen or one.wrong for one in readers), "nobody reads it")
        writer.write(100 + number, 0, SIZE)
        writer.delete("s")
        writer.write(200, 0, SIZE)


def check(image: str | Path, writer: Writer, target: Path, *options: str, count: int = READERS) -> None:
    """Mount `image` and read it while `writer` writes it."""
    readers = [Reader(target / "s.raw", seed) for seed in range(count)]
    with mounted(image, target, *options, env={"QCOWFS_TEST_BEFORE": QUICK}):
        for reader in readers:
            reader.start()
        try:
            play(writer, readers)
        finally:
            for reader in readers:
                reader.stop.set()
                reader.join()

    assert [] == [line for reader in readers for line in reader.wrong]
    assert set().union(*(reader.errors for reader in readers)) <= EXPECTED


@pytest.mark.parametrize("options", [[], ["--no-data-plane"]], ids=["the data plane", "python"])
@pytest.mark.parametrize("small", [False, True], ids=["plain", "small clusters"])
def test_no_read_returns_what_a_cluster_holds_after_its_snapshot(
    tmp_path: Path, target: Path, options: list[str], small: bool
) -> None:
    need("qemu-img", "qemu-system-x86_64")
    image = tmp_path / "disk.qcow2"
    words = ["-o", "cluster_size=4096"] if small else []
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *words, image, str(SIZE))
    with Writer(image) as writer:
        check(image, writer, target, *options)


def test_nor_does_one_from_a_server(tmp_path: Path, target: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whose readers share their looks whether the snapshot is still there."""
    need("qemu-img", "qemu-system-x86_64", "nbdkit")
    image = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    os.truncate(image, 32 * MIB)  # the size of an export does not change
    with Writer(image) as writer, nbdkit(tmp_path_factory.mktemp("v") / "s", "file", image) as server:
        check(server.url, writer, target, count=6)

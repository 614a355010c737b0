"""Workers that are killed at any moment, while more trees are read than there may be workers, and some are closed."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qcowfs import limits
from qcowfs.errors import TreeFault
from qcowfs.inside import places, readers
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from tests.support import fakereader
from tests.support.workers import children, eventually, launcher_pid, running

SIZE = 1 << 20
SECONDS = 3
TREES = 12
WORKERS = 4


def content(offset: int, length: int) -> bytes:
    return bytes((place >> 8) & 0xFF for place in range(offset, offset + length))


class Reader:
    """Asks trees at random, and counts what came of it."""

    def __init__(self, trees: list[Tree], end: float, seed: int) -> None:
        self._trees = trees
        self._end = end
        self._rng = random.Random(seed)
        self.right = self.faults = 0

    def run(self) -> Reader:
        while time.monotonic() < self._end:
            self._ask(self._rng.choice(self._trees))
        return self

    def _ask(self, tree: Tree) -> None:
        number, place = self._rng.randrange(1, 600), self._rng.randrange(SIZE - 50)
        try:
            if self._rng.random() < 0.5:
                assert fakereader.inode(number) == tree.stat(number)
            else:
                assert content(place, 50) == tree.read(2, place, 50)
            self.right += 1
        except TreeFault as fault:
            assert fault.errno in (errno.EIO, errno.EAGAIN)
            self.faults += 1


def kill_now_and_then(launcher: Launcher, done: threading.Event) -> int:
    killed, rng = 0, random.Random(1)
    while not done.wait(0.02):
        for pid in sorted(running(launcher)):
            if rng.random() < 0.3:
                killed += kill(launcher, pid, rng.choice((signal.SIGKILL, signal.SIGSEGV)))
    return killed


def kill(launcher: Launcher, pid: int, number: int) -> bool:
    """Send a signal to a child of the launcher, but not to another process that has its id by now."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if pid in running(launcher):
            signal.pidfd_send_signal(descriptor, number)
            return True
    except ProcessLookupError:
        pass
    finally:
        os.close(descriptor)
    return False


@pytest.mark.expect_warnings
def test_every_request_ends_right_or_with_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(readers.READERS, "fake", (fakereader.__name__, "", "nothing"))
    monkeypatch.setattr(limits, "INSIDE_WORKERS", WORKERS)
    monkeypatch.setattr(limits, "INSIDE_RESTARTS", 10_000)
    monkeypatch.setattr(places, "TURN", 0.05)
    launcher, done = Launcher(), threading.Event()
    whole = bytes(range(256)) * 16
    stored = b"".join(bytes([byte]) * 256 for byte in whole)
    trees = [Tree(launcher, "disk", "fake", SIZE, lambda o, n: stored[o : o + n], True) for _ in range(TREES)]
    end = time.monotonic() + SECONDS
    with ThreadPoolExecutor(12) as threads:
        killing = threads.submit(kill_now_and_then, launcher, done)
        reading = [threads.submit(Reader(trees, end, seed).run) for seed in range(10)]
        while not all(future.done() for future in reading):
            assert len(running(launcher)) <= WORKERS
            launcher.idle(0.01)
            time.sleep(0.01)
        done.set()
        read = [future.result() for future in reading]

    assert killing.result() > 20
    assert sum(reader.right for reader in read) > sum(reader.faults for reader in read) > 0
    assert all(fakereader.inode(7) == tree.stat(7) for tree in trees)
    for tree in trees:
        tree.close()
    assert eventually(lambda: children(launcher) == set())
    pid = launcher_pid(launcher)
    launcher.close()
    assert not os.path.exists(f"/proc/{pid}")

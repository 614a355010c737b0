"""More trees than there may be workers, with real workers: never too many, everybody's turn comes, no wait for ever."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from qcowfs import limits
from qcowfs.errors import TreeFault
from qcowfs.inside import places, readers
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from tests.support import fakereader
from tests.support.workers import eventually, running

KIND = "fake"
SIZE = 1 << 20


class Disk:
    """Zeros; a read waits while `gate` is closed."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.asked = threading.Event()

    def read(self, offset: int, length: int) -> bytes:
        self.asked.set()
        assert self.gate.wait(30)
        return bytes(length)


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    monkeypatch.setitem(readers.READERS, KIND, (fakereader.__name__, "", "nothing"))
    found = Launcher()
    yield found
    found.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as pool:
        yield pool


def tree_of(launcher: Launcher, disk: Disk | None = None) -> Tree:
    return Tree(launcher, "disk", KIND, SIZE, disk.read if disk else lambda _offset, length: bytes(length), True)


def busy(launcher: Launcher, disk: Disk, threads: ThreadPoolExecutor) -> Future[bytes]:
    """Let a new tree have a worker, and a request under way until the disk's gate opens."""
    disk.asked.clear()
    asked = threads.submit(tree_of(launcher, disk).read, 2, 0, 10)
    assert disk.asked.wait(10)
    return asked


def test_forty_trees_at_once_never_have_more_workers_than_there_may_be(
    launcher: Launcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "TURN", 0.5)  # some times what it takes to start a worker from so large a process
    disk, most = Disk(), 0
    trees = [tree_of(launcher, disk) for _ in range(40)]

    def ask(tree: Tree) -> int:
        assert bytes(10) == tree.read(2, 0, 10)
        return sum(fakereader.inode(number) == tree.stat(number) for number in range(1, 40))

    asked = [threads.submit(ask, tree) for tree in trees for _ in range(2 if tree is trees[0] else 1)]
    assert eventually(lambda: len(running(launcher)) == limits.INSIDE_WORKERS)
    disk.gate.set()
    while not all(future.done() for future in asked):
        most = max(most, len(running(launcher)))
        time.sleep(0.002)  # whoever always looks leaves the others no interpreter
    assert [39] * 41 == [future.result() for future in asked]
    assert most <= limits.INSIDE_WORKERS


def test_a_tree_waits_until_another_becomes_idle(
    launcher: Launcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "INSIDE_WORKERS", 2)
    disk = Disk()
    before = [busy(launcher, disk, threads) for _ in range(2)]
    late = threads.submit(tree_of(launcher).stat, 7)
    time.sleep(0.3)
    assert not late.done()
    disk.gate.set()

    assert fakereader.inode(7) == late.result(10)
    assert [bytes(10)] * 2 == [future.result(10) for future in before]


def test_a_wait_has_an_end(launcher: Launcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INSIDE_WORKERS", 1)
    disk = Disk()
    before, tree = busy(launcher, disk, threads), tree_of(launcher)
    with monkeypatch.context() as patched:
        patched.setattr(limits, "INSIDE_PLACE_SECONDS", 0.3)
        for _ in range(2):
            with pytest.raises(TreeFault, match="its reader cannot be started: 1 others are being read") as caught:
                tree.stat(7)
            assert errno.EAGAIN == caught.value.errno
    disk.gate.set()
    before.result(10)

    assert fakereader.inode(7) == tree.stat(7)


def test_who_came_first_is_first(
    launcher: Launcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "INSIDE_WORKERS", 1)
    disk, order = Disk(), []
    busy(launcher, disk, threads)

    def ask(number: int) -> None:
        tree = tree_of(launcher)
        tree.stat(7)
        order.append(number)
        tree.close()

    waiting = []
    for number in range(16):
        waiting.append(threads.submit(ask, number))
        assert eventually(lambda: len(launcher.places._waiting) == len(waiting))
    disk.gate.set()
    for future in waiting:
        future.result(10)

    assert list(range(16)) == order


def test_a_tree_that_is_never_idle_gives_its_worker_up_after_a_while(
    launcher: Launcher, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "INSIDE_WORKERS", 1)
    monkeypatch.setattr(places, "TURN", 0.3)
    greedy, done = tree_of(launcher), threading.Event()

    def hammer() -> int:
        count = 0
        while not done.is_set():
            assert fakereader.inode(7) == greedy.stat(7)
            count += 1
        return count

    hammering = [threads.submit(hammer) for _ in range(4)]
    assert eventually(lambda: len(running(launcher)) == 1)
    try:
        for _ in range(3):
            assert fakereader.inode(7) == tree_of(launcher).stat(7)
    finally:
        done.set()

    assert all(future.result(10) for future in hammering)


def test_nobody_waits_for_a_place_of_a_mount_that_ends(
    threads: ThreadPoolExecutor, launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "INSIDE_WORKERS", 1)
    disk = Disk()
    before, late = busy(launcher, disk, threads), threads.submit(tree_of(launcher).stat, 7)
    assert eventually(lambda: len(launcher.places._waiting) == 1)
    launcher.close()

    with pytest.raises(TreeFault, match="the mount ends"):
        late.result(5)
    disk.gate.set()
    with pytest.raises(TreeFault, match="the mount ends"):
        before.result(5)

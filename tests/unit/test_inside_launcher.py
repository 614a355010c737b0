"""The processes beside the mount: what a signal does to them, who collects them, what they hold, and how they end."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import pytest

from qcowfs import limits
from qcowfs.errors import TreeFault
from qcowfs.inside import forker, readers
from qcowfs.inside import launcher as launcher_module
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from tests.support import fakereader
from tests.support.workers import children, descriptors, eventually, is_alive, launcher_pid, pid_of, running

KIND = "fake"
LOW, HIGH = 256, 900


@pytest.fixture
def kind(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(readers.READERS, KIND, (fakereader.__name__, "", "nothing"))
    return KIND


@pytest.fixture
def high_descriptor() -> Iterator[int]:
    limits_before = resource.getrlimit(resource.RLIMIT_NOFILE)
    descriptor = os.open(os.devnull, os.O_RDONLY)
    os.dup2(descriptor, HIGH)
    os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (LOW, limits_before[1]))
    yield HIGH
    resource.setrlimit(resource.RLIMIT_NOFILE, limits_before)
    os.close(HIGH)


@pytest.fixture
def launcher(kind: str) -> Iterator[Launcher]:
    found = Launcher()
    yield found
    found.close()


def tree_of(launcher: Launcher, kind: str) -> Tree:
    return Tree(launcher, "disk", kind, 1 << 20, lambda _offset, length: bytes(length), True)


def test_a_late_answer_is_not_taken_for_the_next_one(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(launcher_module, "PATIENCE", 0.3)
    launcher = Launcher()
    os.kill(launcher_pid(launcher), signal.SIGSTOP)
    with pytest.raises(TreeFault):
        tree_of(launcher, kind).stat(7)
    os.kill(launcher_pid(launcher), signal.SIGCONT)
    time.sleep(0.3)

    for _ in range(3):
        tree = tree_of(launcher, kind)
        assert fakereader.inode(7) == tree.stat(7)
        assert pid_of(tree) in running(launcher)
        tree.close()
    assert set() == running(launcher)
    launcher.close()


def test_no_descriptor_above_a_lowered_limit_is_kept(high_descriptor: int, kind: str) -> None:
    launcher = Launcher()
    tree = tree_of(launcher, kind)
    assert fakereader.inode(7) == tree.stat(7)

    for pid in (launcher_pid(launcher), pid_of(tree)):
        assert str(high_descriptor) not in os.listdir(f"/proc/{pid}/fd")
    tree.close()
    launcher.close()


def test_signals_for_the_whole_group_end_nobody(launcher: Launcher, kind: str) -> None:
    tree = tree_of(launcher, kind)
    tree.stat(7)
    worker = pid_of(tree)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGTSTP):
        for pid in (launcher_pid(launcher), worker):
            os.kill(pid, number)
        assert fakereader.inode(7) == tree.stat(7)

    assert worker == pid_of(tree)
    assert fakereader.inode(7) == tree_of(launcher, kind).stat(7)


def test_ctrl_c_at_any_moment_ends_only_who_listens() -> None:
    """A process group of its own gets it, also while the launcher is being forked."""
    code = f"""
import os, signal
from qcowfs.inside import readers
readers.READERS["fake"] = ("{fakereader.__name__}", "", "")
from qcowfs.inside.launcher import Launcher
from qcowfs.inside.client import Tree
heard, listener = [], os.getpid()
def listen(number, frame):
    if os.getpid() != listener:
        raise KeyboardInterrupt
    heard.append(number)
signal.signal(signal.SIGINT, listen)
for _ in range(20):
    launcher = Launcher()
    os.killpg(0, signal.SIGINT)
    tree = Tree(launcher, "x", "fake", 4096, lambda o, n: bytes(n), True)
    tree.stat(2)
    pid = tree._worker.pid
    os.killpg(0, signal.SIGINT)
    tree.stat(2)
    assert pid == tree._worker.pid
    launcher.close()
print(len(heard))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, start_new_session=True)

    assert ("40\n", "") == (done.stdout, done.stderr)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_ended_while_idle_is_collected_at_once_and_replaced_without_a_word(
    launcher: Launcher, kind: str, number: int
) -> None:
    tree = tree_of(launcher, kind)
    for _ in range(limits.INSIDE_RESTARTS + 2):
        assert fakereader.inode(7) == tree.stat(7)
        os.kill(pid_of(tree), number)
        assert eventually(lambda: children(launcher) == set())


def test_a_worker_is_ended_by_its_number_and_never_by_a_process_id_that_may_be_anothers(
    launcher: Launcher, kind: str
) -> None:
    first, second = launcher.spawn(kind), launcher.spawn(kind)
    os.kill(first.pid, signal.SIGTRAP)
    assert eventually(lambda: children(launcher) == {second.pid})

    assert "SIGTRAP" == launcher.end(first)
    assert {second.pid} == running(launcher)
    assert "" == launcher.end(second)
    assert set() == children(launcher)
    for worker in (first, second):
        worker.channel.close()


def test_ends_that_nobody_asks_for_are_not_kept_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forker, "KEPT", 30)
    workers = forker._Workers()
    for number in range(forker.KEPT + 5):
        pid = os.fork()
        if pid == 0:
            os._exit(number % 100)
        workers.add(number, pid)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        workers.collect()

    assert forker.KEPT == len(workers._ended)
    assert (True, (forker.KEPT + 4) % 100) == workers.end(forker.KEPT + 4)


@pytest.mark.expect_warnings
def test_a_worker_that_was_stopped_is_one_that_does_not_answer(
    launcher: Launcher, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not one that ended by itself, because its socket was closed before it was killed."""
    tree = tree_of(launcher, kind)
    tree.stat(7)
    os.kill(pid_of(tree), signal.SIGSTOP)
    with monkeypatch.context() as patched:
        patched.setattr(limits, "INSIDE_ANSWER_SECONDS", 0.3)
        with pytest.raises(TreeFault, match=r"its reader crashed: no answer within 0\.3 s"):
            tree.stat(7)

    assert fakereader.inode(7) == tree.stat(7)


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_close_ends_when_the_launcher_does_not_answer(monkeypatch: pytest.MonkeyPatch, kind: str, number: int) -> None:
    monkeypatch.setattr(launcher_module, "PATIENCE", 0.3)
    launcher = Launcher()
    trees = [tree_of(launcher, kind) for _ in range(12)]
    for tree in trees:
        tree.stat(7)
    pids = [launcher_pid(launcher), *map(pid_of, trees)]
    os.kill(launcher_pid(launcher), number)
    began = time.monotonic()
    launcher.close()

    assert time.monotonic() - began < 2
    assert eventually(lambda: not any(is_alive(pid) for pid in pids))


@pytest.mark.expect_warnings
def test_trees_of_a_mount_whose_launcher_is_gone_say_so(launcher: Launcher, kind: str) -> None:
    tree = tree_of(launcher, kind)
    tree.stat(7)
    worker = pid_of(tree)
    os.kill(launcher_pid(launcher), signal.SIGKILL)
    assert eventually(lambda: not is_alive(worker))
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(TreeFault, match="the process that starts readers is gone") as caught:
            tree.stat(7)
        assert errno.EIO == caught.value.errno
    assert time.monotonic() - began < 1


def test_a_launcher_without_descriptors_to_spare_starts_nobody_and_lives(launcher: Launcher, kind: str) -> None:
    first = tree_of(launcher, kind)
    first.stat(7)  # so it has closed what it does not need
    first.close()
    pid = launcher_pid(launcher)
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (max(descriptors(pid)) + 1, before[1]))
    with pytest.raises(TreeFault, match="no process for it could be started"):
        tree_of(launcher, kind).stat(7)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)

    assert fakereader.inode(7) == tree_of(launcher, kind).stat(7)


def test_nothing_is_shared_with_a_worker_but_its_socket(kind: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, tempfile.TemporaryFile():
        launcher = Launcher()
        trees = [tree_of(launcher, kind) for _ in range(3)]
        for tree in trees:
            tree.stat(7)
        held = [descriptors(pid_of(tree)) for tree in trees]
        launcher.close()

    for found in held:
        assert {0: os.devnull, 1: os.devnull, 2: os.devnull} == {n: found[n] for n in found if n != 3}
    assert 3 == len({found[3] for found in held})

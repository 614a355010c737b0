"""A launcher that is late, and one that was forked with descriptors above the limit."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Iterator

import pytest

from qcowfs.errors import TreeFault
from qcowfs.inside import launcher as launcher_module
from qcowfs.inside import readers
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from tests.support import fakereader

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


def tree_of(launcher: Launcher, kind: str) -> Tree:
    return Tree(launcher, "disk", kind, 1 << 20, lambda _offset, length: bytes(length), True)


def running(launcher: Launcher) -> set[int]:
    """The launcher's children that are no zombies."""
    pid = launcher._pid
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        return {int(child) for child in children.read().split() if not is_zombie(int(child))}


def is_zombie(pid: int) -> bool:
    with open(f"/proc/{pid}/stat") as status:
        return status.read().rpartition(")")[2].split()[0] == "Z"


def test_a_late_answer_is_not_taken_for_the_next_one(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(launcher_module, "PATIENCE", 0.3)
    launcher = Launcher()
    os.kill(launcher._pid, signal.SIGSTOP)
    with pytest.raises(TreeFault):
        tree_of(launcher, kind).stat(7)
    os.kill(launcher._pid, signal.SIGCONT)
    time.sleep(0.3)

    for _ in range(3):
        tree = tree_of(launcher, kind)
        assert fakereader.inode(7) == tree.stat(7)
        assert tree._pid in running(launcher)
        tree.close()
    assert set() == running(launcher)
    launcher.close()


def test_no_descriptor_above_a_lowered_limit_is_kept(high_descriptor: int, kind: str) -> None:
    launcher = Launcher()
    tree = tree_of(launcher, kind)
    assert fakereader.inode(7) == tree.stat(7)

    for pid in (launcher._pid, tree._pid):
        assert str(high_descriptor) not in os.listdir(f"/proc/{pid}/fd")
    tree.close()
    launcher.close()

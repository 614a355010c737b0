"""The processes that read trees, as /proc tells of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher

__all__ = ["children", "descriptors", "eventually", "is_alive", "launcher_pid", "memory", "pid_of", "running"]


def launcher_pid(launcher: Launcher) -> int:
    return launcher._pid


def pid_of(tree: Tree) -> int:
    """Return the process id of the tree's worker, which it has to have."""
    assert tree._worker is not None
    return tree._worker.pid


def children(launcher: Launcher) -> set[int]:
    """Return all children of the launcher process, those among them that nobody has collected yet."""
    pid = launcher._pid
    return {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def running(launcher: Launcher) -> set[int]:
    """Return the children of the launcher process that have not ended."""
    return {child for child in children(launcher) if is_alive(child)}


def is_alive(pid: int) -> bool:
    """Tell whether there is such a process, and it has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descriptors(pid: int) -> dict[int, str]:
    """Return what each descriptor of a process stands for."""
    return {int(name): os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}


def memory(pid: int) -> dict[str, int]:
    """Return Rss, Pss, Private_Dirty and the like of a process, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}


def eventually(condition: Callable[[], bool], seconds: float = 10) -> bool:
    """Wait until it is so; return whether it is."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()

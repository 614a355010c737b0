"""What a worker takes that has read a file system of 24,000 files, down to the last attribute. Evidence: measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import lacking, need

need("mke2fs", "debugfs")
pytest.importorskip("qcowfs.inside.ext")
if os.geteuid() != 0:
    lacking("only root may look at the memory of a confined process")

FILES = 24_000
ENOUGH = 64 << 20  # bytes of a worker; 43 MiB were measured, of which 21 are its own
ENOUGH_OF_ITS_OWN = 8 << 20  # bytes of the launcher that are not the mount process's too; 3 MiB were measured

# In a process of its own: what a worker takes begins with what its launcher was forked from.
MEASURE = """
import json, pathlib, stat, sys
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from qcowfs.inside.record import ENTRY, INODE, Inode
from tests.support.crash import FileDevice
from tests.support.workers import launcher_pid, memory, pid_of

def walk(directory):
    cookie = 0
    while page := tree.entries(directory, cookie, 1 << 16):
        place = 0
        while place < len(page):
            cookie, _name, _extents, length = ENTRY.unpack_from(page, place)
            inode = Inode._make(INODE.unpack_from(page, place + ENTRY.size))
            tree.xattrs(inode.ino)
            yield inode
            if stat.S_ISDIR(inode.mode):
                yield from walk(inode.ino)
            place += length

device, launcher = FileDevice(pathlib.Path(sys.argv[1])), Launcher()
tree = Tree(launcher, "disk", "ext4", device.size, device.read, True)
files = sum(stat.S_ISREG(inode.mode) for inode in walk(tree.root))
print(json.dumps([files, memory(pid_of(tree)), memory(launcher_pid(launcher))]))
launcher.close()
"""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", "-N", str(2 * FILES), path, "64M"], check=True)
    commands = []
    for first in range(0, FILES, 2000):
        commands += [f"mkdir dir{first}", f"cd dir{first}"]
        commands += [f"write /dev/null file-{number}" for number in range(first, first + 2000)]
        commands += ["cd .."]
    told = "\n".join(commands)
    subprocess.run(["debugfs", "-w", "-f", "-", path], input=told, text=True, check=True, capture_output=True)
    return path


def test_a_large_tree_takes_little_memory(image: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MEASURE, image], capture_output=True, text=True, check=True)
    files, worker, launching = json.loads(done.stdout)

    assert FILES == files
    assert worker["Rss"] < ENOUGH
    assert launching["Private_Dirty"] < ENOUGH_OF_ITS_OWN

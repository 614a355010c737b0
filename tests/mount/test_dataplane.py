"""A mount with the data plane, where something beside it is slow or cannot be had."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.mount.images import Story
from tests.support.mounts import PATIENCE, call, launcher, one_line, wait_until

SLOW_COUNT = """
import time
from qcowfs.vfs.node import DiskFile
def count(self, counted=DiskFile.count):
    open({folder!r} + "/begun", "w").close()
    while not os.path.exists({folder!r} + "/go"):
        time.sleep(0.01)
    counted(self)
DiskFile.count = count
"""
NO_FORK = """
import errno
def refuse():
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
os.fork = refuse
"""


def changed(code: str) -> list[str]:
    """Return the command that is `qcowfs`, changed by `code`."""
    *interpreter, program = launcher()
    return [*interpreter, program.replace("sys.exit(", f"{code}\nsys.exit(")]


def test_who_waits_for_the_blocks_of_one_file_holds_up_nobody_else(story: Story, target: Path, tmp_path: Path) -> None:
    done = call("mount", story.image, target, command=changed(SLOW_COUNT.format(folder=str(tmp_path))))
    assert done.returncode == 0, done.stderr
    counted, other = (target / expected.name for expected in story.expected[:2])

    try:
        with subprocess.Popen(["stat", counted], stdout=subprocess.DEVNULL) as asking:
            wait_until((tmp_path / "begun").exists, "nobody counts")
            subprocess.run(["head", "-c", "1", other], check=True, capture_output=True, timeout=PATIENCE / 2)
            waits = asking.poll() is None
            (tmp_path / "go").touch()
    finally:
        (tmp_path / "go").touch()
        call("umount", target)

    assert waits
    assert asking.returncode == 0


def test_a_watcher_that_cannot_be_had_leaves_no_mount(story: Story, target: Path) -> None:
    done = call("mount", "-f", "-o", "auto_unmount", story.image, target, command=changed(NO_FORK))

    assert done.returncode != 0
    assert "Resource temporarily unavailable" in one_line(done)
    assert not os.path.ismount(target)

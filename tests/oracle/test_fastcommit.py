"""The replay of ext4's fast commits, compared with the kernel's name by name.

Evidence: seeded crash images (tests/support/crash.py). The kernel is made to mount for writing: mounting read-only, it
fails to replay what unlinks a name. It gives directories, and inodes whose links it counts, the time of the recovery;
those times are not compared.
"""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from qcowfs.inside.jbd2 import recover
from tests.support import lacking, need
from tests.support.crash import NOLOGFLUSH, FileDevice, Kind, Storm, crash, mounted
from tests.support.readertree import describe_reader
from tests.support.trees import describe

need("mkfs.ext4", "mount", "losetup")
if os.geteuid() != 0:
    lacking("loop devices and mounts need root")
ext = pytest.importorskip("qcowfs.inside.ext")

SEEDS = range(int(os.environ.get("QCOWFS_CRASH_SEEDS", "1")) * 4)


def fast(storm: Storm, kind: Kind) -> None:
    storm.run(20)
    os.sync()
    storm.run_fast(kind.steps)


def kind(name: str, *mkfs: str) -> Kind:
    return Kind(name, (*mkfs, "-O", "fast_commit"), steps=14, change=fast, stops=(NOLOGFLUSH,))


KINDS = (
    kind("4k", "-b", "4096"),
    kind("1k", "-b", "1024"),
    kind("no-csum", "-b", "4096", "-O", "^metadata_csum"),
    kind("inline", "-b", "2048", "-O", "inline_data"),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_tree_is_as_the_kernel_replays_it(tmp_path: Path, kind: Kind) -> None:
    """What would enlarge a directory is not replayed, and says so."""
    replayed = 0
    for seed in SEEDS:
        image = crash(tmp_path, kind, seed)
        device = FileDevice(image)
        recovery = recover(device)
        assert recovery is not None
        if "not replayed" in recovery.summary:
            continue
        replayed += "operations of fast commits" in recovery.summary
        found = describe_reader(ext.open_reader(device, recover=True), device)
        judged = tmp_path / "judged"
        shutil.copy(image, judged)
        with mounted(judged, "rw,noatime") as point:
            expected = describe(point)

        assert b"last" in expected
        assert timeless(expected) == timeless(found), seed
    assert replayed


def timeless(tree: dict[bytes, Any]) -> dict[bytes, Any]:
    """Return `tree` without the times of directories."""
    return {
        name: (mode, *rest[:6], rest[6] if not stat.S_ISDIR(mode) else None, *rest[7:])
        for name, (mode, *rest) in tree.items()
    }

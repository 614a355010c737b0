"""The replay of ext4's fast commits, compared with the kernel's name by name.

Evidence: seeded crash images (tests/support/crash.py). The kernel is made to mount for writing: mounting read-only, it
fails to replay what unlinks a name. It gives directories, and inodes whose links it counts, the time of the recovery;
those times are not compared.
"""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qcowfs.inside.jbd2 import recover
from qcowfs.inside.reader import Unreadable
from tests.oracle.test_jbd2 import log_of
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
        recovery = recover(FileDevice(image))
        assert recovery is not None
        if "not replayed" in recovery.summary:
            continue
        replayed += "operations of fast commits" in recovery.summary
        found = our_tree(image)
        judged = tmp_path / "judged"
        shutil.copy(image, judged)
        expected = kernels_tree(judged)

        assert expected is not None
        assert b"last" in expected
        assert expected == found, seed
    assert replayed


def test_damage_is_judged_as_the_kernel_judges_it(tmp_path: Path) -> None:
    """One byte at the start, in the middle or at the end of what the first two fast commits say."""
    image = crash(tmp_path, kind("damage", "-b", "1024"), 1)
    log, _ = log_of(image)
    judged = tmp_path / "judged"
    answers = set()
    for number in (0, 1):
        for offset in (0, 2, 4, 8, 12, 13, 14, 30, 200):
            shutil.copy(image, judged)
            with judged.open("r+b") as file:
                place = log.place(log.super.fast_first + number) * log.block_size + offset
                byte = os.pread(file.fileno(), 1, place)
                os.pwrite(file.fileno(), bytes([byte[0] ^ 4]), place)
            ours = our_tree(judged)
            answers.add(ours is None)

            assert kernels_tree(judged) == ours, (number, offset)
    assert answers == {True, False}


def our_tree(image: Path) -> dict[bytes, Any] | None:
    device = FileDevice(image)
    try:
        reader = ext.open_reader(device, recover=True)
    except Unreadable:
        return None
    assert "not replayed" not in reader.facts()["recovery"]
    return timeless(describe_reader(reader, device))


def kernels_tree(image: Path) -> dict[bytes, Any] | None:
    try:
        with mounted(image, "rw,noatime") as point:
            return timeless(describe(point))
    except subprocess.CalledProcessError:
        return None


def timeless(tree: dict[bytes, Any]) -> dict[bytes, Any]:
    """Return `tree` without the times of directories."""
    return {
        name: (mode, *rest[:6], rest[6] if not stat.S_ISDIR(mode) else None, *rest[7:])
        for name, (mode, *rest) in tree.items()
    }

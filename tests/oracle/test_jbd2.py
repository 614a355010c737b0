"""The recovery of ext3/ext4 journals, compared with e2fsck's block by block and with the kernel's name by name.

Evidence: seeded crash images (tests/support/crash.py). QCOWFS_CRASH_SEEDS says how many of each kind; the suite makes
one, and 72 images were compared by hand with 6.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from qcowfs.inside.client import Tree
from qcowfs.inside.extsuper import read_inode, read_super
from qcowfs.inside.jbd2 import recover
from qcowfs.inside.journal import Log
from qcowfs.inside.journalmap import JournalMap
from qcowfs.inside.launcher import Launcher
from tests.support import lacking, need
from tests.support.crash import FileDevice, Kind, crash, mounted
from tests.support.readertree import describe_reader
from tests.support.trees import describe

need("mkfs.ext4", "mount", "losetup", "e2fsck")
if os.geteuid() != 0:
    lacking("loop devices and mounts need root")

SEEDS = range(int(os.environ.get("QCOWFS_CRASH_SEEDS", "1")))
NO_CSUM = ("-O", "^metadata_csum,^64bit")
SMALL = ("-b", "1024", "-J", "size=1")
KINDS = (
    Kind("ext4", ("-b", "4096")),
    Kind("ext4-wrapped", SMALL, steps=2500),
    Kind("ext4-without-checksums", (*SMALL, *NO_CSUM), steps=2500),
    Kind("ext4-64bit-without-checksums", ("-b", "2048", "-O", "^metadata_csum,64bit"), steps=1000),
    Kind("ext3", ("-t", "ext3", "-b", "1024", "-J", "size=2"), steps=2500),
    Kind("ext3-4k", ("-t", "ext3", "-b", "4096"), steps=1000),
    Kind("data", ("-b", "4096"), "commit=600,data=journal"),
    Kind("data-wrapped", ("-b", "1024", "-J", "size=4"), "commit=600,data=journal", steps=1200),
    Kind("async-commit", ("-b", "1024"), "commit=600,journal_async_commit,data=writeback"),
    Kind("checksum-v1", ("-b", "1024", *NO_CSUM), "commit=600,journal_checksum"),
    Kind("inline-data", ("-b", "4096", "-O", "inline_data,metadata_csum_seed")),
    Kind("bigalloc", ("-b", "1024", "-O", "bigalloc", "-C", "16384")),
)


@pytest.fixture(scope="module", params=[(kind, seed) for kind in KINDS for seed in SEEDS], ids=lambda at: at[0].name)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return crash(tmp_path_factory.mktemp("crash"), *request.param)


def recovered(image: Path, directory: Path) -> tuple[Path, str]:
    """Return a copy of `image` with its overlay written out, and the summary."""
    device = FileDevice(image)
    recovery = recover(device)
    assert recovery is not None
    copy = directory / "ours"
    shutil.copy(image, copy)
    with copy.open("r+b") as file:
        place = 0
        for length, where in recovery.overlay.locate(0, device.size):
            if where != place:
                file.seek(place)
                file.write(where if isinstance(where, bytes) else device.read(where, length))
            place += length
    assert place == image.stat().st_size
    return copy, recovery.summary


def different_blocks(first: Path, second: Path, size: int) -> set[int]:
    with first.open("rb") as one, second.open("rb") as other:
        found, number = set(), 0
        while piece := one.read(size):
            if piece != other.read(size):
                found.add(number)
            number += 1
    return found


def log_of(image: Path) -> tuple[Log, int]:
    """Return the log of `image`, and the block that holds the file system's superblock."""
    device = FileDevice(image)
    superblock = read_super(device)
    assert superblock is not None
    inode = read_inode(device, superblock, superblock.journal_inode)
    journal = JournalMap(device, superblock.block_size, inode.flags, inode.block, inode.size)
    return Log(device, journal, superblock.block_size), 1024 // superblock.block_size


def test_every_block_is_as_e2fsck_recovers_it(image: Path, tmp_path: Path) -> None:
    ours, _ = recovered(image, tmp_path)
    judged = tmp_path / "judged"
    shutil.copy(image, judged)
    done = subprocess.run(["e2fsck", "-y", "-E", "journal_only", str(judged)], capture_output=True, text=True)
    log, superblock = log_of(image)
    # e2fsck marks both superblocks, the file system's and the journal's, when it is done.
    marked = {superblock, log.place(0)}

    assert "recovering journal" in done.stdout
    assert different_blocks(ours, judged, log.block_size) <= marked


def test_the_tree_is_as_the_kernel_recovers_it(image: Path, tmp_path: Path) -> None:
    ours, summary = recovered(image, tmp_path)
    judged = tmp_path / "judged"
    shutil.copy(image, judged)
    with mounted(judged, "ro,noatime") as point:
        expected = describe(point)
    with mounted(ours, "ro,noatime") as point:
        found = describe(point)

    assert summary.startswith("jbd2: ")
    assert len(expected) > 30
    assert expected == found


def test_a_worker_sees_the_tree_as_the_kernel_recovers_it(image: Path, tmp_path: Path) -> None:
    pytest.importorskip("qcowfs.inside.ext")
    device = FileDevice(image)
    launcher = Launcher()
    tree = Tree(launcher, "disk/p1", "ext4", device.size, device.read, True)
    try:
        facts = tree.facts()
        found = describe_reader(tree, device)
    finally:
        tree.close()
        launcher.close()
    judged = tmp_path / "judged"
    shutil.copy(image, judged)
    with mounted(judged, "ro,noatime") as point:
        expected = describe(point)

    assert facts["recovery"].startswith("jbd2: ")
    assert expected == found

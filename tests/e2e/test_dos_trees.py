"""The readers of FAT and exFAT against the kernel's drivers, in a virtual machine: this machine's kernel may lack them.

Evidence: seeded trees, written by the guest's kernel, deleted from and grown in pieces; QCOWFS_DOS_SEED is the seed. A
directory of 4,100 was compared by hand: in the virtual machine it takes a minute to make.
"""

from __future__ import annotations

import os
import random
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from qcowfs.inside.readers import open_reader
from tests.support import guesttree, need
from tests.support.crash import FileDevice
from tests.support.readertree import describe_reader
from tests.support.vm import Machine

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("dos trees")]

SEED = int(os.environ.get("QCOWFS_DOS_SEED", "1"))
NANO = 10**9


@dataclass(frozen=True)
class Kind:
    """How a file system is made; sizes are in bytes. `many` files are in one directory."""

    name: str
    kind: str
    mkfs: tuple[str, ...]
    size: int
    many: int


KINDS = (
    Kind("fat12", "vfat", ("mkfs.vfat", "-F", "12", "-s", "2", "-n", "VOLUME"), 3 << 20, 100),
    Kind("fat16", "vfat", ("mkfs.vfat", "-F", "16", "-s", "4", "-f", "1"), 32 << 20, 600),
    Kind("fat32", "vfat", ("mkfs.vfat", "-F", "32", "-s", "1", "-n", "VOLUME"), 48 << 20, 1200),
    Kind("fat32-4096", "vfat", ("mkfs.vfat", "-F", "32", "-S", "4096", "-s", "1"), 300 << 20, 100),
    Kind("exfat", "exfat", ("mkfs.exfat", "-L", "VOLUME"), 64 << 20, 1200),
    Kind("exfat-512", "exfat", ("mkfs.exfat", "-c", "512"), 48 << 20, 600),
)
# Files that grow by turns lie in pieces; others take the places of what is deleted.
GROW = "for i in $(seq 40); do for f in a b c; do head -c 5000 /dev/urandom >>/mnt/grown-$f; done; done"
MANY = "mkdir /mnt/many; cd /mnt/many; seq {many} | sed 's/.*/\"one of many files &.text\"/' | xargs touch"
DELETE = "cd /mnt/many && ls | awk 'NR % 3 == 0' | sed 's/.*/\"&\"/' | xargs rm; rm /mnt/large*1"
REUSE = "seq -w 20 | xargs touch; echo 1 >one; mkdir dir; echo 2 >'dir/a file in it'; : >/mnt/grown-a"


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of all images, as raw files, and of what the guest's kernel tells of them."""
    need("mkfs.vfat", "mkfs.exfat", "qemu-img")
    at = tmp_path_factory.mktemp("dos")
    raws = [at / f"{kind.name}.raw" for kind in KINDS]
    disks = []
    for kind, raw in zip(KINDS, raws, strict=True):
        rng = random.Random(f"{SEED} {kind.name}")
        raw.touch()
        os.truncate(raw, kind.size)
        subprocess.run([*kind.mkfs, str(raw)], check=True, capture_output=True)
        tree = at / f"{kind.name}-tree.tar"
        tree.write_bytes(guesttree.archive(guesttree.write_tree(rng, kind.size // 4), rng))
        disks += [guesttree.raw_to_qcow2(raw), guesttree.raw_to_qcow2(tree)]
    told = at / "told.raw"
    told.touch()
    os.truncate(told, 2 * len(KINDS) * guesttree.SLOT)
    disks.append(guesttree.raw_to_qcow2(told))
    with Machine(disks, directory=at) as machine:
        for number, kind in enumerate(KINDS):
            change(machine, kind, number, f"/dev/vd{chr(ord('a') + 2 * len(KINDS))}")
        machine.poweroff()
    for raw, disk in [*zip(raws, disks[::2], strict=False), (told, disks[-1])]:
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(disk), str(raw)], check=True)
    yield at
    for path in at.iterdir():
        path.unlink()


def change(machine: Machine, kind: Kind, number: int, answers: str) -> None:
    disk, tree = (f"/dev/vd{chr(ord('a') + 2 * number + at)}" for at in (0, 1))
    machine.run(f"mount -t {kind.kind} {disk} /mnt")
    machine.run(f"cd /mnt && tar xf {tree}", 300)
    for command in (GROW, MANY.format(many=kind.many), DELETE, f"cd /mnt/many; {REUSE}"):
        machine.run(command, 300)
    machine.run(f"umount /mnt && mount -t {kind.kind} -o ro,umask=022 {disk} /mnt")
    guesttree.told(machine, answers, number)
    machine.run("umount /mnt")


def as_told(found: dict[bytes, Any]) -> tuple[dict[bytes, guesttree.Told], dict[bytes, str]]:
    """Return what a reader says in the form in which the guest says it."""
    facts, hashes = {}, {}
    for name, (mode, _nlink, uid, gid, rdev, size, blocks, times, xattrs, content) in found.items():
        assert (0, 0, 0, {}) == (uid, gid, rdev, xattrs)
        mtime, ctime, atime = (time // NANO for time in times)
        facts[name] = (stat.S_IMODE(mode), size, blocks, atime, mtime, ctime)
        if stat.S_ISREG(mode):
            hashes[name] = content
    return facts, hashes


@pytest.mark.parametrize("number", range(len(KINDS)), ids=[kind.name for kind in KINDS])
def test_the_tree_is_as_the_kernel_shows_it(answers: Path, number: int) -> None:
    kind = KINDS[number]
    device = FileDevice(answers / f"{kind.name}.raw")
    expected_facts, expected_hashes = guesttree.read_told(answers / "told.raw", number)
    facts, hashes = as_told(describe_reader(open_reader(kind.kind, device, recover=True), device))

    assert len(expected_facts) > 200 + kind.many * 2 // 3
    if kind.kind == "exfat":  # its root has no times, and Linux says that it is now
        expected_facts[b""] = (*expected_facts[b""][:3], 0, 0, 0)
    assert expected_facts.keys() == facts.keys()
    assert expected_facts == facts
    assert expected_hashes == hashes


@pytest.mark.parametrize("number", range(len(KINDS)), ids=[kind.name for kind in KINDS])
def test_a_worker_sees_the_same_tree(answers: Path, number: int) -> None:
    kind = KINDS[number]
    device = FileDevice(answers / f"{kind.name}.raw")
    expected = describe_reader(open_reader(kind.kind, device, recover=True), device)
    launcher = Launcher()
    tree = Tree(launcher, "disk/p1", kind.kind, device.size, device.read, True)
    try:
        assert expected == describe_reader(tree, device)
    finally:
        tree.close()
        launcher.close()

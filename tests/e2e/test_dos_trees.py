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
from tests.support.forgefat import Fat, Memory
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
    facts, hashes = as_told(describe_reader(open_reader(kind.kind, device, recover=True), device, sha256=True))

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
    expected = describe_reader(open_reader(kind.kind, device, recover=True), device, sha256=True)
    launcher = Launcher()
    tree = Tree(launcher, "disk/p1", kind.kind, device.size, device.read, True)
    try:
        assert expected == describe_reader(tree, device, sha256=True)
    finally:
        tree.close()
        launcher.close()


# What stands in an entry instead of the short name, the attributes and the case that its long name belongs to.
ENTRIES = (
    b"OTHER   TXT\x20\x08",
    b"OTHEX   TXT\x20\x10",
    b"OTH        \x20\x18",
    b"\x05\x8e\x99     TXT\x20\x18",
    b"\x82\x80\xe2\xe8 B  T  \x20\x18",
    b"\x82\x80\xe2\xe8\xea   T\xa5 \x20\x10",
    b"   LEAD TXT\x20\x00",
    b"        EXT\x20\x00",
    b"A\0B     TXT\x20\x00",
    b"A\x01B     TXT\x20\x00",
    b"A       T T\x20\x00",
    b"VOLUME     \x28\x00",
    b"DEV     X  \x40\x00",
    b"RO      X  \x03\x00",
)
# How far before a file's own entry one has another first byte, and which.
PARTS = ((32, 0x03), (64, 0x42), (96, 0xE5), (32, 0xE5), (96, 0x44), (32, 0x00), (64, 0x00))


def forged(bits: int) -> Fat:
    """Return a FAT with names that do not fit their files, and with files behind the mark of a directory's end."""
    names = [f"name {number} long enough for three entries" for number in range(len(ENTRIES) + len(PARTS))]
    tree = {name: name.encode() for name in names}
    image = Fat(bits, tree | {"dir": {"in": b"1", "end": b"2", "behind": b"3"}, "日" * 80: b"longest"})
    changes = [(image.entries[name], entry) for name, entry in zip(names, ENTRIES, strict=False)]
    for name, (before, byte) in zip(names[len(ENTRIES) :], PARTS, strict=True):
        changes.append((image.entries[name] - before, bytes([byte])))
    for place, stored in [*changes, (image.entries["dir/end"], b"\0")]:
        image.data[place : place + len(stored)] = stored
    return image


def test_what_no_driver_writes_is_as_the_kernel_shows_it(tmp_path: Path) -> None:
    images = [forged(bits) for bits in (12, 16, 32)]
    disks = []
    for number, image in enumerate(images):
        raw = tmp_path / f"{number}.raw"
        raw.write_bytes(image.data)
        disks.append(guesttree.raw_to_qcow2(raw))
    told = tmp_path / "told.raw"
    told.touch()
    os.truncate(told, 2 * len(images) * guesttree.SLOT)
    disks.append(guesttree.raw_to_qcow2(told))
    with Machine(disks, directory=tmp_path) as machine:
        for number, letter in enumerate("abc"):
            machine.run(f"mount -t vfat -o ro,umask=022 /dev/vd{letter} /mnt")
            guesttree.told(machine, "/dev/vdd", number)
            machine.run("umount /mnt")
        machine.poweroff()
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(disks[-1]), str(told)], check=True)

    for number, image in enumerate(images):
        device = Memory(image.data)
        expected = guesttree.read_told(told, number)
        assert len(expected[0]) > 20
        assert expected == as_told(describe_reader(open_reader("vfat", device, recover=True), device, sha256=True))

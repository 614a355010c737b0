"""What is inside the disks of a qcow2 image, at each of its points: read through the layers, made by real tools."""

from __future__ import annotations

import random
from pathlib import Path

from qcowfs._cache import Cache
from qcowfs.chain import open_chain
from qcowfs.gate import Policy
from qcowfs.inside.contents import VolumeBytes, look
from qcowfs.snapshot import open_disk, points
from tests.support import need
from tests.support.disks import run
from tests.support.images import qemu

MIB = 1 << 20


def disk_of_three(directory: Path) -> Path:
    """Return a raw disk with an ESP, an ext4 and swap, each with random bytes after its superblocks."""
    disk = directory / "disk.raw"
    with open(disk, "wb") as file:
        file.truncate(128 * MIB)
    table = "label: gpt\nsize=40M, type=U, name=ESP\nsize=60M, name=root\nsize=8M, type=S\n"
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk, text=table)
    tools = {1: ("mkfs.vfat", "-F", "32", "-n", "ESP"), 41: ("mkfs.ext4", "-q", "-L", "root"), 101: ("mkswap",)}
    for start, words in tools.items():
        part = directory / "part"
        with open(part, "wb") as file:
            file.truncate({1: 40, 41: 60, 101: 8}[start] * MIB)
        run(*words, part)
        with open(disk, "r+b") as file:
            file.seek(start * MIB)
            file.write(part.read_bytes())
        part.unlink()
    return disk


def test_each_point_has_its_own_volumes(tmp_path: Path) -> None:
    """A snapshot of three partitions, after which the disk became one file system."""
    need("qemu-img", "sfdisk", "mkfs.vfat", "mkfs.ext4", "mkswap")
    raw, image, later = disk_of_three(tmp_path), tmp_path / "disk.qcow2", tmp_path / "later.raw"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    qemu("qemu-img", "snapshot", "-c", "three", image)
    with open(later, "wb") as file:
        file.truncate(128 * MIB)
    run("mkfs.ext4", "-q", "-L", "later", later)
    with open(later, "r+b") as file:
        file.seek(127 * MIB)
        file.write(random.Random(1).randbytes(MIB))
    qemu("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", later, image)

    with open_chain(str(image), Policy()) as chain:
        disks = {point.kind: open_disk(chain, point, Cache(1 << 20)) for point in points(chain)}
        before, after = look([disks["snapshot"]]), look([disks["active"]])
        data = [VolumeBytes(item.volume, [disks["snapshot"]]).read(0, 1 << 40) for item in before.items]
        whole = VolumeBytes(after.items[0].volume, [disks["active"]]).read(0, 1 << 40)

    seen = [(item.volume.name, item.volume.label, item.filesystem) for item in before.items]
    assert [
        (b"p1", "ESP", "vfat", "ESP", ""),
        (b"p2", "root", "ext4", "root", ""),
        (b"p3", "", "swap", "", "it is swap space"),
    ] == [(name, label, one.kind, one.label, one.trouble) for name, label, one in seen if one is not None]
    assert [("later", 128 * MIB)] == [(one.filesystem.label, one.volume.size) for one in after.items if one.filesystem]
    assert ([], []) == (before.notes, after.notes)
    partitioned = raw.read_bytes()
    assert [partitioned[start * MIB : end * MIB] for start, end in ((1, 41), (41, 101), (101, 109))] == data
    assert later.read_bytes() == whole

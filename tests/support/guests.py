"""Disk images with files inside, made with the kernel's own file system, and what the kernel says of them."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import need
from tests.support.disks import run
from tests.support.images import qemu
from tests.support.lvm import lvm_on
from tests.support.trees import describe

__all__ = ["Guest", "bare_image", "describe_image", "loop_mounted", "make_tree", "partitioned_image", "volume_group"]

MIB = 1 << 20
Guest = dict[bytes, Any]  # of tests.support.trees


@contextmanager
def loop_mounted(image: Path, options: str = "ro") -> Iterator[Path]:
    """Mount a raw image for the time of the context."""
    need("mount", "losetup")
    at = image.with_name(f"{image.name}.at")
    at.mkdir()
    try:
        run("mount", "-o", f"{options},loop", image, at)
        try:
            yield at
        finally:
            run("umount", at)
    finally:
        at.rmdir()


def make_tree(image: Path, size: int, fill: Callable[[Path], None], *words: str) -> Guest:
    """Make an ext file system in a raw image, let `fill` write into it, and return what the kernel shows of it then."""
    need("mke2fs")
    with open(image, "wb") as file:
        file.truncate(size)
    run("mke2fs", "-q", "-F", *(words or ("-t", "ext4")), image)
    with loop_mounted(image, "rw") as at:
        fill(at)
    return describe_image(image)


def describe_image(image: Path) -> Guest:
    """Return what the kernel shows of a raw image."""
    with loop_mounted(image) as at:
        return describe(at)


def everything(root: Path) -> None:
    """Write one of each thing that a file system of Linux can hold, and what is awkward about names and places."""
    for path in ("etc/apt", "var/log", "deep/" + "/".join("abcdefgh" * 4), "many"):
        (root / path).mkdir(parents=True)
    (root / "etc/fstab").write_bytes(b"UUID=1 / ext4 defaults 0 1\n")
    for number in range(700):
        (root / "many" / f"file {number}").write_bytes(bytes([number % 256]) * number)
    with (root / "sparse").open("wb") as file:
        file.write(b"begin")
        file.seek(5 * MIB + 1)
        file.write(os.urandom(100_001))
    (root / "large").write_bytes(os.urandom(3 * MIB + 17))
    _links_and_names(root)
    os.mknod(root / "chr", stat.S_IFCHR | 0o600, os.makedev(5, 70000))
    os.mknod(root / "blk", stat.S_IFBLK | 0o660, os.makedev(8, 1))
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(root / "socket"))
    os.chown(root / "etc/apt", 70000, 4_000_000_000)
    os.chmod(root / "large", 0o4751)
    os.utime(root / "large", ns=(-1_500_000_001, 2_900_000_000_123_456_789))


def _links_and_names(root: Path) -> None:
    links = {
        "absolute": "/etc/fstab",
        "relative": "etc/../etc/fstab",
        "above": "../../../etc/fstab",
        "var/run": "/etc",
        "var/log/up": "../../etc/",
        "chain": "absolute",
        "loop": "loop",
        "dangling": "nowhere",
        "long": "t" * 900,
    }
    for name, target in links.items():
        (root / name).symlink_to(target)
    os.symlink(b"\xff\n", os.fsencode(root) + b"/raw target")
    for name in (b"\xff\xfe", b"new\nline", b"back\\slash", "ünïcode".encode(), b"n" * 255, b"\x1b[31mred", b"a:b"):
        with open(os.fsencode(root) + b"/" + name, "wb") as file:
            file.write(name)
    (root / "etc/second").hardlink_to(root / "etc/fstab")


def later(root: Path) -> None:
    """Write what a file system became that had held `everything`."""
    (root / "etc").mkdir()
    (root / "etc/fstab").write_bytes(b"# changed\n")


def bare_image(directory: Path, image: Path) -> tuple[Guest, Guest]:
    """Make a qcow2 image that is one file system; return what is in its snapshot "before", and what in it now."""
    before, now = directory / "before.raw", directory / "now.raw"
    guests = make_tree(before, 48 * MIB, everything), make_tree(now, 48 * MIB, later)
    _converted(before, now, image)
    return guests


def partitioned_image(directory: Path, image: Path) -> tuple[dict[str, Guest], dict[str, Guest], dict[str, Path]]:
    """Make a qcow2 image with a GPT, p1 and p2; return what was in them at the snapshot "before", and what is now.

    Returns:
        The same as `bare_image` for each partition, and the partitions of the snapshot as raw files.
    """
    need("sfdisk")
    words = {"p1": ("-t", "ext2", "-b", "1024"), "p2": ("-t", "ext4")}
    disks, told = [], []
    for name, first, second in (("before", later, everything), ("now", later, later)):
        parts = {part: directory / f"{name}-{part}" for part in words}
        fills = {"p1": first, "p2": second}
        told.append({part: make_tree(parts[part], 40 * MIB, fills[part], *words[part]) for part in words})
        disks.append(_joined(directory / f"{name}-disk", parts))
    _converted(*disks, image)
    return told[0], told[1], {part: directory / f"before-{part}" for part in words}


def _joined(disk: Path, parts: dict[str, Path]) -> Path:
    with open(disk, "wb") as file:
        file.truncate(84 * MIB)
    table = "label: gpt\nstart=1MiB, size=40MiB\nstart=42MiB, size=40MiB\n"
    run("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel", disk, text=table)
    with open(disk, "r+b") as file:
        for part, start in zip(parts.values(), (1, 42), strict=True):
            file.seek(start * MIB)
            file.write(part.read_bytes())
    return disk


def _converted(before: Path, now: Path, image: Path) -> None:
    need("qemu-img")
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", before, image)
    qemu("qemu-img", "snapshot", "-c", "before", image)
    qemu("qemu-img", "convert", "-n", "-f", "raw", "-O", "qcow2", now, image)


def volume_group(directory: Path) -> tuple[Guest, list[Path]]:
    """Return what is in the logical volume vg-lv, and the images of its two disks: it is whole at "both" only."""
    file_system = directory / "lv"
    guest = make_tree(file_system, 40 << 20, lambda root: (root / "large").write_bytes(os.urandom(30 << 20)))
    disks = [directory / f"disk{number}" for number in range(2)]
    for disk in disks:
        with open(disk, "wb") as file:
            file.truncate(32 << 20)
    with lvm_on(disks, directory) as lvm:
        lvm("pvcreate", "-q", *lvm.devices)
        lvm("vgcreate", "-q", "-s", "1m", "vg", *lvm.devices)
        lvm.create("vg", "lv", "-L", "40m")
        physical = lvm.physical()
        for one in lvm.segments():
            device, first = one["seg_pe_ranges"].partition("-")[0].split(":")
            start = int(physical[device]["pe_start"]) + (int(first) << 20)
            data = file_system.read_bytes()[int(one["seg_start"]) :][: int(one["seg_size"])]
            with open(disks[lvm.devices.index(device)], "r+b") as file:
                file.seek(start)
                file.write(data)
    images = [disk.with_suffix(".qcow2") for disk in disks]
    for disk, image in zip(disks, images, strict=True):
        qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, image)
        qemu("qemu-img", "snapshot", "-c", "both", image)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 32M", images[1])
    return guest, images

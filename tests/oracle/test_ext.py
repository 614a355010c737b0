"""The reader of ext against the kernel's mount of the same bytes."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
from contextlib import closing
from pathlib import Path

import pytest

from qcowfs.errors import TreeFault
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from qcowfs.inside.reader import INLINE
from qcowfs.inside.record import ENTRY, EXTENT, INODE, UNMAPPED, Inode
from tests.support import need

ext = pytest.importorskip("qcowfs.inside.ext")

KINDS = {
    "ext2": ["-t", "ext2"],
    "ext3-1k": ["-t", "ext3", "-b", "1024"],
    "ext4": ["-t", "ext4"],
    "ext4-128": ["-t", "ext4", "-I", "128"],
    "inline": ["-t", "ext4", "-O", "inline_data"],
    "inline-1k": ["-t", "ext4", "-O", "inline_data", "-I", "1024"],
    "bigalloc": ["-t", "ext4", "-O", "bigalloc"],
    "meta_bg-1k": ["-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode,64bit,metadata_csum"],
    "ea_inode": ["-t", "ext4", "-O", "ea_inode,large_dir"],
    "fast_commit": ["-t", "ext4", "-O", "fast_commit"],
}


class File:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.size = path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        with self._path.open("rb") as file:
            return os.pread(file.fileno(), length, offset)


def confined(launcher: Launcher, device: File) -> Tree:
    """Return the tree on `device` as a worker without privileges reads it."""
    return Tree(launcher, "disk/p1", "ext4", device.size, device.read, True)


def populate(root: Path) -> None:
    (root / "dir").mkdir()
    for number in range(300):
        (root / "dir" / f"file {number}").write_bytes(bytes([number % 256]) * number * 7)
    (root / "sparse").touch()
    with (root / "sparse").open("r+b") as file:
        file.seek(5 << 20)
        file.write(os.urandom(100_000))
    (root / "fast").symlink_to("target")
    (root / "slow").symlink_to("t" * 700)
    os.mknod(root / "node", stat.S_IFCHR | 0o600, os.makedev(300, 70000))
    os.chown(root / "dir" / "file 7", 70000, 4_000_000_000)
    os.utime(root / "dir" / "file 8", ns=(-1_500_000_001, 1_900_000_000_123_456_789))
    os.setxattr(root / "dir" / "file 9", "user.some", b"value")
    os.setxattr(root / "dir" / "file 9", "user.empty", b"")
    os.setxattr(root / "dir" / "file 9", "trusted.some", b"t" * 300)
    subprocess.run(["setfacl", "-m", "u:70001:rw,g:5:r", root / "dir" / "file 10"], check=True)
    subprocess.run(["setfacl", "-d", "-m", "u:70001:rw", root / "dir"], check=True)


def content(reader, device: File, ino: int, size: int) -> bytes:
    data = bytearray(size)
    found = reader.extents(ino, 0, 1 << 20)
    for start, length, offset in found.extents:
        stored = found.inline[:length] if offset >= INLINE else device.read(offset, length)
        data[start : start + length] = stored
    return bytes(data)


def names_of(reader, ino: int):
    cookie = 0
    while page := reader.entries(ino, cookie, 4096):
        at = 0
        while at < len(page):
            cookie, length, extents, size = ENTRY.unpack_from(page, at)
            inode = at + ENTRY.size
            name = inode + INODE.size + (0 if extents == UNMAPPED else extents * EXTENT.size)
            yield page[name : name + length], page[inode : inode + INODE.size]
            at += size


def compare(reader, device: File, path: Path, ino: int) -> int:
    told, real = Inode(*INODE.unpack(reader.stat(ino))), path.lstat()
    assert (real.st_mode, real.st_nlink, real.st_uid, real.st_gid, real.st_rdev) == told[9:10] + told[10:14]
    assert (real.st_size, real.st_blocks) == (told.size, told.blocks)
    assert real.st_mtime_ns == told.mtime * 10**9 + told.mtime_ns
    names = os.listxattr(path, follow_symlinks=False)
    assert {os.fsencode(n): os.getxattr(path, n, follow_symlinks=False) for n in names} == reader.xattrs(ino)
    if path.is_symlink():
        assert os.readlink(os.fsencode(path)) == reader.readlink(ino)
    elif path.is_file():
        assert path.read_bytes() == content(reader, device, ino, told.size)
    elif path.is_dir():
        listed = dict(names_of(reader, ino))
        assert {os.fsencode(p.name) for p in path.iterdir()} == listed.keys()
        assert all(reader.stat(reader.lookup(ino, name)) == inode for name, inode in listed.items())
        return 1 + sum(compare(reader, device, p, reader.lookup(ino, os.fsencode(p.name))) for p in path.iterdir())
    return 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_is_as_the_kernel_shows_it(tmp_path: Path, kind: str) -> None:
    need("mke2fs", "mount", "setfacl")
    image, at = tmp_path / "image", tmp_path / "mnt"
    at.mkdir()
    image.touch()
    os.truncate(image, 48 << 20)
    subprocess.run(["mke2fs", "-q", "-F", *KINDS[kind], image], check=True)
    subprocess.run(["mount", "-o", "loop", image, at], check=True)
    try:
        populate(at)
    finally:
        subprocess.run(["umount", at], check=True)
    subprocess.run(["mount", "-o", "ro,loop", image, at], check=True)
    try:
        device = File(image)
        assert compare(ext.open_reader(device, recover=True), device, at, 2) > 300
    finally:
        subprocess.run(["umount", at], check=True)


def damage_inode(image: Path, path: str) -> None:
    """Change a time of the inode at `path`, and leave its checksum."""
    told = subprocess.run(["debugfs", "-R", f"imap {path}", image], check=True, capture_output=True, text=True).stdout
    block, offset = re.findall(r"block (\d+), offset (0x[0-9a-f]+)", told)[0]
    with image.open("r+b") as file:
        file.seek(int(block) * 1024 + int(offset, 16) + 16)
        file.write(b"\xff\xff\xff\x7e")


def test_an_unreadable_inode_spoils_no_other_entry(tmp_path: Path) -> None:
    need("mke2fs", "debugfs")
    tree, image = tmp_path / "tree", tmp_path / "image"
    (tree / "broken-directory").mkdir(parents=True)
    for number in range(5):
        (tree / f"file{number}").write_bytes(b"x" * number)
    (tree / "broken-link").symlink_to("file1")
    options = ["-t", "ext4", "-b", "1024", "-O", "metadata_csum", "-d", tree]
    subprocess.run(["mke2fs", "-q", "-F", *options, image, "4M"], check=True)
    broken = {b"broken-directory": stat.S_IFDIR, b"broken-link": stat.S_IFLNK, b"file3": stat.S_IFREG}
    for name in broken:
        damage_inode(image, name.decode())

    with closing(Launcher()) as launcher, closing(confined(launcher, File(image))) as reader:
        found = {name: Inode(*INODE.unpack(inode)) for name, inode in names_of(reader, reader.root)}

        assert {b"lost+found", b"file0", b"file1", b"file2", b"file4"} | broken.keys() == found.keys()
        assert dict.fromkeys(broken, errno.EIO) == {name: at.error for name, at in found.items() if at.error}
        assert broken == {name: stat.S_IFMT(found[name].mode) for name in broken}
        for name in broken:
            ino = reader.lookup(reader.root, name)
            assert found[name].ino == ino
            with pytest.raises(TreeFault, match=f"inode {ino}.*checksum") as fault:
                reader.stat(ino)
            assert errno.EIO == fault.value.errno

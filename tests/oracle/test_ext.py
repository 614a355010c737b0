"""The reader of ext against the kernel's mount of the same bytes."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qcowfs.errors import TreeFault
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from tests.support import need
from tests.support.crash import FileDevice, mounted
from tests.support.readertree import describe_reader, entries_of
from tests.support.torture import plant
from tests.support.trees import describe

pytest.importorskip("qcowfs.inside.ext")

CSUM = "metadata_csum,64bit"
KINDS = {
    "ext2": ["-t", "ext2"],
    "ext2-1k": ["-t", "ext2", "-b", "1024"],
    "ext3": ["-t", "ext3", "-b", "4096"],
    "ext3-1k": ["-t", "ext3", "-b", "1024"],
    "ext4": ["-t", "ext4"],
    "ext4-1k": ["-t", "ext4", "-b", "1024"],
    "ext4-2k": ["-t", "ext4", "-b", "2048"],
    "ext4-128": ["-t", "ext4", "-I", "128", "-O", "^extent,^64bit"],
    "inline": ["-t", "ext4", "-O", "inline_data"],
    "inline-1k": ["-t", "ext4", "-O", "inline_data", "-I", "1024"],
    "bigalloc": ["-t", "ext4", "-O", "bigalloc"],
    "bigalloc-1k": ["-t", "ext4", "-b", "1024", "-O", "bigalloc", "-C", "8192"],
    "meta_bg-1k": ["-t", "ext4", "-b", "1024", "-O", f"meta_bg,^resize_inode,{CSUM},metadata_csum_seed"],
    "ea_inode": ["-t", "ext4", "-O", "ea_inode,large_dir"],
    "fast_commit": ["-t", "ext4", "-O", "fast_commit"],
    "orphan_file": ["-t", "ext4", "-O", "orphan_file"],
    "flags": ["-t", "ext4", "-O", "encrypt,stable_inodes,mmp"],
    "uninit_bg": ["-t", "ext4", "-O", "uninit_bg,^metadata_csum"],
    "sparse_super2": ["-t", "ext4", "-O", "sparse_super2,^resize_inode"],
    "no-flex_bg": ["-t", "ext4", "-O", "^flex_bg,^64bit"],
    "no-dir_index": ["-t", "ext4", "-O", "^dir_index,^filetype"],
}


@contextmanager
def tree_of(image: Path) -> Iterator[Tree]:
    """Yield the tree of `image` as a worker without privileges reads it."""
    device = FileDevice(image)
    with closing(Launcher()) as launcher, closing(Tree(launcher, "p1", "ext4", device.size, device.read, True)) as tree:
        yield tree


def make(image: Path, options: Sequence[str], size: int = 96 << 20) -> None:
    journal = [] if options[:2] == ["-t", "ext2"] else ["-J", "size=4"]
    image.touch()
    os.truncate(image, size)
    command = ["mke2fs", "-q", "-F", "-N", "8192", *options, *journal, "-E", "lazy_itable_init=0,nodiscard", image]
    subprocess.run(command, check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tree_is_as_the_kernel_shows_it(tmp_path: Path, kind: str) -> None:
    need("mke2fs", "mount")
    image = tmp_path / "image"
    make(image, KINDS[kind])
    with mounted(image) as point:
        plant(point, 1, big=(64 if kind == "ext4" else 4) << 20)
    with mounted(image, "ro,noatime") as point:
        expected = describe(point)

    with tree_of(image) as tree:
        found = describe_reader(tree, FileDevice(image))

    assert len(expected) > 3500
    assert expected.keys() == found.keys()
    assert {} == {name: (value, found[name]) for name, value in expected.items() if value != found[name]}


def test_features_that_this_kernel_lacks_hide_nothing(tmp_path: Path) -> None:
    """Linux without Unicode or fs-verity refuses these; what they mean for other files changes nothing of these."""
    need("mke2fs", "mount", "debugfs")
    image = tmp_path / "image"
    make(image, KINDS["ext4"])
    with mounted(image) as point:
        plant(point, 2, big=1 << 20, names=100)
    with mounted(image, "ro,noatime") as point:
        expected = describe(point)
    for command in ("feature casefold verity", "ssv encoding 1", "ssv min_extra_isize 0"):
        subprocess.run(["debugfs", "-w", "-R", command, image], check=True, capture_output=True)

    with tree_of(image) as tree:
        assert expected == describe_reader(tree, FileDevice(image))


def test_inodes_that_say_little_of_themselves_are_as_the_kernel_shows_them(tmp_path: Path) -> None:
    """Those that say nothing of their longer part have times in it all the same, and no attributes."""
    need("mke2fs", "mount", "debugfs")
    image = tmp_path / "image"
    make(image, KINDS["ext4"])
    with mounted(image) as point:
        plant(point, 4, big=1 << 20, names=100)
    for path in ("owners/file5", "owners/directory6", "attributes/value40", "kinds/large-chr", "names/link59"):
        command = ["debugfs", "-w", "-R", f"sif /{path} extra_isize 0", image]
        subprocess.run(command, check=True, capture_output=True)
    with mounted(image, "ro,noatime") as point:
        expected = describe(point)

    with tree_of(image) as tree:
        assert expected == describe_reader(tree, FileDevice(image))


@pytest.mark.parametrize("size", [8192, 16384, 65536])
def test_blocks_larger_than_a_page_are_read(tmp_path: Path, size: int) -> None:
    """The kernel mounts none of them on most machines: what mke2fs copied is compared with what it copied from."""
    need("mke2fs")
    source, image = tmp_path / "source", tmp_path / "image"
    source.mkdir()
    plant(source, 3, big=1 << 20, names=3000)
    for name in ("sparse", "fragments", "sizes/grown"):
        os.truncate(source / name, 1 << 20)  # mke2fs copies holes byte by byte
    options = ["-t", "ext4", "-b", str(size), "-O", "^has_journal", "-N", "8192", "-d", source]
    subprocess.run(["mke2fs", "-q", "-F", *options, image, "256M"], check=True, stderr=subprocess.DEVNULL)

    with tree_of(image) as tree:
        found = describe_reader(tree, FileDevice(image))

    expected = {name: kept_by_mke2fs(told) for name, told in describe(source).items()}
    del expected[b""], found[b""], found[b"lost+found"]  # the second changes the time of the first
    assert expected == {name: kept_by_mke2fs(told) for name, told in found.items()}


def kept_by_mke2fs(told: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what mke2fs copies: of times 32 bits of the mtime, and neither links nor sizes of directories."""
    mode, nlink, uid, gid, rdev, size, _blocks, times, xattrs, content = told
    if stat.S_ISDIR(mode):
        nlink = size = 0
    return mode, nlink, uid, gid, rdev, size, times[0] // 10**9 % 2**32, xattrs, content


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

    with tree_of(image) as reader:
        found = {name: inode for name, inode, _extents in entries_of(reader, reader.root)}

        assert {b"lost+found", b"file0", b"file1", b"file2", b"file4"} | broken.keys() == found.keys()
        assert dict.fromkeys(broken, errno.EIO) == {name: at.error for name, at in found.items() if at.error}
        assert broken == {name: stat.S_IFMT(found[name].mode) for name in broken}
        for name in broken:
            ino = reader.lookup(reader.root, name)
            assert found[name].ino == ino
            with pytest.raises(TreeFault, match=f"inode {ino}.*checksum") as fault:
                reader.stat(ino)
            assert errno.EIO == fault.value.errno

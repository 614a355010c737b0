"""Paths in a tree against the kernel's, which is told to take the tree's root for "/" (openat2, RESOLVE_IN_ROOT)."""

from __future__ import annotations

import ctypes
import os
import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowfs.errors import TreeFault
from qcowfs.inside.contents import Item
from qcowfs.inside.filesystems import Filesystem
from qcowfs.inside.trees import Trees
from qcowfs.inside.volume import Volume
from qcowfs.inside.walk import File, root_of
from tests.support.guests import loop_mounted, make_tree
from tests.support.volumes import mapped_file

SYS_OPENAT2 = 437
RESOLVE_IN_ROOT = 0x10
LIBC = ctypes.CDLL(None, use_errno=True)
NAMES = ["a", "b", "c", "d"]


def kernel(root: int, path: str, *, follow: bool) -> int:
    """Return the inode number, or minus the errno, that the kernel finds at `path` below the descriptor `root`."""
    flags = os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    how = struct.pack("<QQQ", flags, 0, RESOLVE_IN_ROOT)
    descriptor = LIBC.syscall(SYS_OPENAT2, root, path.encode(), how, len(how))
    if descriptor < 0:
        return -ctypes.get_errno()
    try:
        return os.fstat(descriptor).st_ino
    finally:
        os.close(descriptor)


def ours(root: File, path: str, *, follow: bool) -> int:
    try:
        return root.resolve(path.encode(), follow=follow).inode.ino
    except TreeFault as fault:
        return -fault.errno


def random_path(dice: random.Random, longest: int) -> str:
    words = [dice.choice([*NAMES, *NAMES, "..", ".", "x"]) for _ in range(dice.randrange(1, longest))]
    return (
        dice.choice(["", "", "/", "//"]) + dice.choice(["/", "/", "//"]).join(words) + dice.choice(["", "", "/", "/."])
    )


def fill(root: Path, dice: random.Random) -> None:
    directories = [root]
    for _ in range(60):
        path = dice.choice(directories) / dice.choice(NAMES)
        if os.path.lexists(path):
            continue
        kind = dice.choice(["directory", "directory", "file", "link", "link"])
        if kind == "directory":
            path.mkdir()
            directories.append(path)
        elif kind == "file":
            path.touch()
        else:
            path.symlink_to(random_path(dice, 4))
    last = "/"
    for number in range(45):  # more than Linux follows in one path
        (root / f"chain{number}").symlink_to(last)
        last = f"chain{number}"


@contextmanager
def tree_of(image: Path) -> Iterator[File]:
    volume = Volume(name=b"", kind="disk", segments=(), size=image.stat().st_size)
    with mapped_file(image) as mapped, Trees(recover=True) as trees:
        yield root_of(trees.tree("disk", Item(volume, Filesystem(kind="ext4")), mapped), mapped)


@pytest.mark.parametrize("seed", range(4))
def test_a_path_means_what_it_means_to_the_kernel(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    image = tmp_path / "image"
    make_tree(image, 16 << 20, lambda root: fill(root, dice))
    paths = [random_path(dice, 7) for _ in range(500)] + [
        f"chain{n}{end}" for n in range(45) for end in ("", "/", "/a")
    ]

    with loop_mounted(image) as at, tree_of(image) as root:
        descriptor = os.open(at, os.O_RDONLY)
        try:
            cases = [(path, follow) for path in paths for follow in (True, False)]
            found = {(path, follow): ours(root, path, follow=follow) for path, follow in cases}
            assert {(path, follow): kernel(descriptor, path, follow=follow) for path, follow in cases} == found
        finally:
            os.close(descriptor)

    assert len([ino for ino in found.values() if ino > 2]) > 100
    assert len({ino for ino in found.values() if ino < 0}) == 3  # ENOENT, ENOTDIR, ELOOP

"""Damaged ext through the whole client: a confined worker reads it, and what it says is checked before it is believed.

Only bytes are damaged that the reader looks at: the superblock, groups, inodes, directories, maps, attributes, the
journal. Whatever becomes of them, a tree ends in time, with answers or with an error of one name; an honest worker is
never taken for one that was taken over.
"""

from __future__ import annotations

import os
import random
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qcowfs.errors import TreeFault
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from qcowfs.inside.reader import INLINE
from qcowfs.inside.record import ENTRY, INODE, Inode
from tests.support import need
from tests.support.forgejournal import BLOCK, Journal, make_file_system

ext = pytest.importorskip("qcowfs.inside.ext")
need("mkfs.ext4", "debugfs")
pytestmark = pytest.mark.timeout(120)

NAMES = 34  # of the image
MUTATIONS = 560  # of each kind: with those that are read in this process, more than 2,000 of the family
SECONDS = 10  # that one tree may take
ENOUGH = 5000  # names that one tree may list: a directory that was damaged may be found in itself, but once
KINDS = {
    "ext4": ("-t", "ext4", "-O", "inline_data,^metadata_csum"),
    "ext3": ("-t", "ext3"),
    "journal": ("-t", "ext4", "-O", "^metadata_csum"),
}


class Watched:
    """A Device over bytes, that notes what is read of them while `ranges` is a list."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.ranges: list[tuple[int, int]] = []

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(5, "a read past the end of the volume")
        self.ranges.append((offset, length))
        return self.content[offset : offset + length]


def fill(tree: Path) -> None:
    for number in range(12):
        directory = tree / f"dir{number % 3}" / "deeper"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"file{number}").write_bytes(os.urandom(number * 370))
    for number in range(12):
        (tree / f"name{number}-{'x' * number * 20}").touch()
    (tree / "fast").symlink_to("target")
    (tree / "slow").symlink_to("t" * 300)
    with (tree / "sparse").open("wb") as file:  # more extents than an inode has room for
        for number in range(10):
            file.seek(number * 5000)
            file.write(b"x")


@pytest.fixture(scope="module", params=KINDS)
def image(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return a small file system with some of everything; one has its metadata in the journal."""
    directory = tmp_path_factory.mktemp("damage")
    tree = directory / "tree"
    tree.mkdir()
    fill(tree)
    path = make_file_system(directory / "image", *KINDS[request.param], "-d", str(tree))
    commands = "".join(f"ea_set /dir1/deeper/file{n} user.name{n} {'v' * n}\n" for n in range(1, 12, 3))
    subprocess.run(["debugfs", "-w", "-f", "-", path], input=commands, text=True, check=True, capture_output=True)
    if request.param == "journal":
        content = path.read_bytes()
        journal = Journal()
        blocks = sorted({offset // BLOCK for offset, length in looked_at(content) if offset >= 2 * BLOCK})
        for at in range(0, len(blocks), 40):
            journal.descriptor([(block, content[block * BLOCK :][:BLOCK]) for block in blocks[at : at + 40]])
            journal.commit()
        journal.write(path)
    return path.read_bytes()


def looked_at(content: bytes) -> list[tuple[int, int]]:
    """Return the places (offset and length) that a reader looks at to tell everything but the bytes of files."""
    device = Watched(content)
    reader = ext.open_reader(device, recover=True)
    assert len(walk(reader)) == NAMES
    return sorted(set(device.ranges))


def walk(tree: Tree | ext.ExtReader, fault: type[Exception] = OSError) -> dict[int, int]:
    """Ask for everything that a tree tells; return how often each inode was named."""
    seen: dict[int, int] = {}
    left = [tree.root]
    while left:
        for inode in entries(tree, left.pop(), fault):
            assert sum(seen.values()) < ENOUGH
            seen[inode.ino] = seen.get(inode.ino, 0) + 1
            if seen[inode.ino] == 1 and not inode.error:
                look_at(tree, inode, fault)
                left += [inode.ino] if stat.S_ISDIR(inode.mode) else []
    return seen


def entries(tree: Tree | ext.ExtReader, directory: int, fault: type[Exception]) -> Iterator[Inode]:
    cookie, place = 0, 0
    with suppress(fault):
        while page := tree.entries(directory, cookie, 1 << 16):
            place = 0
            while place < len(page):
                yield Inode._make(INODE.unpack_from(page, place + ENTRY.size))
                cookie, _name, _extents, length = ENTRY.unpack_from(page, place)
                place += length


def look_at(tree: Tree | ext.ExtReader, inode: Inode, fault: type[Exception]) -> None:
    with suppress(fault):
        tree.xattrs(inode.ino)
    with suppress(fault):
        if stat.S_ISLNK(inode.mode):
            tree.readlink(inode.ino)
    with suppress(fault):
        if stat.S_ISREG(inode.mode):
            found = tree.extents(inode.ino, 0, 64)
            assert found is not None
            assert all(offset >= INLINE or offset + length <= 4 << 20 for _, length, offset in found.extents)


def damaged(content: bytes, places: list[tuple[int, int]], chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8))):
        offset, length = chance.choice(places)
        place = offset + chance.randrange(length)
        changed[place] = chance.choice((0, 1, 0xFF, chance.randrange(256), changed[place] ^ 1 << chance.randrange(8)))
    return bytes(changed)


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    found = Launcher()
    yield found
    found.close()


def test_damage_is_an_error_of_a_name_or_of_the_tree(image: bytes, launcher: Launcher) -> None:
    places = looked_at(image)
    whole = 0
    for number in range(MUTATIONS):
        device = Watched(damaged(image, places, random.Random(number)))
        tree = Tree(launcher, "disk", "ext4", device.size, device.read, True)
        began = time.monotonic()
        try:
            whole += len(walk(tree, TreeFault)) == NAMES
        except TreeFault as fault:  # the tree cannot be opened
            assert "crashed" not in str(fault), f"mutation {number}"
        finally:
            tree.close()
        assert time.monotonic() - began < SECONDS, f"mutation {number}"
    assert MUTATIONS // 10 < whole < MUTATIONS

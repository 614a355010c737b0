"""Damage to the metadata of ext: answers that the mount process takes, or OSError; never a crash, a hang, or no end."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowfs import limits
from qcowfs.inside import answer
from qcowfs.inside.reader import INLINE, Reader, Unreadable
from qcowfs.inside.record import ENTRY, INODE, Inode
from tests.support import need
from tests.support.forgejournal import Journal, make_file_system

ext = pytest.importorskip("qcowfs.inside.ext")
pytestmark = pytest.mark.timeout(120)

MUTATIONS = int(os.environ.get("QCOWFS_EXT_MUTATIONS", "512"))  # of each kind of image; 8192 were tried by hand
BATCH = 32  # of them that one process tries
BATCH_SECONDS = 30  # a slip costs the whole of it; usually a batch takes half a second
UNIT = 1024
MOST_INODES = 3000  # that a walk looks at: damage may make directories of files, but no more inodes than there are
MOST_PAGES = 2000
UUID = "00112233-4455-6677-8899-aabbccddeeff"
KINDS = {
    "checksums": "extent,inline_data,metadata_csum,ea_inode",
    "inline_data": "extent,inline_data,ea_inode,^metadata_csum",
    "extents": "extent,^metadata_csum",
    "indirect": "^extent,^64bit,^metadata_csum",
    "journal": "",
}


class Memory:
    """A Device in memory, which knows what was read."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.units: set[int] = set()

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(5, "a read past the end of the volume")
        self.units.update(range(offset // UNIT, -(-(offset + length) // UNIT)))
        return self.content[offset : offset + length]


def plant(root: Path) -> None:
    rng = random.Random(2)
    for number in range(60):
        directory = root / f"directory{number % 3}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / f"a file of some name {number}").write_bytes(rng.randbytes(number * 40))
    for number in range(3):
        os.setxattr(root / f"directory{number}", "user.small", b"x" * 20)
        os.setxattr(root / f"directory{number}" / f"a file of some name {number}", "user.large", b"x" * 600)
    with (root / "fragments").open("wb") as file:
        for number in range(450):
            os.pwrite(file.fileno(), b"x", 2 * number * UNIT)
    for length in (5, 59, 60, 500):
        (root / f"link{length}").symlink_to("t" * length)


def make(directory: Path, kind: str) -> bytes:
    """Return the image of a file system of a kind, with indexes of directories."""
    tree, image = directory / "tree", directory / "image"
    plant(tree)
    if kind == "journal":
        make_file_system(image, "-d", str(tree))
        forge(image)
        return image.read_bytes()
    options = [
        "-t",
        "ext4",
        "-b",
        str(UNIT),
        "-O",
        f"{KINDS[kind]},^has_journal",
        "-U",
        UUID,
        "-E",
        f"hash_seed={UUID}",
    ]
    subprocess.run(["mke2fs", "-q", "-F", *options, "-d", tree, image, "2M"], check=True)
    subprocess.run(["e2fsck", "-fyD", image], check=False, capture_output=True)
    return image.read_bytes()


def forge(image: Path) -> None:
    """Move some blocks of metadata to the journal, as if the machine had stopped before they were in their places."""
    device = Memory(image.read_bytes())
    walk(device)
    chosen = random.Random(7).sample(sorted(unit for unit in device.units if unit > 2), 15)
    journal = Journal()
    journal.descriptor([(unit, device.content[unit * UNIT : (unit + 1) * UNIT]) for unit in chosen])
    journal.revoke([4000, 4001])
    journal.commit()
    journal.write(image)
    with image.open("r+b") as file:
        for unit in chosen:
            file.seek(unit * UNIT)
            file.write(bytes(UNIT))


def damaged(content: bytes, units: list[int], rng: random.Random) -> bytes:
    """Return `content` with a few bytes of its metadata changed, or a block number by another."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.choice(units) * UNIT + rng.randrange(UNIT // 4) * 4
        word = rng.choice((b"", bytes(4), b"\xff" * 4, rng.choice(units).to_bytes(4, "little"), rng.randbytes(4)))
        if word:
            changed[place : place + 4] = word
        else:
            changed[place + rng.randrange(4)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def walk(device: Memory) -> int:
    """Ask everything of every inode; return how many there were."""
    try:
        reader = ext.open_reader(device, recover=True)
    except Unreadable:
        return 0
    waiting, seen = [reader.root], set()
    while waiting:
        ino = waiting.pop()
        if ino in seen:
            continue
        seen.add(ino)
        assert len(seen) <= MOST_INODES
        for question in (ask_inode, ask_link, ask_xattrs, ask_extents):
            attempt(question, reader, ino, device.size)
        children: list[int] = []
        attempt(ask_entries, reader, ino, device.size, children)
        waiting += children
    return len(seen)


def attempt(question: Callable[..., None], *arguments: object) -> None:
    try:
        question(*arguments)
    except OSError as error:
        assert error.errno and error.strerror


def ask_inode(reader: Reader, ino: int, _size: int) -> None:
    answer.inode(reader.stat(ino), ino)


def ask_link(reader: Reader, ino: int, _size: int) -> None:
    answer.link(reader.readlink(ino))


def ask_xattrs(reader: Reader, ino: int, _size: int) -> None:
    found = reader.xattrs(ino)
    assert all(0 < len(name) < 256 and b"\0" not in name for name in found)
    assert sum(map(len, found.values())) <= limits.MAX_EXT_XATTRS


def ask_extents(reader: Reader, ino: int, size: int) -> None:
    place = 0
    file_size = Inode._make(INODE.unpack(reader.stat(ino))).size
    for _ in range(50):  # of a forged size only the beginning
        if place >= file_size:
            break
        found = reader.extents(ino, place, 40)
        assert found is not None and place < found.end <= file_size and len(found.extents) <= 40
        for start, length, offset in found.extents:
            assert place <= start < start + length <= found.end
            place = start + length
            if offset >= INLINE:
                assert offset - INLINE + length <= len(found.inline)
            else:
                assert offset + length <= size
        place = found.end


def ask_entries(reader: Reader, ino: int, size: int, children: list[int]) -> None:
    cookie = 0
    for _ in range(MOST_PAGES):
        page = answer.entries(reader.entries(ino, cookie, 4096), cookie, size)
        if not page:
            return
        place, before = 0, cookie
        while place < len(page):
            cookie, _length, _extents, whole = ENTRY.unpack_from(page, place)
            assert cookie > before
            children.append(Inode._make(INODE.unpack_from(page, place + ENTRY.size)).ino)
            place, before = place + whole, cookie
    raise AssertionError(f"directory {ino} has no end")


def try_batch(content: bytes, units: list[int], first: int) -> tuple[int, int]:
    """Try mutations in a process of its own; return its status, and the seed that it was at."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + limits.INSIDE_MEMORY,) * 2)
            signal.alarm(BATCH_SECONDS)
            for seed in range(first, first + BATCH):
                os.write(writing, seed.to_bytes(4, "little"))
                walk(Memory(damaged(content, units, random.Random(seed))))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        seeds = told.read()
    return os.waitpid(child, 0)[1], int.from_bytes(seeds[-4:], "little")


@pytest.mark.parametrize("kind", KINDS)
def test_damage_ends_in_an_error_at_worst(tmp_path: Path, kind: str) -> None:
    need("mke2fs", "e2fsck")
    content = make(tmp_path, kind)
    device = Memory(content)

    assert walk(device) > 60
    units = sorted(device.units)
    for first in range(0, MUTATIONS, BATCH):
        status, seed = try_batch(content, units, first)
        assert status == 0, f"seed {seed} ends with {status} (signal {os.WTERMSIG(status)})"

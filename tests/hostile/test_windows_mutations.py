"""Damage to the metadata of FAT, exFAT and NTFS: right data or an OSError, and a walk that ends.

Evidence: seeded changes of 1 to 8 bytes of what an undamaged walk reads. The readers are Python, so they are walked in
this process; libfsntfs unpacks only in a worker. QCOWFS_MUTATIONS says how many of each file system; 5,000 of each were
run by hand.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qcowfs.errors import TreeFault
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from qcowfs.inside.reader import Reader, Unreadable
from qcowfs.inside.readers import open_reader
from qcowfs.inside.record import ENTRY, INODE, Inode
from tests.support import lacking, need
from tests.support.crash import mounted
from tests.support.forgefat import Exfat, Fat, Memory

RUNS = int(os.environ.get("QCOWFS_MUTATIONS", "2000"))  # of FAT, of exFAT and of NTFS
WORKER_RUNS = 40
SECONDS = 8  # of processor time, of one walk
MOST_FILES = 3000
TREE = {
    "empty": b"",
    "large": os.urandom(20_000),
    "directory": {f"a file with a long name {number}": os.urandom(number * 40) for number in range(60)},
    "deep": {"deeper": {"deepest": {"file": b"f" * 700}}},
}


def fat(bits: int) -> Callable[[Path], bytes]:
    return lambda _path: bytes(Fat(bits, TREE).data)


def exfat(_path: Path) -> bytes:
    return bytes(Exfat(TREE).data)


def ntfs(path: Path) -> bytes:
    """Return the bytes of a small NTFS that ntfs-3g filled."""
    need("mkntfs", "ntfs-3g", "losetup")
    if os.geteuid() != 0:
        lacking("loop devices and mounts need root")
    image = path / "image"
    image.touch()
    os.truncate(image, 4 << 20)
    subprocess.run(["mkntfs", "-F", "-Q", "-q", "-c", "1024", str(image)], check=True, capture_output=True)
    with mounted(image, "compression,streams_interface=xattr", "ntfs-3g") as root:
        fill(root)
    return image.read_bytes()


def fill(root: Path) -> None:
    (root / "directory").mkdir()
    os.setxattr(root / "directory", "system.ntfs_attrib_be", b"\0\0\x08\0")
    for number in range(60):
        (root / "directory" / f"a file with a long name {number}").write_bytes(b"compressed" * number * 40)
    with (root / "sparse").open("wb") as file:
        for place in range(40):
            file.seek(place * 40_000)
            file.write(os.urandom(1500))
    (root / "other").write_bytes(os.urandom(30_000))
    for number in range(12):  # more than its record can hold
        os.setxattr(root / "other", f"user.stream {number}", b"s" * 90)
    (root / "link").symlink_to("directory")


KINDS = {
    "fat12": ("vfat", fat(12)),
    "fat16": ("vfat", fat(16)),
    "fat32": ("vfat", fat(32)),
    "exfat": ("exfat", exfat),
    "ntfs": ("ntfs", ntfs),
}


def walk(reader: Reader, read: int) -> int:
    """Ask a reader for all that it has, `read` bytes of each file that it has to unpack; return how many files."""
    left, seen = [reader.root], {reader.root}
    while left and len(seen) < MOST_FILES:
        ino = left.pop()
        for ask in (reader.stat, reader.xattrs, reader.readlink, lambda ino: content(reader, ino, read)):
            with contextlib.suppress(OSError, TreeFault):
                ask(ino)
        with contextlib.suppress(OSError, TreeFault):
            for name, child in listing(reader, ino):
                assert 0 < len(name) < 256
                if child not in seen:
                    seen.add(child)
                    left.append(child)
                if len(seen) % 20 == 0:
                    reader.lookup(ino, name)
    return len(seen)


def content(reader: Reader, ino: int, read: int) -> None:
    offset = -1
    found = reader.extents(ino, 0, 50)
    while found is not None and found.end > offset:
        offset = found.end
        found = reader.extents(ino, offset, 50)
    if found is None:
        reader.read(ino, 0, read)


def listing(reader: Reader, ino: int) -> Iterator[tuple[bytes, int]]:
    cookie = 0
    while page := reader.entries(ino, cookie, 1 << 16):
        at = 0
        while at < len(page):
            cookie, length, extents, size = ENTRY.unpack_from(page, at)
            name = at + ENTRY.size + INODE.size + (0 if extents == 0xFFFF else extents * 24)
            yield page[name : name + length], Inode(*INODE.unpack_from(page, at + ENTRY.size)).ino
            at += size


def changed(data: bytes, places: list[int], seed: int) -> bytes:
    """Return `data` with 1 to 8 bytes of those at `places` changed."""
    rng = random.Random(seed)
    made = bytearray(data)
    for place in rng.choices(places, k=rng.randrange(1, 9)):
        made[place] = rng.choice((made[place] ^ 1 << rng.randrange(8), 0, 0xFF, rng.randrange(256)))
    return bytes(made)


def metadata(kind: str, data: bytes) -> list[int]:
    """Return the bytes that a walk of the undamaged volume reads, each as often as there are reads of it."""
    device = Memory(data)
    assert walk(open_reader(kind, device, recover=True), 0) > 60
    places: list[int] = []
    for offset, length in device.reads:
        places += range(offset, offset + min(length, 4096))
    return places


@pytest.fixture(scope="module", params=KINDS)
def volume(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes, list[int]]:
    kind, make = KINDS[request.param]
    data = make(tmp_path_factory.mktemp("mutations"))
    return kind, data, metadata(kind, data)


def test_damage_ends_in_an_error_at_worst(volume: tuple[str, bytes, list[int]]) -> None:
    kind, data, places = volume
    runs = RUNS // 3 + 1 if kind == "vfat" else RUNS  # there are three of them
    survived = 0
    signal.signal(signal.SIGPROF, signal.default_int_handler)
    for seed in range(runs):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with contextlib.suppress(Unreadable):
                survived += walk(open_reader(kind, Memory(changed(data, places, seed)), recover=True), 0) > 1
        except BaseException as error:
            raise AssertionError(f"seed {seed}: {error!r}") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if seed % 8 == 0:
            gc.collect()  # a reader and what it holds refer to each other, and each has an image of some MB

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    assert survived > runs // 10


@pytest.mark.expect_warnings
def test_a_worker_answers_or_is_replaced(volume: tuple[str, bytes, list[int]]) -> None:
    kind, data, places = volume
    launcher = Launcher()
    try:
        for seed in range(WORKER_RUNS):
            device = Memory(changed(data, places, 1_000_000 + seed))
            tree = Tree(launcher, f"seed {seed}", kind, device.size, device.read, True)
            try:
                with contextlib.suppress(TreeFault):
                    walk(tree, 100_000)
            finally:
                tree.close()
    finally:
        launcher.close()

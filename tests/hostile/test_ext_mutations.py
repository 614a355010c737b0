"""Damage to the metadata of ext: right data or an OSError, never a crash, a hang or a walk without end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from pathlib import Path

import pytest

from qcowfs.inside.reader import Unreadable
from qcowfs.inside.record import ENTRY, INODE, Inode
from tests.support import need

ext = pytest.importorskip("qcowfs.inside.ext")

RUNS = 120


class Damaged:
    """An image in memory; `damage` changes one byte of each of some blocks."""

    def __init__(self, data: bytes) -> None:
        self._data = bytearray(data)
        self.size = len(data)

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.size:
            raise OSError(5, "past the end")
        return bytes(self._data[offset : offset + length])

    def damage(self, chance: random.Random) -> None:
        blocks = [at for at in range(0, self.size, 1024) if any(self._data[at : at + 1024])]
        for at in chance.sample(blocks, 8):
            self._data[at + chance.randrange(1024)] ^= 1 << chance.randrange(8)


def walk(device: Damaged) -> None:
    try:
        reader = ext.open_reader(device, recover=True)
    except Unreadable:
        return
    waiting, seen = [2], set()
    while waiting and len(seen) < 5000:
        ino = waiting.pop()
        if ino in seen:
            continue
        seen.add(ino)
        for ask in (reader.xattrs, reader.readlink, lambda ino: reader.extents(ino, 0, 64)):
            try:
                ask(ino)
            except OSError:
                continue
        try:
            page, at = reader.entries(ino, 0, 1 << 20), 0
        except OSError:
            continue
        while at < len(page):
            waiting.append(Inode(*INODE.unpack_from(page, at + ENTRY.size)).ino)
            at += ENTRY.unpack_from(page, at)[3]


@pytest.mark.parametrize("features", ["extent,inline_data", "^extent,^64bit,^metadata_csum", "extent,^metadata_csum"])
def test_damage_ends_in_an_error_at_worst(tmp_path: Path, features: str) -> None:
    need("mke2fs")
    tree, image = tmp_path / "tree", tmp_path / "image"
    tree.mkdir()
    for number in range(40):
        (tree / f"dir{number % 5}").mkdir(exist_ok=True)
        (tree / f"dir{number % 5}" / f"file{number}").write_bytes(os.urandom(number * 100))
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-O", features, "-d", tree, image, "2M"]
    subprocess.run(command, check=True)
    data = image.read_bytes()
    for seed in range(RUNS):
        device = Damaged(data)
        device.damage(random.Random(seed))
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            status = 1
            try:
                walk(device)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0, f"seed {seed}"

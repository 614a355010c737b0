"""What the measured images hold: random bytes, holes, this machine's own programs and texts, a tree of small files."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from bench.programs import run

MIB = 1 << 20
TREES = ("/usr/lib", "/usr/share", "/usr/include", "/usr/bin")
PACKED = (".gz", ".xz", ".zst", ".bz2", ".png", ".jpg", ".zip", ".jar", ".whl", ".pyc", ".mo")
NEEDLE = "needle that no other file has, 3f1c8a"
NEEDLES = 7  # files that hold it
SMALL_FILE = 48 << 10


def write_random(path: Path, size: int, data: int) -> None:
    """`data` bytes that nothing can compress or guess, then a hole up to `size`."""
    with path.open("wb") as file:
        for _ in range(data // MIB):
            file.write(os.urandom(MIB))
        file.truncate(size)


def write_sparse(path: Path, size: int, unit: int, most: int, share: float = 0.5) -> None:
    """Runs of random data and of holes, 1 to `most` units long, of which `share` is data."""
    choose = random.Random(unit)
    with path.open("wb") as file:
        place = 0
        while place < size:
            length = min(unit * choose.randint(1, most), size - place)
            if choose.random() < share:
                file.seek(place)
                file.write(os.urandom(length))
            place += length
        file.truncate(size)


def write_realistic(path: Path, size: int) -> None:
    """Programs, libraries and texts of this machine, one after the other: zlib makes less than half of them."""
    with path.open("wb") as file:
        while file.tell() < size:
            before = file.tell()
            for found in files(*TREES):
                if file.tell() < size and not found.name.endswith(PACKED):
                    file.write(found.read_bytes()[: size - file.tell()])
            if file.tell() == before:
                raise RuntimeError(f"no files under {', '.join(TREES)}")


def write_file_system(path: Path, size: int, data: int) -> None:
    """An ext4 with `data` bytes of small files, of which NEEDLES hold the needle."""
    tree = path.with_suffix(".tree")
    copy_small_files(tree, data)
    for number, directory in enumerate(sorted(tree.iterdir())[:NEEDLES]):
        (directory / f"needle-{number}").write_text(f"{NEEDLE}\n")
    with path.open("wb") as file:
        file.truncate(size)
    run("mke2fs", "-q", "-t", "ext4", "-i", "4096", "-d", tree, path)  # -i: an inode for each small file
    shutil.rmtree(tree)


def copy_small_files(tree: Path, data: int) -> None:
    """Fill `tree` with copies of this machine's small files, 200 to a directory; again and again if there are few."""
    copied = number = 0
    while copied < data:
        for found in files(*TREES):
            size = found.stat().st_size
            if copied >= data or not 0 < size < SMALL_FILE:
                continue
            directory = tree / f"{number // 200:04}"
            directory.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, directory / f"{number}-{found.name}")
            copied, number = copied + size, number + 1


def files(*trees: str) -> Iterator[Path]:
    """Return the regular files that can be read, always in the same order."""
    for tree in trees:
        for directory, below, names in os.walk(tree):
            below.sort()
            for name in sorted(names):
                found = Path(directory, name)
                if not found.is_symlink() and found.is_file() and os.access(found, os.R_OK):
                    yield found

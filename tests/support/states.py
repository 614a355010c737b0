"""An image whose backing layers are states of one ext4 file system, and what the kernel says of each of them.

Between two states are a seeded storm and what it lacks: directories that are renamed, bytes that change behind an old
date, things that become others. Every other state is that of a machine whose power was cut.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support.crash import LOGFLUSH, Storm, mounted, shut_down, slow_writeback
from tests.support.disks import run
from tests.support.guests import Guest
from tests.support.images import qemu
from tests.support.trees import describe

__all__ = ["State", "make_states"]

SIZE = 32 << 20


class State(NamedTuple):
    """A state: the name of its point, the file system as a raw file, and what the kernel shows of it.

    `inodes` has the inode number of each path; `guest` is as tests.support.trees describes it.
    """

    point: str
    raw: Path
    inodes: dict[bytes, int]
    guest: Guest


def make_states(directory: Path, image: Path, count: int, *, steps: int, seed: int) -> list[State]:
    """Make `image`, with `count` states of which each but the first is an overlay of the one before."""
    disk = directory / "disk"
    disk.touch()
    os.truncate(disk, SIZE)
    run("mke2fs", "-q", "-F", "-t", "ext4", disk)
    rng = random.Random(seed)
    states: list[State] = []
    for number in range(count):
        raw = directory / f"state{number}.raw"
        _change(disk, raw, rng, steps, cut=number % 2 == 1)
        last = number == count - 1
        overlay = image if last else directory / f"layer{number}.qcow2"
        below = ["-B", directory / f"layer{number - 1}.qcow2", "-F", "qcow2"] if number else []
        qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *below, raw, overlay)
        states.append(State("current" if last else overlay.stem, raw, *_kernel(raw)))
    return states


def _change(disk: Path, raw: Path, rng: random.Random, steps: int, *, cut: bool) -> None:
    """Change the file system on `disk`, and copy it to `raw`."""
    with slow_writeback(), mounted(disk, "commit=600") as at:
        storm = Storm(at, rng)
        storm.adopt()
        storm.run(steps)
        for _ in range(steps // 4):
            with contextlib.suppress(OSError, IndexError, ValueError):  # no room, or nothing to choose from
                rng.choice(MORE)(at, rng)
        if cut:
            shut_down(at, LOGFLUSH)
            shutil.copyfile(disk, raw)
    if not cut:
        shutil.copyfile(disk, raw)


def _kernel(raw: Path) -> tuple[dict[bytes, int], Guest]:
    copy = raw.with_suffix(".copy")  # a journal that is replayed changes it
    shutil.copyfile(raw, copy)
    with mounted(copy, "rw,noatime") as at:
        guest = describe(at, atime=False)
        inodes = {path: os.lstat(os.path.join(os.fsencode(at), path)).st_ino for path in guest}
    copy.unlink()
    return inodes, guest


def _directories(root: Path) -> list[Path]:
    return sorted(Path(at, name) for at, names, _ in os.walk(root) for name in names if name != "lost+found")


def _files(root: Path) -> list[Path]:
    return sorted(Path(at, name) for at, _, names in os.walk(root) for name in names)


def _rename_directory(root: Path, rng: random.Random) -> None:
    found = _directories(root)
    rng.choice(found).rename(rng.choice([root, *found]) / f"moved{rng.randrange(10**6)}")


def _move_out_and_remove(root: Path, rng: random.Random) -> None:
    """Keep one thing of a directory, under another name, and remove the rest."""
    directory = rng.choice(_directories(root))
    rng.choice(sorted(directory.iterdir())).rename(root / f"kept{rng.randrange(10**6)}")
    shutil.rmtree(directory)


def _change_behind_an_old_date(root: Path, rng: random.Random) -> None:
    path = rng.choice(_files(root))
    status = path.lstat()
    with path.open("r+b") as file:
        file.seek(rng.randrange(max(1, status.st_size)))
        file.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _become_another(root: Path, rng: random.Random) -> None:
    path = rng.choice(_files(root))
    path.unlink()
    if rng.random() < 0.5:
        path.mkdir()
        (path / "inner").write_bytes(b"new")
    else:
        path.symlink_to("elsewhere")


def _touch(root: Path, rng: random.Random) -> None:
    os.utime(rng.choice(_files(root)))


def _swap(root: Path, rng: random.Random) -> None:
    """Give two files each other's name."""
    one, other = rng.sample(_files(root), 2)
    between = root / "between"
    one.rename(between)
    other.rename(one)
    between.rename(other)


def _attribute_of_a_directory(root: Path, rng: random.Random) -> None:
    os.setxattr(rng.choice(_directories(root)), b"user.colour", rng.randbytes(3))


MORE: tuple[Callable[[Path, random.Random], None], ...] = (
    _rename_directory,
    _move_out_and_remove,
    _change_behind_an_old_date,
    _become_another,
    _touch,
    _swap,
    _attribute_of_a_directory,
)

"""An image whose backing layers are states of one ext4 file system, and what the kernel says of each of them.

Between two states are a seeded storm and what it lacks: directories that are renamed, bytes that change behind an old
date, things that become others. Every other state is that of a machine whose power was cut.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.crash import LOGFLUSH, Storm, mounted, shut_down, slow_writeback
from tests.support.disks import run
from tests.support.guests import Guest
from tests.support.images import qemu
from tests.support.trees import describe

__all__ = ["CLUSTER", "State", "make_states", "overlays", "seen_by_kernel", "write_differences"]

SIZE = 32 << 20
CLUSTER = 64 << 10  # of an overlay
WRITES = 200  # of one qemu-io


class State(NamedTuple):
    """A state: the name of its point, the file system as a raw file, and what the kernel shows of it.

    `inodes` has the inode number of each path; `guest` is as tests.support.trees describes it.
    """

    point: str
    raw: Path
    inodes: dict[bytes, int]
    guest: Guest


def overlays(directory: Path, image: Path, raws: Sequence[Path]) -> list[str]:
    """Make `image`, an overlay for each raw disk on that of the one before, and return the names of their points.

    An overlay has what differs, as if a machine had written it: what is the same is in the same clusters of the base.
    """
    names = [f"layer{number}" for number in range(len(raws) - 1)] + ["current"]
    layers = [image if name == "current" else directory / f"{name}.qcow2" for name in names]
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raws[0], layers[0])
    for number in range(1, len(raws)):
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", layers[number - 1], "-F", "qcow2", layers[number])
        write_differences(raws[number - 1], raws[number], layers[number])
    return names


def write_differences(before: Path, after: Path, overlay: Path) -> None:
    """Write to a qcow2 image, as a machine would, what of one raw disk is not the same in another."""
    words: list[str] = []
    piece = overlay.with_suffix(".piece")
    with before.open("rb") as old, after.open("rb") as new:
        for place in range(0, after.stat().st_size, CLUSTER):
            data = new.read(CLUSTER)
            if data != old.read(CLUSTER):
                words += ["-c", f"write -q -s {piece}.{place} {place} {len(data)}"]
                Path(f"{piece}.{place}").write_bytes(data)
    for first in range(0, len(words), 2 * WRITES):
        qemu("qemu-io", "-f", "qcow2", "-t", "unsafe", *words[first : first + 2 * WRITES], overlay)
    for path in piece.parent.glob(f"{piece.name}*"):
        path.unlink()


def make_states(directory: Path, image: Path, count: int, *, steps: int, seed: int) -> list[State]:
    """Make `image`, with `count` states of which each but the first is an overlay of the one before."""
    disk = directory / "disk"
    disk.touch()
    os.truncate(disk, SIZE)
    run("mke2fs", "-q", "-F", "-t", "ext4", disk)
    rng = random.Random(seed)
    raws = [directory / f"state{number}.raw" for number in range(count)]
    for number, raw in enumerate(raws):
        _change(disk, raw, rng, steps, cut=number % 2 == 1)
    return [
        State(name, raw, *seen_by_kernel(raw)) for name, raw in zip(overlays(directory, image, raws), raws, strict=True)
    ]


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


def seen_by_kernel(raw: Path) -> tuple[dict[bytes, int], Guest]:
    """Return the inode number of each path, and what the kernel shows of it."""
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

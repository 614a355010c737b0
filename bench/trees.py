"""The files inside an image: what shows them, each mounted while a `with` lasts, and what is done with them."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from bench.figures import Figures
from bench.images import Image
from bench.programs import run
from bench.reader import WrongContentError, warm
from bench.rivals import OURS, CannotShowError, Rival, our_mount, peak_memory, running, unmount, wait_until
from bench.works import COPY_ALL, FIND, FUSE2FS, GUESTMOUNT, LOOP

WORKER = "qcowfs-reader"  # as ps shows a process that reads a tree
INSIDE = "lost+found"  # what every ext has, and a directory before a mount has not
MIB = 1 << 20


@contextmanager
def our_tree(image: Image, directory: Path) -> Iterator[Path]:
    """The directory beside NAME.raw."""
    with our_mount(image, directory) as raw:
        tree = raw.with_suffix("")
        if not (tree / INSIDE).is_dir():
            raise CannotShowError("this checkout does not show the files inside")
        yield tree


@contextmanager
def loop_mount(image: Image, directory: Path) -> Iterator[Path]:
    """The kernel's own driver over the NAME.raw of a qcowfs mount; only for root."""
    with our_mount(image, directory) as raw, mounted(raw, directory.with_name("loop")) as tree:
        yield tree


@contextmanager
def fuse2fs(image: Image, directory: Path) -> Iterator[Path]:
    """e2fsprogs' own FUSE file system, over the NAME.raw of a qcowfs mount."""
    below = directory.with_name("fuse2fs")
    below.mkdir(exist_ok=True)
    with our_mount(image, directory) as raw, running(["fuse2fs", "-f", "-o", "ro", str(raw), str(below)], below) as one:
        wait_until(one, (below / INSIDE).is_dir)
        yield below


@contextmanager
def guestmount(image: Image, directory: Path) -> Iterator[Path]:
    """libguestfs, which boots a virtual machine for it."""
    command = ["guestmount", "--ro", "--format=qcow2", "-a", str(image.path), "-m", "/dev/sda", str(directory)]
    if image.snapshot or subprocess.run(command, capture_output=True).returncode != 0:
        raise CannotShowError("it does not mount this image")
    try:
        yield directory
    finally:
        unmount(directory)


RIVALS = {
    rival.name: rival
    for rival in (
        Rival(OURS, our_tree),
        Rival(LOOP, loop_mount),
        Rival(FUSE2FS, fuse2fs, (FUSE2FS,)),
        Rival(GUESTMOUNT, guestmount, (GUESTMOUNT,)),
    )
}


@contextmanager
def mounted(raw: Path, tree: Path) -> Iterator[Path]:
    """Let the kernel mount a raw file."""
    tree.mkdir(exist_ok=True)
    run("mount", "-o", "ro,loop", raw, tree)
    try:
        yield tree
    finally:
        run("umount", tree)


class Trees:
    """Measures one kind of work; each turn has a mount of its own, so that nobody has anything in the kernel's caches.

    Args:
        image: what is shown.
        truth: the kernel's mount of the same bytes.
        found: where the memory of our workers is noted.
    """

    def __init__(self, image: Image, truth: Path, found: Figures) -> None:
        self._image = image
        self._truth = truth
        self._names = listed(truth)
        self._found = found
        warm([*image.files(), image.raw])

    def turn(self, kind: str, rival: Rival, below: Path, number: int) -> float:
        """Return the seconds of a work, or for the first listing the milliseconds from the start of the mount."""
        if lacking := rival.lacking():
            raise CannotShowError(lacking)
        with tempfile.TemporaryDirectory(dir=below) as place:
            directory = Path(place, "shown")
            directory.mkdir()
            start = time.monotonic()
            with rival.show(self._image, directory) as tree:
                measure = {FIND: find, COPY_ALL: partial(copy_all, self._truth)}.get(kind)
                if measure is None:
                    os.listdir(tree)
                    return (time.monotonic() - start) * 1000
                passed = measure(tree)
                if number == 0 and listed(tree) != self._names:
                    raise WrongContentError("the names and sizes of its files")
                self._note_memory(rival.name, directory)
        return passed

    def _note_memory(self, name: str, directory: Path) -> None:
        memory = self._found.memory
        memory[name] = max(memory.get(name, 0), peak_memory(directory))
        if name == OURS and (sizes := workers_memory(directory)):
            remark = f"A worker of qcowfs takes {max(sizes) / MIB:.0f} MiB (PSS)"
            self._found.remarks = [remark]


def find(tree: Path) -> float:
    """Return the seconds of a listing of everything with its attributes."""
    start = time.monotonic()
    run("find", tree, "-ls")
    return time.monotonic() - start


def copy_all(truth: Path, tree: Path) -> float:
    """Return the seconds of a copy of everything; compares it afterwards."""
    shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=shm) as name:
        made = Path(name, "copy")
        start = time.monotonic()
        run("cp", "-a", tree, made)
        passed = time.monotonic() - start
        if subprocess.run(["diff", "-rq", "--no-dereference", truth, made], capture_output=True).returncode != 0:
            raise WrongContentError("the copy")
    return passed


def listed(tree: Path) -> list[str]:
    """Return a line for each name below `tree`."""
    return sorted(run("find", tree, "-printf", r"%P %y %m %s %U %G %T@ %l\n").splitlines())


def workers_memory(directory: Path) -> list[int]:
    """Return the proportional memory of each process that reads a tree of the mount at `directory`, in bytes."""
    found, named = [], re.compile(re.escape(os.fsencode(directory)) + rb"(?![\w-])")
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (process / "comm").read_text().strip() == WORKER and named.search((process / "cmdline").read_bytes()):
                rollup = (process / "smaps_rollup").read_text()
                found += [int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:")]
    return found

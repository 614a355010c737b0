"""Writing a point to a file of its own: by `qcowfs export`, and by `qemu-img convert` with its default options."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.figures import Figures
from bench.images import AFTER, BEFORE, Image
from bench.peak import measured
from bench.programs import HERE, run
from bench.reader import WrongContentError, warm
from bench.rivals import OURS, our_command
from bench.works import CONVERT, FORMS, Form

SHARING_ROOM = 4 << 30  # bytes of the XFS on which blocks are shared


@contextmanager
def on_xfs(image: Image, directory: Path) -> Iterator[Image]:
    """Yield the image in an XFS of its own, which lies in memory if `directory` does."""
    disk, at = directory / "xfs", directory / "at"
    at.mkdir()
    with disk.open("wb") as file:
        file.truncate(SHARING_ROOM)
    run("mkfs.xfs", "-q", disk)
    run("mount", "-o", "loop", disk, at)
    try:
        copy = at / image.path.name
        run("cp", image.path, copy)
        os.sync()  # what is to be shared has to be on the disk first, and that would be the first export's work
        yield Image(image.name, copy, image.raw)
    finally:
        run("umount", at)


def turns(form: str, image: Image, directory: Path, found: Figures) -> dict[str, Callable[[int], float]]:
    """Return what measures a turn of each rival, in seconds; both write to `directory`, where there is room."""
    wanted = FORMS[form]
    warm([*image.files(), image.raw])
    found.remarks = [wanted.remark] if wanted.remark else []
    out = directory / f"out.{wanted.format}"
    commands = {OURS: ours(wanted, image, out, directory), CONVERT: convert(wanted, image, out, directory)}

    def turn(name: str) -> Callable[[int], float]:
        def measure(number: int) -> float:
            passed, peak = timed(commands[name])
            found.memory[name] = max(found.memory.get(name, 0), peak)
            if name == OURS and number == 0:
                compare(wanted, image, out)
            out.unlink()
            return passed

        return measure

    return {name: turn(name) for name in commands}


def ours(form: Form, image: Image, out: Path, directory: Path) -> list[str]:
    """Return our command; makes the backing file of an overlay first."""
    words: list[str] = ["-O", form.format, *form.ours]
    if not form.since:
        return our_command("export", *words, image.path, "current", out)
    base = directory / "base.qcow2"
    subprocess.run(our_command("export", "-O", "qcow2", image.path, BEFORE, base), check=True, cwd=HERE.parent)
    return our_command("export", *words, "--since", BEFORE, "--backing", base.name, image.path, AFTER, out)


def convert(form: Form, image: Image, out: Path, directory: Path) -> list[str]:
    """Return the command of qemu-img."""
    since = ["-l", f"snapshot.name={AFTER}", "-B", str(directory / "base.qcow2"), "-F", "qcow2"] if form.since else []
    return ["qemu-img", "convert", "-f", "qcow2", "-O", form.format, *form.theirs, *since, str(image.path), str(out)]


def timed(command: list[str]) -> tuple[float, int]:
    """Return the seconds that a command takes, and the peak of its resident bytes."""
    taken = measured(command, cwd=HERE.parent)
    if taken.code != 0:
        raise RuntimeError(f"{command[0]} ended with {taken.code}")
    return taken.seconds, taken.peak


def compare(form: Form, image: Image, out: Path) -> None:
    """Let QEMU read what was written; an image is the same after its last snapshot as in it."""
    words = ["qemu-img", "compare", "-q", "-f", form.format, "-F", "raw", str(out), str(image.raw)]
    if subprocess.run(words).returncode != 0:
        raise WrongContentError("the export")

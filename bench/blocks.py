"""Comparing the bytes of two points: by qcowfs, and by programs that read all of both."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Figures
from bench.images import AFTER, BEFORE, CHANGED, Image, copy_of
from bench.programs import HERE, run
from bench.reader import WrongContentError, warm
from bench.rivals import OURS, our_command, qcowfs
from bench.works import CMP, COMPARE

REMARK = "qemu-img compare ends with the first difference, so it is given the raw file of one of them, and a copy"


@dataclass(frozen=True)
class Command:
    """What compares two points: a command line, and the exit code that it ends with."""

    words: list[str]
    code: int


@contextmanager
def commands(image: Image, directory: Path) -> Iterator[dict[str, Command]]:
    """Yield the command of each rival for an image with two points, or for one and its copy."""
    with ExitStack() as stack:
        if image.name != "churn":
            both = [str(image.path), str(copy_of(image.path))]
            ours = our_command("diff", "--blocks", "--json", *both)
            yield {OURS: Command(ours, 0), COMPARE: Command(["qemu-img", "compare", "-q", *both], 0)}
            return
        directory.mkdir()
        qcowfs("mount", image.path, directory)
        stack.callback(qcowfs, "umount", directory)
        equal = directory.with_name("equal.raw")
        stack.callback(equal.unlink, missing_ok=True)
        run("cp", "--sparse=always", image.raw, equal)
        raws = ["-f", "raw", "-F", "raw", str(image.raw), str(equal)]
        shown = [str(directory / f"{name}.raw") for name in (BEFORE, AFTER)]
        ours = our_command("diff", "--blocks", "--json", image.path, BEFORE, AFTER)
        yield {
            OURS: Command(ours, 1),
            COMPARE: Command(["qemu-img", "compare", "-q", *raws], 0),
            CMP: Command(["cmp", "-l", *shown], 1),
        }


def turns(image: Image, stack: ExitStack, directory: Path, found: Figures) -> dict[str, Callable[[int], float]]:
    """Return what measures a turn of each rival, in seconds."""
    made = stack.enter_context(commands(image, directory / "shown"))
    warm([*image.files(), image.raw])
    expected = CHANGED if image.name == "churn" else 0
    found.remarks = [REMARK] if image.name == "churn" else []

    def turn(name: str) -> Callable[[int], float]:
        def measure(number: int) -> float:
            passed, printed = timed(made[name], directory / "printed")
            if name == OURS and json.loads(printed.read_bytes())["bytes"] != expected:
                raise WrongContentError("the ranges that differ")
            return passed

        return measure

    return {name: turn(name) for name in made}


def timed(command: Command, printed: Path) -> tuple[float, Path]:
    """Return the seconds that a command takes, and where its output is."""
    with printed.open("wb") as output:
        start = time.monotonic()
        done = subprocess.run(command.words, stdout=output, cwd=HERE.parent)
        passed = time.monotonic() - start
    if done.returncode != command.code:
        raise RuntimeError(f"{command.words[0]} ended with {done.returncode}")
    return passed, printed

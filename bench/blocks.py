"""Comparing the bytes of two points: by qcowfs, and by programs that read all of both."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from bench.figures import Figures
from bench.images import AFTER, BEFORE, CHURNED, Image, changed, copy_of
from bench.programs import HERE
from bench.reader import WrongContentError, warm
from bench.rivals import OURS, our_command, qcowfs
from bench.works import CMP, COMPARE

REMARK = "qemu-img compare ends with the first difference, so it is given the raw file of one point twice"


@dataclass(frozen=True)
class Command:
    """What compares two points: a command line, and the exit code that it ends with."""

    words: list[str]
    code: int


@contextmanager
def commands(image: Image, directory: Path) -> Iterator[dict[str, Command]]:
    """Yield the command of each rival for an image with two points, or for one and its copy."""
    with ExitStack() as stack:
        if image.name not in CHURNED:
            both = [str(image.path), str(copy_of(image.path))]
            ours = our_command("diff", "--blocks", "--json", *both)
            yield {OURS: Command(ours, 0), COMPARE: Command(["qemu-img", "compare", "-q", *both], 0)}
            return
        directory.mkdir()
        qcowfs("mount", image.path, directory)
        stack.callback(qcowfs, "umount", directory)
        raws = ["-f", "raw", "-F", "raw", str(image.raw), str(image.raw)]
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
    expected = changed(CHURNED[image.name]) if image.name in CHURNED else 0
    found.remarks = [REMARK] if image.name in CHURNED else []

    def turn(name: str) -> Callable[[int], float]:
        def measure(number: int) -> float:
            done = finished(made[name], directory / "printed")
            if name == OURS and json.loads((directory / "printed").read_bytes())["bytes"] != expected:
                raise WrongContentError("the ranges that differ")
            found.memory[name] = max(found.memory.get(name, 0), done.memory)
            return done.seconds

        return measure

    return {name: turn(name) for name in made}


class Done(NamedTuple):
    """What a command took: `memory` is the peak of its resident bytes."""

    seconds: float
    memory: int


def finished(command: Command, printed: Path) -> Done:
    """Run a command, with its output in `printed`."""
    with printed.open("wb") as output:
        start = time.monotonic()
        process = subprocess.Popen(command.words, stdout=output, cwd=HERE.parent)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.monotonic() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != command.code:
        raise RuntimeError(f"{command.words[0]} ended with {process.returncode}")
    return Done(seconds, usage.ru_maxrss << 10)

"""Measuring in turns: the rivals of a work are mounted, their contents compared, then A B C A B C ... by rounds."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench import blocks, exports, objects, reader, remotes, rivals, trees
from bench.contents import NEEDLE, NEEDLES
from bench.figures import Figures
from bench.images import Image, Images
from bench.programs import run
from bench.reader import OffsetList, WrongContentError
from bench.rivals import RIVALS, CannotShowError, Rival
from bench.trees import Trees, mounted
from bench.works import (
    COPY,
    DIFF,
    EXPORT,
    FIRST_BYTE,
    FORMS,
    GREP,
    INSIDE,
    OBJECT_BYTES,
    OBJECTS,
    RANDOM,
    REMOTE_SEQUENTIAL,
    REMOTES,
    SEQUENTIAL,
    Work,
)

MUCH_MEMORY = 4 << 30  # free bytes of /dev/shm from which copies go there, where no disk disturbs them


@dataclass(frozen=True)
class Stand:
    """A rival that is mounted.

    Attributes:
        name: of the rival.
        file: what it shows.
        directory: what its daemons are known by.
        image: what is shown.
        turn: measure once; called with the number of the round.
    """

    name: str
    file: Path
    directory: Path
    image: Image
    turn: Callable[[int], float]


class Turns:
    """Measures works with the same patience: `rounds` turns of each rival, random reads for `seconds`."""

    def __init__(self, images: Images, scratch: Path, rounds: int, seconds: float) -> None:
        self._images = images
        self._scratch = scratch
        self._rounds = rounds
        self._seconds = seconds

    def figures(self, work: Work) -> Figures:
        """Return the figures of a work; raises WrongContentError where qcowfs itself shows something wrong."""
        found = Figures(more_is_better=work.kind in (RANDOM, SEQUENTIAL, *REMOTES))
        with tempfile.TemporaryDirectory(dir=self._scratch) as name, ExitStack() as stack:
            stands = list(self._ready(work.kind)(work, Path(name), stack, found))
            for number in range(self._rounds):
                for stand in stands:
                    take_turn(stand, number, found)
            for stand in stands:
                fits = stand.name in found.samples and stand.image.name == work.image
                if fits and work.kind not in (FIRST_BYTE, DIFF, EXPORT, *INSIDE, *REMOTES, *OBJECTS):
                    found.memory[stand.name] = rivals.peak_memory(stand.directory)
        found.memory.pop(rivals.RAW, None)
        return found

    def _ready(self, kind: str) -> Callable[[Work, Path, ExitStack, Figures], Iterable[Stand]]:
        """Return what puts up the rivals of such works."""
        special = {DIFF: self._blocks, EXPORT: self._exports}
        special |= dict.fromkeys(INSIDE, self._trees) | dict.fromkeys(REMOTES, self._remotes)
        special |= dict.fromkeys(OBJECTS, self._objects)
        return special.get(kind, self._stands)

    def _stands(self, work: Work, directory: Path, stack: ExitStack, found: Figures) -> Iterable[Stand]:
        """Put up every rival that can show the image and shows the right content."""
        lists: dict[str, OffsetList] = {}
        for name in work.rivals:
            image = self._images.get("plain" if name == rivals.OWN_PLAIN else work.image)
            if image.name not in lists:
                lists[image.name] = prepared(image, directory, sequential=work.kind == SEQUENTIAL)
            below = directory / name.replace(" ", "-").replace(",", "")
            below.mkdir()
            try:
                yield self._stand(work, name, image, below, stack, lists[image.name], found)
            except (CannotShowError, WrongContentError, OSError) as error:
                blame(name, error, found)

    def _trees(self, work: Work, directory: Path, stack: ExitStack, found: Figures) -> Iterable[Stand]:
        """Make ready to compare those that show the files inside; each turn mounts anew."""
        image = self._images.get(work.image)
        truth = stack.enter_context(mounted(image.raw, directory / "truth"))
        compared = Trees(image, truth, found)
        for name in work.rivals:
            below = directory / name.replace(" ", "-").replace(".", "")
            below.mkdir()
            turn = partial(compared.turn, work.kind, trees.RIVALS[name], below)
            yield Stand(name, below, below, image, turn)

    def _blocks(self, work: Work, directory: Path, stack: ExitStack, found: Figures) -> Iterable[Stand]:
        """Make ready to compare those that compare two points; only qcowfs says where they differ."""
        image = self._images.get(work.image)
        for name, turn in blocks.turns(image, stack, directory, found).items():
            yield Stand(name, directory, directory, image, turn)

    def _remotes(self, work: Work, directory: Path, stack: ExitStack, found: Figures) -> Iterable[Stand]:
        """Start a server with the image, to compare those that read it from there."""
        image = self._images.get(work.image)
        most = 0 if work.cold else remotes.WARM
        offsets = prepared(image, directory, sequential=work.kind == REMOTE_SEQUENTIAL, most=most)
        for name, turn in remotes.turns(work, image, offsets, stack, directory, self._seconds).items():
            yield Stand(name, directory, directory, image, turn)

    def _objects(self, work: Work, directory: Path, stack: ExitStack, found: Figures) -> Iterable[Stand]:
        """Start an object store with the image; its steps take the rivals' places."""
        image = self._images.get(work.image)
        for name, turn in objects.turns(image, stack, directory, work.kind == OBJECT_BYTES).items():
            yield Stand(name, directory, directory, image, turn)

    def _exports(self, work: Work, directory: Path, stack: ExitStack, found: Figures) -> Iterable[Stand]:
        """Make ready to compare those that write a point to a file; each turn is a whole command."""
        image = self._images.get(work.image)
        form = FORMS[work.form]
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=None if form.since else roomy())))
        if form.shared:
            image = stack.enter_context(exports.on_xfs(image, room))
            room = image.path.parent
        for name, turn in exports.turns(work.form, image, room, found).items():
            yield Stand(name, directory, directory, image, turn)

    def _stand(
        self, work: Work, name: str, image: Image, below: Path, stack: ExitStack, offsets: OffsetList, found: Figures
    ) -> Stand:
        """Put up one rival and compare its content; for FIRST_BYTE that is what is measured."""
        rival = RIVALS[name]
        if lacking := rival.lacking():
            raise CannotShowError(lacking)
        if work.kind == FIRST_BYTE:
            turn = partial(first_byte, rival, image, below, found)
            turn(0)  # whoever cannot do it is left out now
            return Stand(name, below, below, image, turn)
        mountpoint = below / "shown"
        mountpoint.mkdir()
        file = stack.enter_context(rival.show(image, mountpoint))
        if reader.digest(file, offsets.block, offsets.offsets) != offsets.digest:
            raise WrongContentError("a sample of its blocks")
        return Stand(name, file, below, image, self._turn(work, image, file, below, offsets))

    def _turn(self, work: Work, image: Image, file: Path, below: Path, offsets: OffsetList) -> Callable[[int], float]:
        """Return what measures one turn."""
        if work.kind == RANDOM:
            return partial(reader.measure, file, offsets, work.jobs, self._seconds)
        if work.kind == SEQUENTIAL:
            return partial(reader.measure, file, offsets, 1, self._seconds, passes=1)
        if work.kind == GREP:
            return partial(grep, file, below, image.raw != file and work.cold)
        assert work.kind == COPY
        return partial(copy, file, image.raw)


def prepared(image: Image, directory: Path, *, sequential: bool, most: int = 0) -> OffsetList:
    """Return the list of offsets of an image whose files the host now has in memory; `most` as of `offset_list`."""
    reader.warm([*image.files(), image.raw])
    below = directory / f"{image.name}.lists"
    below.mkdir()
    return reader.offset_list(image.raw, below, sequential=sequential, most=most)


def take_turn(stand: Stand, number: int, found: Figures) -> None:
    """Measure once, unless the rival was left out in an earlier round."""
    if number > 0 and stand.name not in found.samples:
        return
    try:
        found.samples.setdefault(stand.name, []).append(stand.turn(number))
    except subprocess.TimeoutExpired:
        blame(stand.name, RuntimeError("it did not answer any more"), found)
    except (CannotShowError, WrongContentError, RuntimeError) as error:
        blame(stand.name, error, found)


def blame(name: str, error: Exception, found: Figures) -> None:
    """Leave a rival out with a note; figures of a qcowfs that shows something wrong are worth nothing."""
    if name.startswith(rivals.OURS) and not isinstance(error, CannotShowError):
        raise error
    found.leave_out(name, f"wrong content ({error})" if isinstance(error, WrongContentError) else str(error))


def first_byte(rival: Rival, image: Image, below: Path, found: Figures, number: int) -> float:
    """Return the milliseconds from starting a rival to having read one byte; keeps the memory that this took."""
    with tempfile.TemporaryDirectory(dir=below) as place:
        start = time.monotonic()
        with rival.show(image, Path(place)) as file, file.open("rb", buffering=0) as opened:
            byte = opened.read(1)
            passed = time.monotonic() - start
            found.memory[rival.name] = max(found.memory.get(rival.name, 0), rivals.peak_memory(Path(place)))
        with image.raw.open("rb", buffering=0) as right:
            if byte != right.read(1) and rival.name != rivals.EMPTY:
                raise WrongContentError("the first byte")
    return passed * 1000


def grep(file: Path, below: Path, cold: bool, number: int) -> float:
    """Return the seconds of mounting the file system in `file` and of a search through all its files."""
    mountpoint = below / "loop"
    mountpoint.mkdir(exist_ok=True)
    if cold:
        reader.forget(file)
    start = time.monotonic()
    run("mount", "-o", "ro,loop", file, mountpoint)
    try:
        environment = {**os.environ, "LC_ALL": "C"}
        command = ["grep", "-r", "-l", "-F", NEEDLE, str(mountpoint)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        passed = time.monotonic() - start
    finally:
        run("umount", mountpoint)
    if len(done.stdout.splitlines()) != NEEDLES:
        raise WrongContentError(f"grep found {len(done.stdout.splitlines())} of {NEEDLES} files")
    return passed


def copy(file: Path, raw: Path, number: int) -> float:
    """Return the seconds of a copy that keeps holes; compares it afterwards."""
    if file != raw:
        reader.forget(file)
    with tempfile.TemporaryDirectory(dir=roomy()) as name:
        made = Path(name, "copy.raw")
        start = time.monotonic()
        run("cp", "--sparse=auto", file, made)
        passed = time.monotonic() - start
        if not filecmp.cmp(made, raw, shallow=False):
            raise WrongContentError("the copy")
    return passed


def roomy() -> str | None:
    """Return memory to copy into, or None for the usual temporary directory."""
    with_room = os.path.isdir("/dev/shm") and shutil.disk_usage("/dev/shm").free >= MUCH_MEMORY
    return "/dev/shm" if with_room else None

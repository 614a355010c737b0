"""Reading what a rival shows: lists of offsets with their witnesses, timed reads, and a comparison of contents."""

from __future__ import annotations

import bisect
import errno
import hashlib
import itertools
import json
import mmap
import os
import random
import struct
from dataclasses import dataclass
from pathlib import Path

from bench.programs import compiled, run

SMALL, LARGE = 4096, 1 << 20
LISTED = 1 << 16  # offsets of random reads; they are taken in turn, round by round
SAMPLED = {SMALL: 1500, LARGE: 64}  # offsets whose content is hashed before anything is measured


class WrongContentError(Exception):
    """A file does not hold what qemu-img reads from the image."""


@dataclass(frozen=True)
class OffsetList:
    """A file of (offset, witness) pairs, the same for every rival.

    Attributes:
        path: the file, as reader.c wants it.
        block: bytes of each read.
        offsets: in the order of reading.
        digest: of a sample of what the image holds there, see `digest`.
    """

    path: Path
    block: int
    offsets: list[int]
    digest: str


def data_runs(raw: Path) -> list[tuple[int, int]]:
    """Return (start, length) of what is no hole."""
    runs, place = [], 0
    with raw.open("rb", buffering=0) as file:
        while (start := next_place(file.fileno(), place, os.SEEK_DATA)) is not None:
            place = next_place(file.fileno(), start, os.SEEK_HOLE) or start
            runs.append((start, place - start))
    return runs


def next_place(descriptor: int, place: int, whence: int) -> int | None:
    """Return what lseek(2) finds, or None after the last data."""
    try:
        return os.lseek(descriptor, place, whence)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def random_offsets(runs: list[tuple[int, int]], count: int) -> list[int]:
    """Return offsets of pages in the runs, each page as likely as any other; always the same ones."""
    choose = random.Random(count)
    ends = list(itertools.accumulate(length // SMALL for _, length in runs))
    found = []
    for page in (choose.randrange(ends[-1]) for _ in range(count)):
        place = bisect.bisect_right(ends, page)
        start, length = runs[place]
        found.append(start + (page - (ends[place] - length // SMALL)) * SMALL)
    return found


def sequential_offsets(runs: list[tuple[int, int]]) -> list[int]:
    """Return the offsets of whole MiB of data, in order."""
    return [place for start, length in runs for place in range(start, start + length - LARGE + 1, LARGE)]


def offset_list(raw: Path, directory: Path, *, sequential: bool, most: int = 0) -> OffsetList:
    """Write the list of offsets in `raw`, with the witnesses of what is there; of its first `most` bytes, unless 0."""
    runs = data_runs(raw)
    if most:
        runs = [(start, min(length, most - start)) for start, length in runs if start < most]
    listed = min(LISTED, sum(length for _, length in runs) // SMALL)
    offsets = sequential_offsets(runs) if sequential else random_offsets(runs, listed)
    block = LARGE if sequential else SMALL
    path = directory / f"offsets-{block}"
    path.write_bytes(b"".join(struct.pack("=QQ", offset, 0) for offset in offsets))
    run(compiled("reader"), "prepare", raw, path, str(block))
    return OffsetList(path, block, offsets, digest(raw, block, offsets))


def measure(file: Path, offsets: OffsetList, jobs: int, seconds: float, round_number: int, passes: int = 0) -> float:
    """Return the reads a second that `jobs` threads get together; each round begins elsewhere in the list."""
    start = round_number * 40_503 % len(offsets.offsets) if passes == 0 else 0
    words = (str(offsets.block), str(jobs), str(seconds), str(start), str(passes))
    told = json.loads(run(compiled("reader"), "measure", file, offsets.path, *words))
    if told["wrong"]:
        raise WrongContentError(f"{told['wrong']} of {told['reads']} timed reads")
    return float(told["reads"] / told["seconds"])


def digest(file: Path, block: int, offsets: list[int]) -> str:
    """Return a SHA-256 of a sample of the listed blocks and of the file's size; holes beside them included."""
    size = file.stat().st_size
    step = max(1, len(offsets) // SAMPLED[block])
    hashed = hashlib.sha256(str(size).encode())
    buffer = mmap.mmap(-1, block)  # O_DIRECT wants an aligned one
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    try:
        for offset in offsets[::step]:
            for place in (offset, (offset + size // 2) % size // SMALL * SMALL):
                got = os.preadv(descriptor, [buffer], place)
                hashed.update(buffer[:got])
    finally:
        os.close(descriptor)
    return hashed.hexdigest()


def warm(files: list[Path]) -> None:
    """Read the data of the files once, so that the host has them in memory."""
    buffer = bytearray(LARGE)
    for path in files:
        runs = data_runs(path)
        with path.open("rb", buffering=0) as file:
            for start, length in runs:
                file.seek(start)
                left = length
                while left > 0 and (got := file.readinto(memoryview(buffer)[: min(left, LARGE)])):
                    left -= got


def forget(file: Path) -> None:
    """Drop what the kernel keeps of a file, so that the next read is a request to its daemon."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)

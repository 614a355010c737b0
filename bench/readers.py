"""Reading a file as fast as one or several processes can, past the kernel's cache: each read is a FUSE request."""

from __future__ import annotations

import hashlib
import mmap
import multiprocessing
import os
import random
import time
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path

SMALL, LARGE = 4096, 1 << 20
HASHED_OFFSETS = 1 << 30  # a file's content is compared up to here


def random_reads(file: Path, jobs: int, seconds: float) -> float:
    """Return the 4 KiB reads a second that `jobs` processes get together, at random offsets."""
    counted = multiprocessing.Value("q", 0)
    processes = [
        multiprocessing.Process(target=_read_at_random, args=(file, job, seconds, counted)) for job in range(jobs)
    ]
    start = time.monotonic()
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError(f"a reader of {file} failed")
    return counted.value / (time.monotonic() - start)


def _read_at_random(file: Path, job: int, seconds: float, counted: Synchronized[int]) -> None:
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    generator = random.Random(job)
    blocks = min(os.fstat(descriptor).st_size, HASHED_OFFSETS) // SMALL
    offsets = [generator.randrange(blocks) * SMALL for _ in range(10_000)]
    buffer = mmap.mmap(-1, SMALL)  # O_DIRECT wants an aligned one
    done, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        for offset in offsets[done % 10_000 :][:100]:
            if os.preadv(descriptor, [buffer], offset) != SMALL:
                raise OSError(f"short read at {offset}")
        done += 100
    with counted.get_lock():
        counted.value += done


def sequential_reads(file: Path) -> float:
    """Return the MiB a second of one pass in pieces of 1 MiB."""
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, LARGE)
    size, offset, start = os.fstat(descriptor).st_size, 0, time.monotonic()
    while offset < size:
        offset += os.preadv(descriptor, [buffer], offset)
    os.close(descriptor)
    return size / (1 << 20) / (time.monotonic() - start)


def content(file: Path) -> str:
    """Return a hash of the file, so that a fast wrong answer does not count."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

"""Where data and holes are by the word of qemu-img map, and what lseek(2) has to answer then."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = ["data_ranges", "places_to_ask", "seek_answer"]

Range = tuple[int, int]  # start and end


def data_ranges(said: Iterable[dict[str, Any]]) -> list[Range]:
    """Return the ranges that hold data, joined, of what qemu-img map said.

    `data` alone decides: `zero` is also true of data that QEMU finds to be a hole of the host's file.
    """
    found: list[Range] = []
    for extent in said:
        start, end = extent["start"], extent["start"] + extent["length"]
        if extent["data"] and found and found[-1][1] == start:
            found[-1] = found[-1][0], end
        elif extent["data"]:
            found.append((start, end))
    return found


def seek_answer(data: list[Range], size: int, offset: int, whence: int) -> int | None:
    """Return what lseek(2) answers, None for ENXIO. A hole is at the end of each file."""
    if offset >= size:
        return None
    if whence == os.SEEK_HOLE:
        return next((min(end, size) for start, end in data if start <= offset < end), offset)
    return next((max(start, offset) for start, end in data if end > offset), None)


def places_to_ask(data: list[Range], size: int, seed: int) -> Iterator[int]:
    """Yield offsets: the ends of each range and the byte on either side, the disk's ends, and some anywhere."""
    yield from (0, size - 1, size, size + 1, 1 << 62)
    for boundary in {place for both in data for place in both}:
        yield from (place for place in (boundary - 1, boundary, boundary + 1) if place >= 0)
    dice = random.Random(seed)
    yield from (dice.randrange(size) for _ in range(20))

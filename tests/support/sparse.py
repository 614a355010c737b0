"""A digest of what a file holds, for files of a terabyte that are nearly all holes."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterable, Iterator

__all__ = ["digest", "pieces_of"]

UNIT = 4096
ZEROS = bytes(UNIT)
CHUNK = 1 << 20


def digest(pieces: Iterable[tuple[int, bytes]]) -> str:
    """Return a digest of a file, the same however it is cut into pieces: (place, bytes), in order, zeros between."""
    made = hashlib.sha256()
    place, unit = 0, b""  # what is known of the unit at `place`
    for start, data in pieces:
        assert start >= place + len(unit), "pieces overlap"
        while data:
            at = start // UNIT * UNIT
            if at != place:
                _take(made, place, unit)
                place, unit = at, b""
            length = UNIT - (start - at)
            unit = unit.ljust(start - at, b"\0") + data[:length]
            start, data = start + length, data[length:]
    _take(made, place, unit)
    return made.hexdigest()


def _take(made: hashlib._Hash, place: int, unit: bytes) -> None:
    unit = unit.rstrip(b"\0")
    if unit:
        made.update(place.to_bytes(8, "little") + unit)


def pieces_of(path: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the data of a file, as far as the kernel says that there may be some."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOATIME)
    try:
        at = 0
        while True:
            try:
                at = os.lseek(descriptor, at, os.SEEK_DATA)
            except OSError as error:
                assert error.errno == errno.ENXIO
                return
            end = os.lseek(descriptor, at, os.SEEK_HOLE)
            while at < end:
                data = os.pread(descriptor, min(CHUNK, end - at), at)
                yield at, data
                at += len(data)
    finally:
        os.close(descriptor)

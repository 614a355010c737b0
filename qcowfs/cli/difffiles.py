"""`qcowfs diff` of files: a line for each that differs, totals of directories, or a document.

Used by diff.py.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import qcowfs.cli
from qcowfs._core import Disk
from qcowfs.cli import output
from qcowfs.cli.inside import Inside, Spot, open_images
from qcowfs.cli.ls import MAX_JSON_ERRORS, SECOND, TYPES
from qcowfs.cli.points import split_image
from qcowfs.errors import PointNotFound, SourceError, TreeFault, printable
from qcowfs.filediff import ADDED, METADATA, MODIFIED, REMOVED, RENAMED, TYPE, Change, Comparison
from qcowfs.inside.walk import Place, join
from qcowfs.pointdiff import differences

__all__ = ["run_files"]

LETTERS = {ADDED: b"A", REMOVED: b"D", MODIFIED: b"M", METADATA: b"m", TYPE: b"T", RENAMED: b"R"}
COLUMNS = ("ADDED", "DELETED", "MODIFIED", "METADATA", "TYPE", "RENAMED", "DIRECTORY")
NUMBERS = tuple(range(len(COLUMNS) - 1))
DIFFERENT = 1
CURRENT = "current"

logger = logging.getLogger("qcowfs")


class _Output(Protocol):
    def add(self, change: Change) -> None: ...
    def tell(self, path: bytes, what: str) -> None: ...
    def end(self) -> None: ...


def run_files(args: argparse.Namespace) -> int:
    """Print what differs; what is damaged goes to standard error, and does not stop the rest."""
    with _opened(args) as sides:
        out: _Output = _Document(sides, stat=args.stat) if args.json else _Totals() if args.stat else _Lines()
        teller = _Teller(sides, out)
        code = 0
        for path, old, new in _pairs(sides, _paths(sides, args.paths), teller):
            # One each: a directory that was asked for twice is not damaged.
            comparison = Comparison(partial(_file_of, sides), checksum=args.checksum, tell=teller.tell)
            for change in differences(comparison, path, old, new, _too_many):
                out.add(change)
                code = DIFFERENT
        out.end()
    return SourceError.exit_code if teller.troubles else code


def _paths(sides: tuple[_Side, _Side], words: list[str]) -> list[bytes]:
    """Return what is to be compared, each part of it once; all if there are no words."""
    paths = list(dict.fromkeys(sides[0].spot.place.plain(os.fsencode(word)) for word in words)) or [b""]
    return [path for path in paths if not any(_is_below(path, other) for other in paths)]


def _is_below(path: bytes, other: bytes) -> bool:
    return path != other and (not other or path.startswith(other + b"/"))


class _Side(NamedTuple):
    """One of the two points."""

    inside: Inside
    spot: Spot


@contextmanager
def _opened(args: argparse.Namespace) -> Iterator[tuple[_Side, _Side]]:
    """Open the image or the two images of the command line, and find both points."""
    if args.new is not None:
        with open_images(args, [None]) as (inside,):
            yield _side(inside, args.old), _side(inside, args.new)
        return
    (first, old), (second, new) = split_image(args.image), split_image(args.old)
    formats = args.image_format, args.new_format or args.image_format
    with open_images(args, [first, second], formats) as (inside, other):
        yield _side(inside, old or CURRENT), _side(other, new or CURRENT)


def _side(inside: Inside, point: str) -> _Side:
    return _Side(inside, inside.find(point, follow=True))


def _file_of(sides: tuple[_Side, _Side], disk: Disk, depth: int) -> object:
    old, new = (side.inside for side in sides)
    return (old if disk in old.chains else new).file_of(disk, depth)


def _pairs(
    sides: tuple[_Side, _Side], paths: list[bytes], teller: _Teller
) -> Iterator[tuple[bytes, Place | None, Place | None]]:
    """Yield each path with what it is in both points."""
    for path in paths:
        found: list[Place | None] = []
        for number, side in enumerate(sides):
            try:
                found.append(_place(side, path))
            except TreeFault as fault:
                teller.tell(number, path, fault.what, hint=fault.hint)
        if len(found) < len(sides):
            continue
        if found == [None, None]:
            raise PointNotFound(sides[0].spot.image, printable(path), "it is in neither of the points")
        yield path, found[0], found[1]


def _place(side: _Side, path: bytes) -> Place | None:
    try:
        return side.spot.place.resolve(path, follow=False)
    except TreeFault as fault:
        if fault.errno in (errno.ENOENT, errno.ENOTDIR):
            return None
        raise


def _too_many() -> None:
    logger.warning("there are too many differences to look for renames: they are told as deleted and added")


class _Teller:
    """Tells what is damaged on standard error, and counts it."""

    def __init__(self, sides: tuple[_Side, _Side], out: _Output) -> None:
        self.troubles = 0
        self._sides = sides
        self._out = out

    def tell(self, side: int | None, path: bytes, what: str, *, hint: str | None = None) -> None:
        spots = [found.spot for found in self._sides]
        where = os.fsdecode(path) if side is None else spots[side].where(join(spots[side].path, path))
        self.troubles += 1
        self._out.tell(path, what)
        qcowfs.cli.report(TreeFault(where, what, hint=hint))


class _Lines:
    """A letter and a path each: names as they are for programs, escaped for a terminal."""

    def add(self, change: Change) -> None:
        text = output.name_text(change.path or b".")
        if change.old_path is not None:
            text = output.name_text(change.old_path) + b" -> " + text
        output.write_bytes(LETTERS[change.kind] + b" " + text + b"\n")

    def tell(self, path: bytes, what: str) -> None:
        """Standard error has it."""

    def end(self) -> None:
        """Nothing is left."""


class _Totals:
    """How many differ in each directory, themselves and not what is in directories below."""

    def __init__(self) -> None:
        self.counts: dict[bytes, dict[str, int]] = {}

    def add(self, change: Change) -> None:
        counts = self.counts.setdefault(change.path.rpartition(b"/")[0], dict.fromkeys(LETTERS, 0))
        counts[change.kind] += 1

    def tell(self, path: bytes, what: str) -> None:
        """Standard error has it."""

    def end(self) -> None:
        """Print the table, with its sums."""
        rows = [[*map(str, counts.values()), printable(path) or "."] for path, counts in self.counts.items()]
        sums = [str(sum(counts[kind] for counts in self.counts.values())) for kind in LETTERS]
        output.print_table(COLUMNS, [*rows, [*sums, "(all)"]], right=NUMBERS)


class _Document:
    """Output as one JSON document, a difference in a line, as they come."""

    def __init__(self, sides: tuple[_Side, _Side], *, stat: bool) -> None:
        head = {"version": 1} | {
            key: {"image": output.path_text(side.spot.image), "point": output.path_text(side.spot.point)}
            for key, side in zip(("old", "new"), sides, strict=True)
        }
        self._totals = _Totals() if stat else None
        self._errors: list[dict[str, str | None]] = []
        self._separator = "\n"
        print(json.dumps(head)[:-1] + f', "{"directories" if stat else "changes"}": [', end="")

    def add(self, change: Change) -> None:
        if self._totals is not None:
            self._totals.add(change)
        else:
            self._print(_facts(change))

    def tell(self, path: bytes, what: str) -> None:
        """Keep what is wrong for the end of the document."""
        if len(self._errors) < MAX_JSON_ERRORS:
            self._errors.append({**output.image_text("path", path), "error": what})

    def end(self) -> None:
        """Print the end of the document."""
        if self._totals is not None:
            for path, counts in self._totals.counts.items():
                self._print({**output.image_text("path", path), **counts})
        print("\n], " + json.dumps({"errors": self._errors})[1:])

    def _print(self, facts: dict[str, Any]) -> None:
        print(self._separator + json.dumps(facts), end="")
        self._separator = ",\n"


def _facts(change: Change) -> dict[str, Any]:
    facts: dict[str, Any] = {"change": change.kind, **output.image_text("path", change.path)}
    if change.old_path is not None:
        facts |= output.image_text("old_path", change.old_path)
    if change.differs:
        facts["differs"] = list(change.differs)
    for key, place in (("old", change.old), ("new", change.new)):
        if place is not None:
            facts[key] = _attributes(place)
    return facts


def _attributes(place: Place) -> dict[str, Any]:
    inode = place.inode
    facts: dict[str, Any] = {"type": TYPES[stat.S_IFMT(inode.mode)]}
    if inode.error:
        return facts
    return facts | {
        "mode": f"{stat.S_IMODE(inode.mode):04o}",
        "uid": inode.uid,
        "gid": inode.gid,
        "size": inode.size,
        "mtime": output.utc_date(inode.mtime * SECOND + inode.mtime_ns),
    }

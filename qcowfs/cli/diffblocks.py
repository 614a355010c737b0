"""`qcowfs diff --blocks`: in which ranges of bytes two points differ.

Used by diff.py.
"""

from __future__ import annotations

import argparse
import logging
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from qcowfs import limits
from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs.blockdiff import DEFAULT_GRANULARITY, differing
from qcowfs.chain import Chain
from qcowfs.cli import output, report
from qcowfs.cli.options import open_chain
from qcowfs.cli.points import find_named, split_image
from qcowfs.errors import QcowfsError, ReadFault, SourceError, UsageError, printable
from qcowfs.snapshot import Point, open_disk, require_unchanged

__all__ = ["EXAMPLES", "configure_blocks", "run_blocks"]

EXAMPLES = """
With --blocks it is the ranges of bytes. What the tables of both points prove equal is not read, so that two snapshots
of a large disk are compared in no time. Past the end of the smaller one zeros are no difference, as for qemu-img
compare. The exit code is 10 if some ranges cannot be read.

  qcowfs diff --blocks image.qcow2 before-upgrade current
  qcowfs diff --blocks --json --granularity 64K image.qcow2 monday tuesday
  qcowfs diff --blocks --image-format raw a.raw b.raw && echo the same
"""

SAME, DIFFERENT, UNREADABLE = 0, 1, SourceError.exit_code

logger = logging.getLogger("qcowfs")


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two points: `point` is its name in a mount."""

    image: str
    point: str
    at: Point
    disk: Disk

    def document(self) -> dict[str, Any]:
        return {
            "image": output.path_text(self.image),
            "point": output.path_text(self.point),
            "virtual_size": self.disk.virtual_size,
        }


class _Faults:
    """Ranges that cannot be compared: neighbours as one, each with its first fault; `more` were too many to keep."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, int, ReadFault]] = []
        self.more = 0

    def add(self, start: int, length: int, fault: ReadFault) -> None:
        if self.kept and not self.more and sum(self.kept[-1][:2]) == start:
            self.kept[-1] = (self.kept[-1][0], self.kept[-1][1] + length, self.kept[-1][2])
        elif len(self.kept) < limits.MAX_LISTED_FAULTS:
            self.kept.append((start, length, fault))
        else:
            self.more += 1


def configure_blocks(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a diff of bytes."""
    parser.add_argument("--blocks", action="store_true", help="compare the disks byte by byte, not their files")
    parser.add_argument(
        "--granularity",
        metavar="SIZE",
        help="bytes that differ or are the same as a whole, a power of two, K or M behind it; 1 is exact "
        f"(default: {DEFAULT_GRANULARITY})",
    )


def run_blocks(args: argparse.Namespace) -> int:
    """Print the ranges; return how the points compare."""
    granularity = DEFAULT_GRANULARITY if args.granularity is None else _granularity(args.granularity)
    with ExitStack() as stack:
        old, new = _sides(args, stack)
        faults = _Faults()
        found = differing(old.disk, new.disk, granularity=granularity, on_fault=faults.add)
        printed = _Document(old, new, granularity) if args.json else _Table(old, new)
        count = total = 0
        for start, length in found:
            printed.add(start, length)
            count, total = count + 1, total + length
        for side in (old, new):
            require_unchanged([side.at])
        printed.end(count, total, faults)
        return UNREADABLE if faults.kept else DIFFERENT if count else SAME


def _granularity(text: str) -> int:
    from qcowfs.mountoptions import byte_count  # 5 ms, and hardly anybody gives a size

    size = byte_count(text)
    if size & (size - 1) or not 1 <= size <= limits.MAX_GRANULARITY:
        hint = f"a power of two up to {limits.MAX_GRANULARITY >> 20}M: 1, 512, 4K, 1M"
        raise UsageError(f"'{printable(text)}' is not a size to tell apart", hint=hint)
    return size


def _sides(args: argparse.Namespace, stack: ExitStack) -> tuple[_Side, _Side]:
    cache = Cache(limits.DEFAULT_CACHE_SIZE)
    if args.new is not None:
        chain = stack.enter_context(open_chain(args))
        return _side(chain, args.old, cache), _side(chain, args.new, cache)
    (image, old), (other, new) = split_image(args.image), split_image(args.old)
    first = stack.enter_context(open_chain(args, image, other_format=args.image_format))
    second = stack.enter_context(open_chain(args, other, other_format=args.new_format or args.image_format))
    return _side(first, old, cache), _side(second, new, cache)


def _side(chain: Chain, text: str | None, cache: Cache) -> _Side:
    name, point = find_named(chain, "current" if text is None else text)
    if not point.frozen:
        logger.warning("%s: another process is writing what %s reads", printable(chain.image), printable(name))
    return _Side(chain.image, name, point, open_disk(chain, point, cache))


class _Table:
    """The ranges for a person; what cannot be read goes to standard error."""

    def __init__(self, old: _Side, new: _Side) -> None:
        self._sizes = old.disk.virtual_size, new.disk.virtual_size
        self._begun = False

    def add(self, start: int, length: int) -> None:
        if not self._begun:
            print(f"{'Offset':<16}Length")
        self._begun = True
        print(f"{start:<#16x}{length:#x}")

    def end(self, count: int, total: int, faults: _Faults) -> None:
        for start, length, fault in faults.kept:
            report(QcowfsError(f"cannot compare {start:#x} to {start + length:#x}: {fault}"))
        if faults.more:
            report(QcowfsError(f"cannot compare {faults.more} more ranges"))
        if count:
            verb = "differs" if total == 1 else "differ"
            print(f"{output.counted(count, 'range')}, {output.counted(total, 'byte')}{_rounded(total)} {verb}")
        if self._sizes[0] != self._sizes[1]:
            print(f"virtual sizes differ: {self._sizes[0]} and {self._sizes[1]} bytes")


def _rounded(size: int) -> str:
    """Return a size for people behind the exact one, where it is another."""
    return f" ({output.human_size(size)})" if size >= 1024 else ""


class _Document:
    """The ranges for programs, one a line, printed as they are found."""

    def __init__(self, old: _Side, new: _Side, granularity: int) -> None:
        import json  # 5 ms, which the table does without

        self._dumps = json.dumps
        self._separator = "\n"
        print("{")
        for key, value in (("old", old.document()), ("new", new.document()), ("granularity", granularity)):
            print(f'    "{key}": {self._dumps(value)},')
        print('    "ranges": [', end="")

    def add(self, start: int, length: int) -> None:
        print(f'{self._separator}        {{"start": {start}, "length": {length}}}', end="")
        self._separator = ",\n"

    def end(self, count: int, total: int, faults: _Faults) -> None:
        told = [{"start": start, "length": length, "error": str(fault)} for start, length, fault in faults.kept]
        print("\n    ]," if count else "],")
        print(f'    "bytes": {total},')
        print(f'    "faults": {self._dumps(told)},')
        print(f'    "more_faults": {faults.more},')
        print(f'    "same": {self._dumps(False if count else None if told else True)}')
        print("}")

"""`qcowfs restore`: files and trees out of points, into directories of this machine, without a mount."""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import signal
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from types import FrameType
from typing import Any, NamedTuple

import qcowfs.cli
from qcowfs import limits
from qcowfs.cli import output
from qcowfs.cli.cat import print_file
from qcowfs.cli.inside import Inside, Spot, open_inside, plain
from qcowfs.cli.ls import MAX_JSON_ERRORS, TYPES
from qcowfs.cli.options import add_image_options, add_inside_options, add_json_option
from qcowfs.errors import PointNotFound, QcowfsError, UsageError, printable
from qcowfs.history import versions
from qcowfs.inside.walk import Place
from qcowfs.restore.destination import Destination
from qcowfs.restore.directory import Existing
from qcowfs.restore.ledger import Ledger, Listener
from qcowfs.restore.restorer import NoRoom, Restorer

logger = logging.getLogger("qcowfs")

HELP = "copy files and trees out of a point"
PLACES_HELP = "a point of qcowfs list, and a path in its directory of a mount; a slash at its end: what is in it"
EXAMPLES = """\
It copies as 'cp -a' from a mount would: owners (as root), modes, times, extended attributes, ACLs, hard links, holes.
If DEST is a directory that exists, each thing is put into it under its own name. With a slash at the end of PATH, or
without a PATH, it is what is in the directory that is copied to DEST. Nothing is overwritten without --force.

examples:
  qcowfs restore image.qcow2 before-upgrade:p2/etc/fstab .            one file, as ./fstab
  qcowfs restore image.qcow2 before-upgrade:p2/etc etc.old            a tree, as etc.old if there is no etc.old
  qcowfs restore image.qcow2 monday:p2/home/eve/ /home/eve --backup   what is there is kept as NAME.~1~
  qcowfs restore image.qcow2 monday:p2/etc monday:p2/var/lib /tmp/x/  several, into a directory
  qcowfs restore image.qcow2 monday:VG-LV/ /mnt/new --verify          a whole file system, read back and compared
  qcowfs restore image.qcow2 --version 2 p2/etc/fstab .               the second version of qcowfs history
  qcowfs restore image.qcow2 monday:p2/etc/fstab - | diff /etc/fstab -

See qcowfs-restore(1).
"""
DESCRIPTORS = 256  # for all but the directories: images, workers
VERSIONS_HINT = "qcowfs history shows the versions of a path"
SHOWN_POINTS = 5  # in a hint
CLEAR = "\r\x1b[K"
STDOUT = "-"
PROGRESS_SECONDS = 0.2
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs restore`."""
    add_image_options(parser)
    parser.add_argument("places", metavar="POINT:PATH", nargs="+", help=PLACES_HELP)
    parser.add_argument("dest", metavar="DEST", help="a directory, or a new name; -: standard output, for one file")
    replace = parser.add_mutually_exclusive_group()
    replace.add_argument("--force", action="store_true", help="replace files that are there, and change directories")
    replace.add_argument("--backup", action="store_true", help="rename what is there to NAME.~1~, NAME.~2~ and so on")
    parser.add_argument("--verify", action="store_true", help="read back what was written, and compare it")
    parser.add_argument(
        "--keep-damaged", action="store_true", help="restore files that can be read in part, with zeros for the rest"
    )
    parser.add_argument(
        "--version",
        metavar="N",
        type=_number,
        help="take PATHs without a POINT, and of each the N-th version that qcowfs history prints",
    )
    add_json_option(parser)
    add_inside_options(parser)


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text[:10]) < 10**9:
        raise argparse.ArgumentTypeError(f"'{printable(text)}' is no number of a version")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Restore everything; what cannot be goes to standard error, and does not stop the rest."""
    if args.dest == STDOUT and (args.json or args.verify or args.force or args.backup or args.keep_damaged):
        raise UsageError("standard output can have the bytes of a file, and nothing else")
    if args.dest == STDOUT and len(args.places) > 1:
        raise UsageError("standard output can have one file", hint="./- is a file of that name")
    with open_inside(args) as inside:
        if args.dest == STDOUT:
            print_file(_spot(inside, args.places[0], args.version, follow=True))
            return 0
        sources = [_source(inside, text, args.version) for text in args.places]
        with _signals() as signals:
            code = _restore(args, sources, signals)
    signals.end()
    return code


def _spot(inside: Inside, text: str, version: int | None, *, follow: bool) -> Spot:
    """Return what POINT:PATH means, or PATH in the first point that has this version of it."""
    if version is None:
        return inside.find(text, follow=follow)
    return inside.find_in(_point_of_version(inside, version, text), text, follow=follow)


def _point_of_version(inside: Inside, number: int, path: str) -> str:
    def tell(point: str, at: bytes, error: QcowfsError) -> None:
        logger.warning("%s: %s", printable(f"{point}:{os.fsdecode(at)}" if at else point), error)

    found = [one for one in versions(inside, plain(os.fsencode(path)), tell) if one.number is not None]
    chosen = next((one for one in found if one.number == number), None)
    if chosen is None:
        known = len({one.number for one in found})
        why = f"there {'is' if known == 1 else 'are'} {known}" if known else "it is in no point"
        raise PointNotFound(inside.chain.image, f"no version {number} of {printable(path)}", why, hint=VERSIONS_HINT)
    return chosen.points[0]


class _Stopped(BaseException):
    """A signal asked for the end."""


class _Signals:
    """What asks for the end: it comes between two pieces, and the second time at once."""

    def __init__(self) -> None:
        self._number = 0

    def note(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._number:
            raise KeyboardInterrupt
        self._number = number

    def check(self) -> None:
        """Raise if the end is asked for."""
        if self._number:
            raise _Stopped(f"ended by {signal.Signals(self._number).name}")

    def end(self) -> None:
        """End as the signal would have ended this process."""
        if self._number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._number:
            sys.stdout.flush()
            os.kill(os.getpid(), self._number)


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals()
    before = [(number, handler) for number in ENDING if (handler := signal.getsignal(number)) != signal.SIG_IGN]
    for number, _ in before:  # nohup, and shells for what runs in the background, have them ignored
        signal.signal(number, signals.note)
    try:
        yield signals
    finally:
        for number, handler in before:
            signal.signal(number, handler)


class _Source(NamedTuple):
    """What is restored, and its name below a directory: b"" if it is what is in it that is restored."""

    spot: Spot
    name: bytes


def _source(inside: Inside, text: str, version: int | None) -> _Source:
    try:
        spot = _spot(inside, text, version, follow=False)
    except PointNotFound as error:
        if version is not None:
            raise
        raise _with_points(inside, text, error) from error
    name = spot.path.rpartition(b"/")[2]
    return _Source(spot, b"" if name == b".." or text.endswith(("/", "/.")) else name)


def _with_points(inside: Inside, text: str, error: PointNotFound) -> PointNotFound:
    """Let an error about a path tell which points have it, if there are any."""
    others: list[str] = []
    with suppress(PointNotFound):  # the point is what was not found
        others = inside.elsewhere(text)
    if others:
        shown = ", ".join(printable(name) for name in others[:SHOWN_POINTS])
        error.hint = f"it is in {shown}{f' and {len(others) - SHOWN_POINTS} more' * (len(others) > SHOWN_POINTS)}"
    return error


def _restore(args: argparse.Namespace, sources: Sequence[_Source], signals: _Signals) -> int:
    existing = Existing.REPLACED if args.force else Existing.RENAMED if args.backup else Existing.KEPT
    listener: _Lines | _Document = _Document(args) if args.json else _Lines()
    ledger = Ledger(listener)
    _allow_descriptors(limits.MAX_WALK_DEPTH + DESCRIPTORS)
    restorer = Restorer(ledger, signals.check, verify=args.verify, keep_damaged=args.keep_damaged)
    try:
        directories = all(stat.S_ISDIR(spot.place.inode.mode) for spot, _ in sources)
        typed = os.fsencode(args.dest)
        with closing(Destination(typed, existing, directories=directories, several=len(sources) > 1)) as at:
            for spot, name in sources:
                restorer.restore(spot.place, at.directory, at.name or name, at.shown)
    except NoRoom as error:
        ledger.failed(b"", f"{error}; what comes after it is not restored")
    except _Stopped as error:
        ledger.failed(b"", f"{error}: what was restored is complete, the rest is not restored")
    listener.end(ledger)
    return QcowfsError.exit_code if ledger.errors else 0


def _allow_descriptors(count: int) -> None:
    """Let this process have one for each directory from the top down to the deepest, if it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Progress:
    """A line on a terminal that is written again and again."""

    def __init__(self) -> None:
        self._shown = sys.stderr is not None and sys.stderr.isatty()
        self._began = self._next = time.monotonic()
        self._files = 0
        self._bytes = 0

    def show(self, path: bytes, files: int, count: int) -> None:
        """Show where the restore is, if it is time.

        Args:
            files: further ones.
            count: of further bytes.
        """
        self._files += files
        self._bytes += count
        now = time.monotonic()
        if not self._shown or now < self._next:
            return
        self._next = now + PROGRESS_SECONDS
        rate = output.human_size(int(self._bytes / max(now - self._began, PROGRESS_SECONDS)))
        line = f"{self._files} files, {output.human_size(self._bytes)}, {rate}/s  {printable(path)}"
        self._print(line[: shutil.get_terminal_size().columns - 1])

    def clear(self) -> None:
        """Remove the line."""
        if self._shown:
            self._print("")

    def _print(self, line: str) -> None:
        with suppress(OSError):  # the terminal has gone
            print(CLEAR, line, sep="", end="", file=sys.stderr, flush=True)


class _Lines(Listener):
    """Says nothing of what went well."""

    def __init__(self) -> None:
        self._progress = _Progress()
        self._skips = False
        self._hints: set[str | None] = set()

    def restored(self, path: bytes, place: Place) -> None:
        self._progress.show(path, 1, 0)

    def moved(self, path: bytes, count: int) -> None:
        self._progress.show(path, 0, count)

    def skipped(self, path: bytes, why: str) -> None:
        if not self._skips:
            self.warned(path, f"left out, with all like it: {why}")
        self._skips = True

    def failed(self, path: bytes, what: str, hint: str | None) -> None:
        self._progress.clear()
        where = f"{printable(path)}: " if path else ""
        qcowfs.cli.report(QcowfsError(f"{where}{what}", hint=hint if hint not in self._hints else None))
        self._hints.add(hint)

    def warned(self, path: bytes, what: str) -> None:
        self._progress.clear()
        logger.warning("%s: %s", printable(path), what)

    def end(self, ledger: Ledger) -> None:
        """Nothing more is to come."""
        self._progress.clear()


class _Document(_Lines):
    """Also prints one JSON document, a line for everything that was restored, as it comes."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        head = {"version": 1, "image": output.path_text(args.image), "destination": output.path_text(args.dest)}
        print(json.dumps(head)[:-1] + ', "restored": [', end="")
        self._separator = "\n"
        self._told: dict[str, list[dict[str, Any]]] = {"skipped": [], "warnings": [], "errors": []}

    def restored(self, path: bytes, place: Place) -> None:
        super().restored(path, place)
        entry = {**output.image_text("path", path), "type": TYPES[stat.S_IFMT(place.inode.mode)]}
        print(self._separator + json.dumps({**entry, "size": place.inode.size}), end="")
        self._separator = ",\n"

    def skipped(self, path: bytes, why: str) -> None:
        super().skipped(path, why)
        self._tell("skipped", path, "reason", why)

    def failed(self, path: bytes, what: str, hint: str | None) -> None:
        super().failed(path, what, hint)
        self._tell("errors", path, "error", what)

    def warned(self, path: bytes, what: str) -> None:
        super().warned(path, what)
        self._tell("warnings", path, "warning", what)

    def end(self, ledger: Ledger) -> None:
        super().end(ledger)
        totals = {"files": ledger.files, "directories": ledger.directories, "bytes": ledger.bytes}
        print("\n], " + json.dumps({**totals, **self._told})[1:])

    def _tell(self, key: str, path: bytes, word: str, text: str) -> None:
        if len(self._told[key]) < MAX_JSON_ERRORS:
            self._told[key].append({**(output.image_text("path", path) if path else {}), word: text})

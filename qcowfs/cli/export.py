"""`qcowfs export`: a point as a file of its own, or all points as a chain of files."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from qcowfs import gate, limits
from qcowfs._cache import Cache
from qcowfs.chain import Chain
from qcowfs.cli import output
from qcowfs.cli.options import add_image_options, add_json_option, open_chain
from qcowfs.cli.points import find_point, named_points
from qcowfs.cli.progress import Progress, on_terminal
from qcowfs.errors import QcowfsError, SourceError, UsageError, printable
from qcowfs.export import job
from qcowfs.export.backing import recorded, verified
from qcowfs.export.compression import COMPRESSIONS
from qcowfs.export.copying import Report, Unreadable, stream
from qcowfs.export.job import Form, Written
from qcowfs.export.qcow2file import Backing
from qcowfs.export.target import require_free
from qcowfs.snapshot import Point, by_age, open_disk, require_unchanged
from qcowfs.vfs import names

HELP = "write a point to a file of its own, or all points to a chain of files"
EXAMPLES = """\
OUT is a sparse raw disk, or with -O qcow2 an image that stands alone; - is standard output. With --since OUT is an
overlay of a file that holds the older point, with just what changed. With --all every point that no one is writing
becomes a file in DIR, the oldest one alone, each of the others an overlay of the one before it.

examples:
  qcowfs export image.qcow2 before-upgrade disk.raw
  qcowfs export -O qcow2 -c image.qcow2 before-upgrade disk.qcow2
  qcowfs export --since monday --backing monday.qcow2 image.qcow2 tuesday tuesday.qcow2
  qcowfs export --all chain/ image.qcow2
  qcowfs export image.qcow2 before-upgrade - | ssh host 'cat > disk.raw'

See qcowfs-export(1).
"""

COLUMNS = ("POINT", "FILE", "VIRTUAL SIZE", "DISK SIZE", "BACKING FILE")
NUMBERS = (2, 3)
STANDARD_OUTPUT = "-"
ENDING = (signal.SIGTERM, signal.SIGHUP)
MOST_NAMED = 20  # ranges that are named one by one; a person reads no more
UNREADABLE = 1  # the exit code of an export that is not whole


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs export`."""
    add_image_options(parser)
    parser.add_argument("point", metavar="POINT", nargs="?", help="a name of qcowfs list, an id or a snapshot's name")
    parser.add_argument("out", metavar="OUT", nargs="?", help="the file to make; - for standard output")
    parser.add_argument(
        "-O", dest="format", choices=("raw", "qcow2"), help="the format of OUT (default: raw; qcow2 for overlays)"
    )
    parser.add_argument("--since", metavar="OLDER", help="make OUT an overlay with what changed since the point OLDER")
    parser.add_argument("--backing", metavar="FILE", help="the file that holds OLDER, as OUT is to name it")
    parser.add_argument("--backing-format", choices=("qcow2", "raw"), help="the format of that file (default: qcow2)")
    parser.add_argument("--all", metavar="DIR", help="write every point to a file in DIR, as a chain")
    parser.add_argument("-c", dest="compress", action="store_true", help="compress, on all processors")
    parser.add_argument("--compression", choices=tuple(COMPRESSIONS), help="how (default: zlib); implies -c")
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--keep-going", action="store_true", help="write zeros where something cannot be read, and name it"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Write the files."""
    _check(args)
    with _interruptible(), open_chain(args) as chain:
        if args.all is not None:
            return _export_all(args, chain)
        point = find_point(chain, args.point)
        if args.out == STANDARD_OUTPUT:
            return _export_to_stdout(args, chain, point)
        old = None if args.since is None else find_point(chain, args.since)
        written = _export(args, chain, point, args.out, old, _backing(args, old))
    if args.json:
        output.print_json(document(chain, [(args.point, written)]))
    return _told([(args.point, written.unreadable)])


@contextmanager
def _interruptible() -> Iterator[None]:
    """End as with Ctrl-C where a signal would kill: a half file is to be removed. SIGKILL leaves its temporary name."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def document(chain: Chain, files: Sequence[tuple[str, Written]]) -> dict[str, Any]:
    """Return the document of `export --json`."""
    return {
        "version": 1,
        "image": output.path_text(chain.image),
        "files": [_file(name, written) for name, written in files],
    }


def _check(args: argparse.Namespace) -> None:
    """Refuse words that contradict each other, before anything is opened."""
    if args.all is not None and (args.point is not None or args.since is not None):
        raise UsageError("--all takes every point: it goes with no POINT, OUT or --since")
    if args.all is None and args.out is None:
        raise UsageError("POINT and OUT are needed", hint="qcowfs list shows the points; - is standard output")
    if (args.since is None) != (args.backing is None):
        raise UsageError(
            "--since and --backing go together", hint="--backing names the file that holds the older point"
        )
    if args.backing_format is not None and args.backing is None:
        raise UsageError("--backing-format tells of the file of --backing")
    is_raw = _form(args).format == "raw"
    if is_raw and (args.all is not None or args.since is not None):
        raise UsageError("an overlay cannot be raw")
    if is_raw and _form(args).compression is not None:
        raise UsageError("a raw disk cannot be compressed", hint="-O qcow2 can")
    if args.out == STANDARD_OUTPUT and (not is_raw or args.json):
        raise UsageError("standard output takes a raw disk and nothing else")


def _form(args: argparse.Namespace) -> Form:
    is_overlay = args.all is not None or args.since is not None
    compression = args.compression or ("zlib" if args.compress else None)
    return Form(format=args.format or ("qcow2" if is_overlay else "raw"), compression=compression)


def _backing(args: argparse.Namespace, old: Point | None) -> Backing | None:
    if old is None:
        return None
    policy = gate.load_policy(args.allow_backing)
    return verified(args.backing, args.backing_format or "qcow2", args.out, old.virtual_size, policy)


def _export(
    args: argparse.Namespace,
    chain: Chain,
    point: Point,
    path: str,
    old: Point | None,
    below: Backing | None,
) -> Written:
    with ExitStack() as stack:
        return job.export(
            chain,
            point,
            path,
            _form(args),
            old=old,
            backing=below,
            force=args.force,
            keep_going=args.keep_going,
            watch=_watch(stack, os.path.basename(path)) if on_terminal() else None,
        )


def _watch(stack: ExitStack, label: str) -> job.Watch:
    def start(total: Callable[[], int]) -> Report:
        return stack.enter_context(Progress(printable(label), total())).report

    return start


def _export_to_stdout(args: argparse.Namespace, chain: Chain, point: Point) -> int:
    job.require_frozen(chain, point)
    disk = open_disk(chain, point, Cache(limits.DEFAULT_CACHE_SIZE))
    with ExitStack() as stack:
        report = _watch(stack, args.point)(lambda: disk.virtual_size) if on_terminal() else None
        unreadable = stream(disk, output.write_bytes, report, keep_going=args.keep_going)
    require_unchanged([point])
    return _told([(args.point, unreadable)])


def _export_all(args: argparse.Namespace, chain: Chain) -> int:
    steps = list(_steps(chain, args.all))
    if not steps:
        raise QcowfsError(f"{printable(chain.image)}: every point of it is being written")
    _make_directory(args.all)
    for _, _, path in steps:  # all of them first: nothing is written if the last one cannot be
        require_free(path, chain, force=args.force)
    written: list[tuple[str, Written]] = []
    old: Point | None = None
    for name, point, path in steps:
        below = recorded(os.path.basename(written[-1][1].path), "qcow2") if written else None
        written.append((name, _export(args, chain, point, path, old, below)))
        old = point
    if args.json:
        output.print_json(document(chain, written))
    else:
        output.print_table(COLUMNS, [_row(name, one) for name, one in written], right=NUMBERS)
    return _told([(name, one.unreadable) for name, one in written])


def _steps(chain: Chain, directory: str) -> Iterator[tuple[str, Point, str]]:
    """Yield each point that stays as it is, from the oldest on, with its name and the path of its file."""
    named = named_points(chain)
    names_of = {id(point): name for name, point in named}
    for point in by_age(point for _, point in named if point.frozen):
        name = names_of[id(point)]
        yield name, point, os.path.join(directory, names.file_name(name, ".qcow2"))


def _make_directory(path: str) -> None:
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise SourceError.from_oserror(path, "cannot make the directory", error) from error


def _file(name: str, written: Written) -> dict[str, Any]:
    below = written.backing
    return {
        "point": name,
        "file": output.path_text(written.path),
        "format": written.form.format,
        "compression": written.form.compression,
        "virtual_size": written.virtual_size,
        "file_size": written.file_size,
        "disk_size": written.disk_size,
        **output.image_text("backing", None if below is None else below.name),
        "backing_format": None if below is None else below.format,
        "unreadable": [one._asdict() for one in written.unreadable],
    }


def _row(name: str, written: Written) -> list[str]:
    below = written.backing
    return [
        printable(name),
        printable(written.path),
        output.human_size(written.virtual_size),
        output.human_size(written.disk_size),
        "-" if below is None else printable(below.name),
    ]


def _told(exports: Sequence[tuple[str, Sequence[Unreadable]]]) -> int:
    """Name on standard error what could not be read, and return the exit code."""
    found = [(name, one) for name, ranges in exports for one in ranges]
    for name, one in found[:MOST_NAMED]:
        where = f"bytes {one.start:#x} to {one.start + one.length:#x}"
        print(f"qcowfs: {printable(name)}: {where} are zeros: {one.why}", file=sys.stderr)
    if len(found) > MOST_NAMED:
        print(f"qcowfs: and {len(found) - MOST_NAMED} ranges more", file=sys.stderr)
    return UNREADABLE if found else 0

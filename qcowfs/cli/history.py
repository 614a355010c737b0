"""`qcowfs history`: every version of a file over the points of an image."""

from __future__ import annotations

import argparse
import os
import stat
from typing import Any

import qcowfs.cli
from qcowfs.cli import output
from qcowfs.cli.inside import open_inside, plain
from qcowfs.cli.ls import SECOND, TYPES
from qcowfs.cli.options import add_image_options, add_inside_options, add_json_option
from qcowfs.errors import PointNotFound, QcowfsError, TreeFault, printable
from qcowfs.history import Version, histories
from qcowfs.inside.record import Inode

HELP = "tell every version of a file that the points hold"
EXAMPLES = """\
A new version begins where the contents or the type differ from those in the point before; POINTS is how many hold it.
Of a directory the names, types, sizes and times in it are its contents. PATH may have the wildcards *, ? and [...].

examples:
  qcowfs history image.qcow2 p2/etc/fstab           which versions there are, the oldest first
  qcowfs history image.qcow2 'p2/etc/*.conf'        of each of these files
  qcowfs history image.qcow2 etc/fstab              a disk that is one file system
  qcowfs history --json image.qcow2 p2/etc/fstab | jq -r '.files[].versions[] | select(.sha256).point'

'qcowfs cat IMAGE POINT:PATH' prints one of them. See qcowfs-history(1).
"""

COLUMNS = ("VERSION", "POINT", "DATE", "POINTS", "SIZE", "MODIFIED", "SHA-256", "NOTE")
NUMBERS = (0, 3, 4)
PREFIX = 12  # digits of a hash that a person compares


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs history`."""
    add_image_options(parser)
    parser.add_argument("path", metavar="PATH", help="as in a mount below NAME/: p2/etc/fstab, 'p2/etc/*.conf'")
    add_json_option(parser)
    add_inside_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the versions; points that cannot be looked into are named on standard error, and the rest goes on."""
    errors: list[dict[str, str | None]] = []
    code = 0

    def tell(point: str, path: bytes, error: QcowfsError) -> None:
        nonlocal code
        code = max(code, error.exit_code)
        what = error.what if isinstance(error, TreeFault) else str(error)
        errors.append({"point": point, **output.image_text("path", path), "error": what})
        where = f"{point}:{os.fsdecode(path)}" if path else point
        qcowfs.cli.report(TreeFault(where, what, hint=error.hint))

    with open_inside(args) as inside:
        path = plain(os.fsencode(args.path))
        found = histories(inside, path, tell)
        if not found and not code:
            raise PointNotFound(inside.chain.image, printable(path), "no point has it")
        image = output.path_text(inside.chain.image)
    if args.json:
        files = [{**output.image_text("path", name), "versions": list(map(_facts, found[name]))} for name in found]
        output.print_json({"version": 1, "image": image, "files": files, "errors": errors})
    else:
        _print(found, headings=[*found] != [path])
    return code


def _print(found: dict[bytes, list[Version]], *, headings: bool) -> None:
    for number, (path, versions) in enumerate(found.items()):
        if headings:
            print(("\n" if number else "") + printable(path) + ":")
        output.print_table(COLUMNS, [_row(version) for version in versions], right=NUMBERS)


def _row(version: Version) -> list[str]:
    inode = version.inode
    return [
        "-" if version.number is None else str(version.number),
        printable(version.points[0]),
        output.local_date(version.date_ns),
        str(len(version.points)),
        "-" if inode is None or stat.S_ISDIR(inode.mode) else output.human_size(inode.size),
        "-" if inode is None else output.local_date(_mtime(inode)),
        version.digest[:PREFIX] or "-",
        ", ".join(_notes(version)),
    ]


def _notes(version: Version) -> list[str]:
    if version.inode is None:
        return ["deleted"]
    kind = TYPES[stat.S_IFMT(version.inode.mode)]
    return [
        *([] if kind == "file" else [kind]),
        *(["reappeared"] if version.reappeared else []),
        *([f"as version {version.same_as}"] if version.same_as else []),
    ]


def _mtime(inode: Inode) -> int:
    return inode.mtime * SECOND + inode.mtime_ns


def _facts(version: Version) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "number": version.number,
        "point": version.points[0],
        "points": list(version.points),
        "date": output.utc_date(version.date_ns),
        "deleted": version.inode is None,
        "reappeared": version.reappeared,
    }
    if version.inode is None:
        return facts
    return facts | {
        "type": TYPES[stat.S_IFMT(version.inode.mode)],
        "size": version.inode.size,
        "mtime": output.utc_date(_mtime(version.inode)),
        "sha256": version.digest or None,
        "same_as": version.same_as,
    }

"""`qcowfs ls`: what is in a directory inside a point, without a mount."""

from __future__ import annotations

import argparse
import json
import os
import stat
from collections.abc import Iterable
from typing import Any

import qcowfs.cli
from qcowfs.cli import output
from qcowfs.cli.inside import PLACE_HELP, Spot, open_inside
from qcowfs.cli.options import add_image_options, add_inside_options, add_json_option
from qcowfs.errors import TreeFault
from qcowfs.inside.record import Inode
from qcowfs.inside.walk import Children, Place, Trouble, join, unpacked, walk

HELP = "list a directory that is inside a point"
EXAMPLES = """\
POINT is a name of qcowfs list; PATH is what a mount shows below NAME/. Names of points may have colons: the longest
text before a colon that means a point is POINT. A symbolic link at the end is followed if a slash is after it.

examples:
  qcowfs ls image.qcow2                         the partitions and logical volumes as it is now
  qcowfs ls -l image.qcow2 before-upgrade:p2/etc
  qcowfs ls -R image.qcow2 current:VG-LV        every file of a logical volume
  qcowfs ls -R --json image.qcow2 current:p2 | jq -r '.entries[] | select(.size > 1e8).path'
  qcowfs ls disk1.qcow2 --with disk2.qcow2      a volume group on two disks

See qcowfs-ls(1).
"""

TYPES = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character-device",
    stat.S_IFBLK: "block-device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}
SECOND = 1_000_000_000
MAX_JSON_ERRORS = 1000  # that are held until the end of the document; standard error has all of them


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs ls`."""
    add_image_options(parser)
    parser.add_argument("place", metavar="POINT[:PATH]", nargs="?", default="current", help=PLACE_HELP)
    parser.add_argument("-l", dest="long", action="store_true", help="as ls -ln: mode, links, owner, size, date")
    parser.add_argument("-R", dest="recursive", action="store_true", help="and every directory below")
    add_json_option(parser)
    add_inside_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is there; what is damaged goes to standard error, and does not stop the rest."""
    troubles = 0
    with open_inside(args) as inside:
        spot = inside.find(args.place, follow=False)
        listing: _Lines | _Document = _Document(spot) if args.json else _Lines(spot, args)
        for path, directory, found in _directories(spot, recursive=args.recursive):
            found.troubles += listing.add(path, directory, found)
            for name, what in found.troubles:
                listing.tell(join(path, name), what)
                qcowfs.cli.report(TreeFault(spot.where(join(path, name)), what))
            troubles += len(found.troubles)
        listing.end()
    return TreeFault.exit_code if troubles else 0


def _directories(spot: Spot, *, recursive: bool) -> Iterable[tuple[bytes, Place, Children]]:
    if not stat.S_ISDIR(spot.place.inode.mode):
        return [(b"", spot.place, Children([(spot.path, spot.place.inode.pack())]))]
    if recursive:
        return walk(spot.place, spot.path)
    return [(spot.path, spot.place, spot.place.children())]


class _Lines:
    """Output as that of ls(1): names as they are for programs, escaped for a terminal."""

    def __init__(self, spot: Spot, args: argparse.Namespace) -> None:
        self._spot = spot
        self._long = args.long
        self._headings = args.recursive and stat.S_ISDIR(spot.place.inode.mode)
        self._started = False

    def add(self, path: bytes, directory: Place, found: Children) -> list[Trouble]:
        """Print a directory; return what was found to be wrong meanwhile."""
        if self._headings:
            heading = output.name_text(os.fsencode(self._spot.where(path)))
            output.write_bytes((b"\n" if self._started else b"") + heading + b":\n")
        self._started = True
        if self._long:
            return _print_long(directory, found)
        for name, _ in found.entries:
            output.write_bytes(output.name_text(name) + b"\n")
        return []

    def tell(self, path: bytes, what: str) -> None:
        """Standard error has it."""

    def end(self) -> None:
        """Nothing is left."""


def _print_long(directory: Place, found: Children) -> list[Trouble]:
    troubles: list[Trouble] = []
    widths = [0] * 4
    blocks = 0
    for _, inode in map(unpacked, found.entries):
        blocks += inode.blocks
        widths = [max(width, len(text)) for width, text in zip(widths, _numbers(inode), strict=True)]
    if stat.S_ISDIR(directory.inode.mode):
        output.write_bytes(b"total %d\n" % (blocks // 2))
    for name, inode in map(unpacked, found.entries):
        numbers = " ".join(text.rjust(width) for text, width in zip(_numbers(inode), widths, strict=True))
        line = f"{_mode(inode)} {numbers} {_date(inode)} ".encode() + output.name_text(name)
        target = _target(directory, name, inode, troubles)
        output.write_bytes(line + (b"" if target is None else b" -> " + output.name_text(target)) + b"\n")
    return troubles


def _mode(inode: Inode) -> str:
    text = stat.filemode(inode.mode)
    return f"{text[0]}?????????" if inode.error else text


def _numbers(inode: Inode) -> tuple[str, str, str, str]:
    if inode.error:
        return "?", "?", "?", "?"
    device = f"{os.major(inode.rdev)}, {os.minor(inode.rdev)}"
    return str(inode.nlink), str(inode.uid), str(inode.gid), device if _is_device(inode) else str(inode.size)


def _date(inode: Inode) -> str:
    return "?".ljust(16) if inode.error else output.local_date(inode.mtime * SECOND).rpartition(":")[0]


def _is_device(inode: Inode) -> bool:
    return stat.S_ISCHR(inode.mode) or stat.S_ISBLK(inode.mode)


def _target(directory: Place, name: bytes, inode: Inode, troubles: list[Trouble]) -> bytes | None:
    """Return the target of a symbolic link, None for anything else; one that cannot be read is a trouble."""
    if not stat.S_ISLNK(inode.mode) or inode.error:
        return None
    try:
        return directory.target(inode)
    except TreeFault as fault:
        troubles.append(Trouble(name, fault.what))
        return None


class _Document:
    """Output as one JSON document, an entry in a line, as they come."""

    def __init__(self, spot: Spot) -> None:
        head = {"version": 1, "image": output.path_text(spot.image), "point": output.path_text(spot.point)}
        print(json.dumps(head)[:-1] + ', "entries": [', end="")
        self._separator = "\n"
        self._errors: list[dict[str, str | None]] = []

    def add(self, path: bytes, directory: Place, found: Children) -> list[Trouble]:
        """Print the entries of a directory; return what was found to be wrong meanwhile."""
        damaged = dict(found.troubles)
        troubles: list[Trouble] = []
        for name, inode in map(unpacked, found.entries):
            target = _target(directory, name, inode, troubles)
            entry = _facts(join(path, name), inode, target, damaged.get(name))
            print(self._separator + json.dumps(entry), end="")
            self._separator = ",\n"
        return troubles

    def tell(self, path: bytes, what: str) -> None:
        """Keep what is wrong for the end of the document."""
        if len(self._errors) < MAX_JSON_ERRORS:
            self._errors.append({**output.image_text("path", path), "error": what})

    def end(self) -> None:
        """Print the end of the document."""
        print("\n], " + json.dumps({"errors": self._errors})[1:])


def _facts(path: bytes, inode: Inode, target: bytes | None, error: str | None) -> dict[str, Any]:
    facts: dict[str, Any] = {
        **output.image_text("name", path.rpartition(b"/")[2]),
        **output.image_text("path", path),
        "type": TYPES[stat.S_IFMT(inode.mode)],
    }
    if inode.ino:
        facts["inode"] = inode.ino
    if inode.error:
        return {**facts, "error": error or os.strerror(inode.error)}
    facts |= {
        "mode": f"{stat.S_IMODE(inode.mode):04o}",
        "nlink": inode.nlink,
        "uid": inode.uid,
        "gid": inode.gid,
        "size": inode.size,
        "blocks": inode.blocks,
        "mtime": output.utc_date(inode.mtime * SECOND + inode.mtime_ns),
        "ctime": output.utc_date(inode.ctime * SECOND + inode.ctime_ns),
        "atime": output.utc_date(inode.atime * SECOND + inode.atime_ns),
    }
    if _is_device(inode):
        facts["device"] = [os.major(inode.rdev), os.minor(inode.rdev)]
    if target is not None:
        facts |= output.image_text("target", target)
    return facts

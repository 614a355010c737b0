"""`qcowfs diff`: what differs between two points: files, or with --blocks bytes."""

from __future__ import annotations

import argparse
import os

from qcowfs.chain import FORMATS
from qcowfs.cli.diffblocks import EXAMPLES as BLOCKS_EXAMPLES
from qcowfs.cli.diffblocks import configure_blocks, run_blocks
from qcowfs.cli.options import add_inside_options, add_json_option, add_opening_options
from qcowfs.cli.points import split_image
from qcowfs.errors import NotAnImage, SourceError, UsageError, printable

__all__ = ["EXAMPLES", "HELP", "configure", "run"]

HELP = "tell which files, or which bytes, differ between two points in time"
FILES_EXAMPLES = """\
Each line is a letter and a path as a mount shows it below NAME/:
  A  added               M  modified: other contents
  D  deleted             m  other metadata only: mode, owner, time, attributes
  R  renamed: OLD -> NEW T  of another type
What is in a renamed directory is compared under its new name. The exit code is 0 if nothing differs, 1 if something
does, 10 if something cannot be compared. Contents are read only where neither the inode nor where it is stored decides.

examples:
  qcowfs diff image.qcow2 before-upgrade current
  qcowfs diff image.qcow2 monday tuesday p2/etc p2/var/lib      only these
  qcowfs diff --stat image.qcow2 monday tuesday                 how much in which directory
  qcowfs diff monday.qcow2:current tuesday.qcow2:current        points of two images
  qcowfs diff --json image.qcow2 monday tuesday | jq -r '.changes[] | select(.change == "added").path'
"""
EXAMPLES = f"{FILES_EXAMPLES}{BLOCKS_EXAMPLES}\nSee qcowfs-diff(1).\n"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs diff`."""
    parser.usage = "%(prog)s [options] IMAGE OLD NEW [PATH ...]\n       %(prog)s [options] IMAGE[:OLD] IMAGE[:NEW]"
    parser.add_argument("image", metavar="IMAGE", help="a qcow2 image; with two arguments, IMAGE:OLD")
    parser.add_argument("old", metavar="OLD", help="a point of qcowfs list; with two arguments, IMAGE:NEW")
    parser.add_argument("new", metavar="NEW", nargs="?", help="another point of IMAGE")
    parser.add_argument("paths", metavar="PATH", nargs="*", default=[], help="compare only this, as in a mount: p2/etc")
    parser.add_argument("--checksum", action="store_true", help="compare all contents, whatever the inodes say")
    parser.add_argument("--stat", action="store_true", help="print how many differ in each directory")
    configure_blocks(parser)
    add_opening_options(parser)
    parser.add_argument("--new-format", choices=FORMATS, help="the format of the second image, if it is another one")
    add_json_option(parser)
    add_inside_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the differences."""
    if args.new is not None and args.new_format:
        raise UsageError("--new-format is for a second image, and there is one only")
    if not args.blocks and args.granularity is not None:
        raise UsageError("--granularity goes with --blocks")
    if args.blocks and (args.paths or args.checksum or args.stat or args.norecovery or args.others):
        raise UsageError(
            "--blocks compares whole disks: PATH, --checksum, --stat, --norecovery and --with are for files"
        )
    try:
        if args.blocks:
            return run_blocks(args)
        from qcowfs.cli.difffiles import run_files  # 40 ms, half of what a comparison of blocks takes

        return run_files(args)
    except SourceError as error:
        if args.new is None and not os.path.lexists(split_image(args.old)[0]):
            error.hint = error.hint or "for two points of one image, give IMAGE, OLD and NEW"
        raise
    except NotAnImage as error:
        if args.new is None and error.image == printable(os.path.abspath(split_image(args.old)[0])):
            error.hint = "--new-format raw takes it for a raw disk"  # --image-format would take both for one
        raise

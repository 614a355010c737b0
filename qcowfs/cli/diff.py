"""`qcowfs diff`: what differs between two points: files, or with --blocks bytes."""

from __future__ import annotations

import argparse
import os

from qcowfs.chain import FORMATS
from qcowfs.cli.diffblocks import EXAMPLES as BLOCKS_EXAMPLES
from qcowfs.cli.diffblocks import configure_blocks, run_blocks
from qcowfs.cli.difffiles import EXAMPLES as FILES_EXAMPLES
from qcowfs.cli.difffiles import configure_files, run_files
from qcowfs.cli.options import add_inside_options, add_json_option, add_opening_options
from qcowfs.cli.points import split_image
from qcowfs.errors import NotAnImage, SourceError, UsageError, printable

__all__ = ["EXAMPLES", "HELP", "configure", "run"]

HELP = "tell which files, or which bytes, differ between two points in time"
EXAMPLES = f"{FILES_EXAMPLES}{BLOCKS_EXAMPLES}\nSee qcowfs-diff(1).\n"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs diff`."""
    parser.usage = "%(prog)s [options] IMAGE OLD NEW [PATH ...]\n       %(prog)s [options] IMAGE[:OLD] IMAGE[:NEW]"
    parser.add_argument("image", metavar="IMAGE", help="a qcow2 image; with two arguments, IMAGE:OLD")
    parser.add_argument("old", metavar="OLD", help="a point of qcowfs list; with two arguments, IMAGE:NEW")
    parser.add_argument("new", metavar="NEW", nargs="?", help="another point of IMAGE")
    parser.add_argument("paths", metavar="PATH", nargs="*", default=[], help="compare only this, as in a mount: p2/etc")
    configure_files(parser)
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
        return run_blocks(args) if args.blocks else run_files(args)
    except SourceError as error:
        if args.new is None and not os.path.lexists(split_image(args.old)[0]):
            error.hint = error.hint or "for two points of one image, give IMAGE, OLD and NEW"
        raise
    except NotAnImage as error:
        if args.new is None and error.image == printable(os.path.abspath(split_image(args.old)[0])):
            error.hint = "--new-format raw takes it for a raw disk"  # --image-format would take both for one
        raise

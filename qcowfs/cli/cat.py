"""`qcowfs cat`: the bytes of a file inside a point, without a mount."""

from __future__ import annotations

import argparse

from qcowfs.cli import output
from qcowfs.cli.inside import PLACE_HELP, Spot, open_inside, told
from qcowfs.cli.options import add_image_options, add_inside_options
from qcowfs.errors import TreeFault

HELP = "print a file that is inside a point"
EXAMPLES = """\
POINT is a name of qcowfs list; PATH is what a mount shows below NAME/. Names of points may have colons: the longest
text before a colon that means a point is POINT. Symbolic links are followed inside of the guest's file system.

examples:
  qcowfs cat image.qcow2 before-upgrade:p2/etc/fstab
  qcowfs cat image.qcow2 current:etc/fstab            a disk that is one file system
  qcowfs cat image.qcow2 current:p1.raw > esp.raw     a whole partition
  diff <(qcowfs cat i.qcow2 monday:p2/etc/passwd) <(qcowfs cat i.qcow2 current:p2/etc/passwd)

See qcowfs-cat(1).
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs cat`."""
    add_image_options(parser)
    parser.add_argument("place", metavar="POINT:PATH", help=PLACE_HELP)
    add_inside_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the bytes."""
    with open_inside(args) as inside:
        print_file(inside.find(args.place, follow=True))
    return 0


def print_file(spot: Spot) -> None:
    """Write the bytes of a file to standard output.

    Raises:
        QcowfsError: it is none, or some of them cannot be read; those before are written.
    """
    try:
        for chunk in spot.place.chunks():
            output.write_bytes(chunk)
    except TreeFault as fault:
        raise told(fault, spot.image, spot.where(spot.path)) from fault

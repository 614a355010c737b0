"""`qcowfs list`: the points in time of an image."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from qcowfs import limits
from qcowfs.chain import Chain
from qcowfs.cli import output
from qcowfs.cli.options import add_image_options, add_inside_options, add_json_option, open_chain
from qcowfs.cli.points import named_points
from qcowfs.errors import printable
from qcowfs.sizes import Sizes
from qcowfs.snapshot import Point
from qcowfs.vfs.names import SUFFIX

HELP = "list every point in time: the active state, snapshots, backing layers"
EXAMPLES = """\
OWN is what only that point uses in its file: what deleting the snapshot would free.
With -v there is a table for each point: its partitions and logical volumes, their file systems, whether those were
unmounted properly or had to be recovered, and why the files of one cannot be shown.

examples:
  qcowfs list image.qcow2
  qcowfs list -v image.qcow2
  qcowfs list --json image.qcow2 | jq -r '.points[].path'

See qcowfs-list(1).
"""

COLUMNS = ("NAME", "DATE", "VIRTUAL SIZE", "OWN", "VM STATE", "LAYER")
NUMBERS = (2, 3, 4)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs list`."""
    add_image_options(parser)
    parser.add_argument("-v", dest="verbose", action="store_true", help="and what is inside each point")
    add_json_option(parser)
    add_inside_options(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table, or the document."""
    if args.verbose:
        return _run_verbose(args)
    with open_chain(args) as chain:
        if args.json:
            output.print_json(document(chain))
        else:
            _print_points(chain)
    return 0


def _run_verbose(args: argparse.Namespace) -> int:
    from qcowfs.cli.inside import open_inside  # 30 ms, and no list without -v has to wait for them
    from qcowfs.cli.volumes import print_volumes, volumes_document

    with open_inside(args) as inside:
        if args.json:
            output.print_json(document(inside.chain, partial(volumes_document, inside)))
        else:
            _print_points(inside.chain)
            for name, point in named_points(inside.chain):
                print_volumes(inside, name, point)
    return 0


def document(chain: Chain, more: Callable[[str, Point], dict[str, Any]] | None = None) -> dict[str, Any]:
    """Return the document of `list --json`; its keys are a contract (qcowfs-list(1)).

    Args:
        more: returns further keys for a point and its name.
    """
    sizes = Sizes(chain, limits.MAX_LISTED_TABLES)
    named = named_points(chain)
    points = [_point(name, point, sizes) | (more(name, point) if more else {}) for name, point in named]
    return {"version": 1, "image": output.path_text(chain.image), "points": points}


def _print_points(chain: Chain) -> None:
    sizes = Sizes(chain, limits.MAX_LISTED_TABLES)
    output.print_table(COLUMNS, [_row(name, point, sizes) for name, point in named_points(chain)], right=NUMBERS)


def _point(name: str, point: Point, sizes: Sizes) -> dict[str, Any]:
    return {
        "name": name,
        "path": name + SUFFIX,
        "kind": point.kind,
        "depth": point.depth,
        "layer": output.path_text(point.layer.name),
        **output.image_text("snapshot_id", point.snapshot_id),
        **output.image_text("snapshot_name", point.snapshot_name),
        "virtual_size": point.virtual_size,
        "own_size": sizes.own(point),
        "date": output.utc_date(point.date_ns),
        "vm_state_size": point.vm_state_size,
        "frozen": point.frozen,
    }


def _row(name: str, point: Point, sizes: Sizes) -> list[str]:
    return [
        printable(name) + ("" if point.frozen else " (being written)"),
        output.local_date(point.date_ns),
        output.human_size(point.virtual_size),
        output.human_size(sizes.own(point)),
        output.human_size(point.vm_state_size) if point.vm_state_size else "-",
        printable(point.layer.name),
    ]

"""`qcowfs map`: the extents of one point, in the words of `qemu-img map`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from qcowfs import limits
from qcowfs._cache import Cache
from qcowfs._core import Disk, Extent
from qcowfs.chain import Chain
from qcowfs.cli import output
from qcowfs.cli.options import add_image_options, add_json_option, open_chain
from qcowfs.cli.points import find_point
from qcowfs.errors import printable
from qcowfs.snapshot import open_disk

HELP = "print the extents of a point: what is data, zero or a hole, and where"
EXAMPLES = """\
Without --json only ranges that hold data are printed, as qemu-img map does.

examples:
  qcowfs map image.qcow2
  qcowfs map --json image.qcow2 before-upgrade

See qcowfs-map(1).
"""

BATCH = 4096  # extents that are held in memory at once


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs map`."""
    add_image_options(parser)
    parser.add_argument(
        "point", metavar="POINT", nargs="?", default="current", help="a name of qcowfs list, an id or a snapshot's name"
    )
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the extents."""
    with open_chain(args) as chain:
        disk = open_disk(chain, find_point(chain, args.point), Cache(limits.DEFAULT_CACHE_SIZE))
        if args.json:
            _print_json(chain, extents(disk))
        else:
            _print_table(chain, extents(disk))
    return 0


def extents(disk: Disk) -> Iterator[Extent]:
    """Yield all extents of `disk`, merged, from a bounded number in memory."""
    offset = 0
    while offset < disk.virtual_size:
        batch = disk.extents(offset, disk.virtual_size - offset, BATCH)
        yield from batch
        offset = batch[-1].start + batch[-1].length


def _print_json(chain: Chain, found: Iterator[Extent]) -> None:
    """Print an array, one extent a line, as they come."""
    separator = "["
    for extent in found:
        print(f"{separator}{json.dumps(_fields(chain, extent))}", end="")
        separator = ",\n"
    print("]" if separator != "[" else "[]")


def _fields(chain: Chain, extent: Extent) -> dict[str, Any]:
    fields = {key: value for key, value in extent._asdict().items() if key != "offset"}
    if extent.offset is not None:
        fields["offset"] = extent.offset
    if extent.data:
        fields["file"] = output.path_text(_file(chain, extent))
    return fields


def _print_table(chain: Chain, found: Iterator[Extent]) -> None:
    print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
    for extent in found:
        if extent.data:
            mapped = "compressed" if extent.offset is None else _hex(extent.offset)
            print(f"{_hex(extent.start):<16}{_hex(extent.length):<16}{mapped:<16}{printable(_file(chain, extent))}")


def _hex(number: int) -> str:
    return f"{number:#x}" if number else "0"  # as C's %#x, which qemu-img map uses


def _file(chain: Chain, extent: Extent) -> str:
    layer = chain.layers[extent.depth]
    return layer.path if extent.compressed or layer.data_path is None else layer.data_path

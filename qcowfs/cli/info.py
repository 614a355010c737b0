"""`qcowfs info`: what `qemu-img info --backing-chain` tells of each layer, and the sizes of each snapshot."""

from __future__ import annotations

import argparse
import re
from typing import Any

from qcowfs import limits
from qcowfs.chain import Chain, Layer
from qcowfs.cli import output
from qcowfs.cli.options import add_image_options, add_json_option, open_chain
from qcowfs.errors import printable
from qcowfs.qcow2 import bitmaps
from qcowfs.qcow2 import header as qcow2
from qcowfs.sizes import Sizes
from qcowfs.snapshot import NANOSECONDS, Point, points

HELP = "print the format, sizes and snapshots of each layer of the chain"
EXAMPLES = """\
As qemu-img info --backing-chain, and for each snapshot its own virtual size and what only it uses.

examples:
  qcowfs info image.qcow2
  qcowfs info --json image.qcow2 | jq '.layers[].format'

See qcowfs-info(1).
"""

# User and password in a URL, also in one that stands in a json: name; a URL in an image has no other secrets.
_USER = re.compile(rb"(://)[^/?#@\"]*@")

SNAPSHOT_COLUMNS = ("ID", "TAG", "VM STATE", "DATE", "VM CLOCK", "VIRTUAL SIZE", "OWN")
SNAPSHOT_NUMBERS = (2, 5, 6)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs info`."""
    add_image_options(parser)
    add_json_option(parser)


def run(args: argparse.Namespace) -> int:
    """Print the facts of each layer, from the image down to the base."""
    with open_chain(args) as chain:
        sizes = Sizes(chain, limits.MAX_LISTED_TABLES)
        if args.json:
            output.print_json(document(chain, sizes))
        else:
            for layer in chain.layers:
                _print_layer(chain, layer, sizes)
    return 0


def document(chain: Chain, sizes: Sizes) -> dict[str, Any]:
    """Return the document of `info --json`. Keys that QEMU has too are spelt as QEMU spells them."""
    layers = [_layer(chain, layer, sizes) for layer in chain.layers]
    return {"version": 1, "image": output.path_text(chain.image), "layers": layers}


def _layer(chain: Chain, layer: Layer, sizes: Sizes) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "depth": layer.depth,
        "filename": output.path_text(layer.path),
        "format": layer.format,
        "virtual-size": layer.virtual_size,
        "actual-size": layer.disk_size,
        "written-by-other": layer.written_by_other,
    }
    if layer.header is not None:
        facts |= {"cluster-size": layer.header.cluster_size, "encrypted": layer.header.encrypted}
    if layer.backing_name is not None:
        facts |= output.image_text("backing-filename", _USER.sub(rb"\1...@", layer.backing_name))
        facts["full-backing-filename"] = output.path_text(chain.layers[layer.depth + 1].path)
    if layer.backing_format is not None:
        facts |= output.image_text("backing-filename-format", layer.backing_format)
    if isinstance(layer.header, qcow2.Header):
        facts["dirty-flag"] = layer.header.dirty
        facts["format-specific"] = {"type": "qcow2", "data": _specific(layer, layer.header)}
        facts["snapshots"] = [_snapshot(point, sizes) for point in _snapshots(chain, layer)]
    return facts


def _specific(layer: Layer, header: qcow2.Header) -> dict[str, Any]:
    """What QEMU calls format specific information, with its keys, in its order."""
    facts: dict[str, Any] = {"compat": header.compat}
    if header.external_data and layer.data_path is not None:
        facts["data-file"] = output.path_text(layer.data_path)
        facts["data-file-raw"] = header.data_file_raw
    facts["compression-type"] = header.compression_name
    if header.version >= 3:
        facts["lazy-refcounts"] = header.lazy_refcounts
    facts["refcount-bits"] = header.refcount_bits
    if header.version >= 3:
        facts |= {"corrupt": header.corrupt, "extended-l2": header.extended_l2}
    found = bitmaps.read_bitmaps(layer.source, header)
    if found:
        facts["bitmaps"] = [_bitmap(bitmap) for bitmap in found]
    return facts


def _bitmap(bitmap: bitmaps.Bitmap) -> dict[str, Any]:
    flags = [name for name, is_set in (("in-use", bitmap.in_use), ("auto", bitmap.auto)) if is_set]
    return {**output.image_text("name", bitmap.name), "granularity": bitmap.granularity, "flags": flags}


def _snapshots(chain: Chain, layer: Layer) -> list[Point]:
    return [point for point in points(chain) if point.depth == layer.depth and point.entry is not None]


def _snapshot(point: Point, sizes: Sizes) -> dict[str, Any]:
    seconds, nanoseconds = divmod(point.date_ns, NANOSECONDS)
    clock_seconds, clock_nanoseconds = divmod(point.vm_clock_ns, NANOSECONDS)
    facts = {
        **output.image_text("id", point.snapshot_id),
        **output.image_text("name", point.snapshot_name),
        "date-sec": seconds,
        "date-nsec": nanoseconds,
        "vm-clock-sec": clock_seconds,
        "vm-clock-nsec": clock_nanoseconds,
        "vm-state-size": point.vm_state_size,
        "virtual-size": point.virtual_size,
        "own-size": sizes.own(point),
    }
    if point.entry is not None and point.entry.icount is not None:
        facts["icount"] = point.entry.icount
    return facts


def _print_layer(chain: Chain, layer: Layer, sizes: Sizes) -> None:
    facts = _layer(chain, layer, sizes)
    if layer.depth:
        print()
    print(f"image: {printable(chain.image if layer.depth == 0 else layer.path)}")
    print(f"file format: {layer.format}")
    print(f"virtual size: {output.human_size(layer.virtual_size)} ({layer.virtual_size} bytes)")
    print(f"disk size: {output.human_size(layer.disk_size)}")
    for key in ("encrypted", "cluster-size", "backing-filename", "full-backing-filename", "backing-filename-format"):
        if facts.get(key):
            print(f"{LABELS[key]}: {_text(facts[key])}")
    if layer.written_by_other:
        print("open for writing by another process: yes")
    _print_snapshots(chain, layer, sizes)
    if "format-specific" in facts:
        print("Format specific information:")
        for key, value in facts["format-specific"]["data"].items():
            _print_specific(key, value)


LABELS = {
    "encrypted": "encrypted",
    "cluster-size": "cluster_size",
    "backing-filename": "backing file",
    "full-backing-filename": "actual path",
    "backing-filename-format": "backing file format",
}


def _print_specific(key: str, value: Any) -> None:
    print(f"    {key.replace('-', ' ')}: {'' if isinstance(value, list) else _text(value)}".rstrip())
    if isinstance(value, list):
        for bitmap in value:
            flags = ", ".join(bitmap["flags"]) or "no flags"
            print(f"        {printable(bitmap['name'])}: granularity {bitmap['granularity']}, {flags}")


def _print_snapshots(chain: Chain, layer: Layer, sizes: Sizes) -> None:
    found = _snapshots(chain, layer)
    if found:
        print("Snapshot list:")
        output.print_table(SNAPSHOT_COLUMNS, [_snapshot_row(point, sizes) for point in found], right=SNAPSHOT_NUMBERS)


def _snapshot_row(point: Point, sizes: Sizes) -> list[str]:
    return [
        printable(point.snapshot_id or b""),
        printable(point.snapshot_name or b""),
        output.human_size(point.vm_state_size),
        output.local_date(point.date_ns),
        _clock(point.vm_clock_ns),
        output.human_size(point.virtual_size),
        output.human_size(sizes.own(point)),
    ]


def _clock(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, NANOSECONDS)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}.{rest // 1_000_000:03}"


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return printable(str(value))

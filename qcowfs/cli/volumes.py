"""What `list -v` says of the volumes of a point: sizes, file systems, and how their trees can be read.

Used by list.py. Each tree is opened, in a worker that ends before the next one starts.
"""

from __future__ import annotations

import os
from typing import Any

from qcowfs._mapped import Mapped
from qcowfs.cli import output
from qcowfs.cli.inside import Inside
from qcowfs.errors import QcowfsError, TreeFault, printable
from qcowfs.inside.contents import Item
from qcowfs.inside.trees import unreadable
from qcowfs.snapshot import Point

__all__ = ["print_volumes", "volumes_document"]

COLUMNS = ("VOLUME", "SIZE", "FILE SYSTEM", "LABEL", "UUID", "STATE")
NUMBERS = (1,)
WHOLE_DISK = "(disk)"


def volumes_document(inside: Inside, name: str, point: Point) -> dict[str, Any]:
    """Return what `list -v --json` adds to a point."""
    try:
        contents, disks = inside.look(name, point)
    except QcowfsError as error:
        return {"volumes": None, "trouble": str(error), "notes": []}
    volumes = [_volume(inside, name, item, disk) for item, disk in zip(contents.items, disks, strict=True)]
    return {"volumes": volumes, "trouble": None, "notes": list(contents.notes)}


def print_volumes(inside: Inside, name: str, point: Point) -> None:
    """Print the table of a point, with its name above it."""
    found = volumes_document(inside, name, point)
    print(f"\n{printable(name)}:")
    if found["trouble"] is not None:
        print(found["trouble"])
    elif found["volumes"]:
        output.print_table(COLUMNS, [_row(volume) for volume in found["volumes"]], right=NUMBERS)
    else:
        print("no partition, no logical volume and no file system is found in it")


def _volume(inside: Inside, point: str, item: Item, disk: Mapped | None) -> dict[str, Any]:
    volume, found = item.volume, item.filesystem
    facts, trouble = _facts(inside, point, item, disk)
    return {
        **output.image_text("name", volume.name),
        "kind": volume.kind,
        "size": volume.size,
        "type": volume.type,
        "label": output.path_text(volume.label),
        "uuid": volume.uuid,
        "file_system": None
        if found is None
        else {
            "type": found.kind,
            "label": output.path_text(found.label),
            "uuid": found.uuid,
            "size": found.size,
            "clean": found.clean,
        },
        "recovery": facts.get("recovery"),
        "trouble": trouble or None,
    }


def _facts(inside: Inside, point: str, item: Item, disk: Mapped | None) -> tuple[dict[str, str], str]:
    """Return what the reader of a tree tells, and why there is none."""
    trouble = unreadable(item)
    if trouble or disk is None:
        return {}, trouble
    name = f"{point}/{os.fsdecode(item.volume.name)}" if item.volume.name else point
    tree = inside.trees.tree(name, item, disk)
    try:
        return tree.facts(), ""
    except TreeFault as fault:
        return {}, fault.what
    finally:
        tree.close()


def _row(volume: dict[str, Any]) -> list[str]:
    found = volume["file_system"] or {"type": "-", "label": "", "uuid": "", "clean": None}
    return [
        printable(volume["name"]) or WHOLE_DISK,
        output.human_size(volume["size"]),
        printable(found["type"]),
        printable(found["label"]) or "-",
        printable(found["uuid"]) or "-",
        _state(volume, found["clean"]),
    ]


def _state(volume: dict[str, Any], clean: bool | None) -> str:
    if volume["trouble"]:
        return f"no files: {printable(volume['trouble'])}"
    if volume["recovery"]:
        return f"recovered ({printable(volume['recovery'])})"
    return {True: "clean", False: "not clean", None: "-"}[clean]

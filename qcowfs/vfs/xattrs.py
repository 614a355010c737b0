"""The extended attributes `user.qcowfs.*`: what a file in the mount is, for scripts.

Used by vfs/tree.py and vfs/guests.py. Pure functions. Values are text, numbers in decimal, times in UTC; only `name`,
`id` and `layer` are the raw bytes of the image. qcowfs-layout(7) documents them.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from qcowfs import __version__

if TYPE_CHECKING:
    from qcowfs.inside.filesystems import Filesystem
    from qcowfs.snapshot import Point

__all__ = ["CHANGED", "PREFIX", "of_point", "of_root", "of_tree"]

PREFIX = b"user.qcowfs."
CHANGED = PREFIX + b"changed"  # bytes; counted when somebody asks for it
NANOSECONDS = 1_000_000_000


def of_point(point: Point) -> dict[bytes, bytes]:
    """Return the attributes of the file that shows `point`. An attribute that says nothing is left out."""
    facts: dict[str, bytes | str | int | None] = {
        "kind": point.kind,
        "id": point.snapshot_id,
        "name": point.snapshot_name,
        "layer": os.fsencode(point.layer.name),
        "depth": point.depth,
        "format": point.layer.format,
        "date": _date(point.date_ns),
        "virtual_size": point.virtual_size,
    }
    if point.entry is not None:
        facts |= {"vm_clock": point.vm_clock_ns, "vm_state_size": point.vm_state_size}
    return _encoded(facts)


def of_root(image: str) -> dict[bytes, bytes]:
    """Return the attributes of the mount's root: the image's path and the daemon that serves it (this process)."""
    return _encoded({"image": os.fsencode(image), "pid": os.getpid(), "version": __version__})


def of_tree(found: Filesystem, recovery: str) -> dict[bytes, bytes]:
    """Return the attributes of a tree's root; `recovery` is what was done to bring it up to date."""
    facts = {"filesystem": found.kind, "label": found.label, "uuid": found.uuid, "recovery": recovery}
    return _encoded({key: os.fsencode(value) or None for key, value in facts.items()})


def _encoded(facts: dict[str, bytes | str | int | None]) -> dict[bytes, bytes]:
    return {
        PREFIX + key.encode(): value if isinstance(value, bytes) else str(value).encode()
        for key, value in facts.items()
        if value is not None
    }


def _date(date_ns: int) -> str:
    """Return ISO 8601 with the nanoseconds that datetime cannot hold."""
    seconds, nanoseconds = divmod(date_ns, NANOSECONDS)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"

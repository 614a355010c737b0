"""A qcow2 image with data clusters at chosen guest offsets, written byte by byte: 20,480 L2 tables in a second.

QEMU makes the same with a write per cluster, in minutes. `qemu-img check` looks at every image made here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

CLUSTER = 1 << 16
ENTRIES = CLUSTER // 8  # of an L2 table
COVERED = CLUSTER * ENTRIES  # guest bytes of an L2 table
REFCOUNTS = CLUSTER // 2  # 16 bits each, of a refcount block
COPIED = 1 << 63
BACKING_FORMAT = 0xE2792ACA
HEADER_LENGTH = 104


@dataclass(frozen=True)
class Layout:
    """Where the structures lie, in host clusters; the header is cluster 0 and the refcount table cluster 1.

    Attributes:
        blocks: refcount blocks, from cluster 2.
        l1_place: first cluster of the L1 table.
        l1_entries: of the L1 table.
        first: cluster of the first L2 table; each is followed by its data.
    """

    blocks: int
    l1_place: int
    l1_entries: int
    first: int


def write(path: Path, size: int, offsets: Iterable[int], *, filled: int = CLUSTER, backing: str = "") -> None:
    """Write an image of `size` bytes whose guest clusters at `offsets` begin with `filled` random bytes.

    What is not filled stays a hole of the host file, so an L2 table with one entry occupies one block of the disk.
    """
    wanted = sorted(offsets)
    tables = [(index, list(members)) for index, members in groupby(wanted, lambda offset: offset // COVERED)]
    layout = laid_out(size, len(tables) + len(wanted))
    with path.open("wb") as file:
        put(file, 0, header(size, layout, backing))
        l1, place = [0] * layout.l1_entries, layout.first
        for index, members in tables:
            l1[index] = place * CLUSTER | COPIED
            place = write_table(file, place, members, filled)
        put(file, layout.l1_place, struct.pack(f">{len(l1)}Q", *l1))
        write_refcounts(file, layout, place)
        file.truncate(place * CLUSTER)


def laid_out(size: int, clusters: int) -> Layout:
    """Return the layout with `clusters` L2 tables and data clusters."""
    l1_entries = -(-size // COVERED)
    l1_clusters = -(-l1_entries * 8 // CLUSTER)
    blocks = -(-(clusters + l1_clusters + 2) // (REFCOUNTS - 1))
    return Layout(blocks, 2 + blocks, l1_entries, 2 + blocks + l1_clusters)


def put(file: BinaryIO, cluster: int, data: bytes) -> None:
    """Write at the beginning of a host cluster."""
    file.seek(cluster * CLUSTER)
    file.write(data)


def header(size: int, layout: Layout, backing: str) -> bytes:
    """Return a header of version 3, with its extensions and the name of the backing file."""
    name = backing.encode()
    extensions = struct.pack(">II8s", BACKING_FORMAT, 5, b"qcow2") if name else b""
    extensions += bytes(8)
    place = HEADER_LENGTH + len(extensions) if name else 0
    fixed = struct.pack(">4sIQIIQII", b"QFI\xfb", 3, place, len(name), 16, size, 0, layout.l1_entries)
    tables = struct.pack(">QQIIQ", layout.l1_place * CLUSTER, CLUSTER, 1, 0, 0)
    return fixed + tables + struct.pack(">QQQII", 0, 0, 0, 4, HEADER_LENGTH) + extensions + name


def write_table(file: BinaryIO, place: int, members: list[int], filled: int) -> int:
    """Write an L2 table at `place` and its data after it; return the next free cluster."""
    for number, offset in enumerate(members, place + 1):
        file.seek(place * CLUSTER + offset // CLUSTER % ENTRIES * 8)
        file.write(struct.pack(">Q", number * CLUSTER | COPIED))
    for number in range(place + 1, place + 1 + len(members)):
        put(file, number, os.urandom(filled))
    return place + 1 + len(members)


def write_refcounts(file: BinaryIO, layout: Layout, clusters: int) -> None:
    """Every cluster of the file has one reference."""
    counts = struct.pack(">H", 1) * clusters
    put(file, 1, struct.pack(f">{layout.blocks}Q", *((2 + block) * CLUSTER for block in range(layout.blocks))))
    for block in range(layout.blocks):
        put(file, 2 + block, counts[block * CLUSTER : (block + 1) * CLUSTER])

"""A volume: a part of one or more disks that reads as one run of bytes.

Used by partitions.py and lvm.py, which find them, and by the vfs and the commands, which show them. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Disk", "Segment", "Volume"]


class Disk(Protocol):
    """What volumes are looked for on: a `_core.Disk`, or a test's."""

    @property
    def virtual_size(self) -> int: ...
    def pread(self, offset: int, length: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Segment:
    """`length` bytes at `start` of a volume are those at `offset` of the disk with the number `disk`."""

    start: int
    length: int
    disk: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A partition, a logical volume, or (with no name) a whole disk.

    Attributes:
        name: as in the mount: b"p1", b"VG-LV"; b"" for the whole disk.
        kind: "disk", "partition" or "lv".
        segments: from the start on, without gaps; empty if it cannot be read, and `trouble` says why.
        size: bytes.
        type: "0x83" or a GUID, as sfdisk prints it; "" if it has none.
        label: the GPT's name of the partition; "".
        uuid: of the partition or logical volume; "".
        trouble: why its bytes cannot be shown (a striped volume, a missing disk); "".
    """

    name: bytes
    kind: str
    segments: Sequence[Segment]
    size: int
    type: str = ""
    label: str = ""
    uuid: str = ""
    trouble: str = ""

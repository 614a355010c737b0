"""What is inside a disk: its partitions and logical volumes, and what each of them holds.

Used by the vfs, which shows it, and by `list` and `info`. A look costs a few reads, two for a disk that is one file
system; a place that cannot be read loses what is recorded there, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qcowfs import limits
from qcowfs.errors import QcowfsError, printable
from qcowfs.inside import lvm, partitions
from qcowfs.inside.filesystems import Filesystem, probe
from qcowfs.inside.volume import Disk, Segment, Volume
from qcowfs.inside.volumebytes import Blocks, VolumeBytes

__all__ = ["Contents", "Item", "VolumeBytes", "look"]

PHYSICAL_VOLUME = "LVM2_member"


@dataclass(frozen=True, slots=True)
class Item:
    """A volume, and what it holds: None if that is not known, or the volume has trouble."""

    volume: Volume
    filesystem: Filesystem | None


@dataclass(frozen=True, slots=True)
class Contents:
    """The volumes of a disk, partitions first, each name once; and sentences for a person on what went wrong."""

    items: Sequence[Item]
    notes: Sequence[str]


def look(disks: Sequence[Disk]) -> Contents:
    """Return what is inside the first of `disks`.

    Args:
        disks: the disk, and those of other images on which parts of its logical volumes may be.
    """
    notes: list[str] = []
    kept = [Blocks(disk) for disk in disks]
    items = _survey(kept, 0, notes)
    if any(_is_physical_volume(item) for item in items):
        items += _logical_volumes(kept, items, notes)
    return Contents(items, notes[: limits.MAX_NOTES])


def _survey(disks: Sequence[Disk], number: int, notes: list[str]) -> list[Item]:
    """Return the partitions of one disk, or the disk itself where it is one file system."""
    found = partitions.find(disks[number], number)
    notes += found.notes
    if found.volumes:
        return [_item(volume, disks, notes) for volume in found.volumes]
    size = disks[number].virtual_size
    whole = Volume(name=b"", kind="disk", segments=(Segment(0, size, number, 0),) if size else (), size=size)
    item = _item(whole, disks, notes)
    return [item] if item.filesystem is not None else []


def _item(volume: Volume, disks: Sequence[Disk], notes: list[str]) -> Item:
    if volume.trouble:
        return Item(volume, None)
    try:
        return Item(volume, probe(VolumeBytes(volume, disks).read, volume.size))
    except QcowfsError as error:
        notes.append(f"{printable(volume.name) or 'the disk'}: what it holds is not known: {error}")
        return Item(volume, None)


def _is_physical_volume(item: Item) -> bool:
    return item.filesystem is not None and item.filesystem.kind == PHYSICAL_VOLUME


def _logical_volumes(disks: Sequence[Disk], items: Sequence[Item], notes: list[str]) -> list[Item]:
    """Return the logical volumes of which a piece is on disk 0, whose items are `items`."""
    beside: list[str] = []
    others = [item for number in range(1, len(disks)) for item in _survey(disks, number, beside)]
    found = lvm.find([item.volume for item in (*items, *others) if _is_physical_volume(item)], disks)
    notes += [*found.notes, *(f"another disk: {note}" for note in beside)]
    return [_item(volume, disks, notes) for volume, on in found.volumes if 0 in on]

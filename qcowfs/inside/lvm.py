"""Logical volumes of LVM2, from the metadata on their physical volumes.

Used by contents.py. Of a volume that is made of plain pieces the segments are returned; another one, or one of which a
piece is missing, is returned without segments, and says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qcowfs import limits
from qcowfs.errors import QcowfsError, printable
from qcowfs.inside import lvmgroup, lvmtext
from qcowfs.inside.lvmgroup import Group, LogicalVolume
from qcowfs.inside.lvmlabel import Label, Text, locate, read_label, read_metadata
from qcowfs.inside.probes import Read, padded
from qcowfs.inside.volume import Disk, Segment, Volume
from qcowfs.inside.volumebytes import VolumeBytes

__all__ = ["Found", "find"]


@dataclass(slots=True)
class Found:
    """Logical volumes, each with the numbers of the disks that hold a piece of it, and notes for a person."""

    volumes: list[tuple[Volume, frozenset[int]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Member:
    """A physical volume that is here: `volume` lies on one disk, in one piece."""

    volume: Volume
    disk: int
    label: Label

    @property
    def place(self) -> str:
        """What to call it in a message."""
        name = f"{self.volume.name.decode()}.raw" if self.volume.name else "the disk itself"
        return name if self.disk == 0 else f"{name} of another disk"


def find(candidates: Sequence[Volume], disks: Sequence[Disk]) -> Found:
    """Return the logical volumes of all groups that have a physical volume among `candidates`.

    Args:
        candidates: partitions, or whole disks, that are physical volumes.
        disks: all that the candidates' segments name.
    """
    found = Found()
    texts = _Texts(found.notes)
    members: dict[str, _Member] = {}
    for volume in candidates:
        read = padded(VolumeBytes(volume, disks).read, volume.size)
        name = printable(volume.name) or "the disk"
        try:
            label = read_label(read)
            if label is not None:
                member = _Member(volume, volume.segments[0].disk, label)
                if members.setdefault(label.uuid, member) is not member:
                    found.notes.append(f"{name}: the physical volume {label.uuid} is there twice; the first is used")
                texts.read(read, label, name)
        except QcowfsError as error:
            found.notes.append(f"{name}: its LVM metadata cannot be read: {error}")
    for group in texts.newest():
        _add(found, group, members)
    return found


class _Texts:
    """The texts of metadata that were found: most physical volumes of a group hold the same one."""

    def __init__(self, notes: list[str]) -> None:
        self._notes = notes
        self._seen: set[tuple[int, int]] = set()
        self._room = limits.MAX_LVM_TEXTS
        self._groups: dict[str, Group] = {}

    def read(self, read: Read, label: Label, name: str) -> None:
        """Read the metadata of one physical volume, which may have two copies, or none.

        Raises:
            QcowfsError: it cannot be read.
        """
        failure: QcowfsError | None = None
        for area in label.areas:
            try:
                text = locate(read, area)
                if text is not None and (text.checksum, text.size) not in self._seen:
                    self._take(read, text, name)
            except QcowfsError as error:
                failure = error
        if failure is not None:
            raise failure

    def _take(self, read: Read, text: Text, name: str) -> None:
        self._room -= text.size
        if self._room < 0:
            self._notes.append(f"{name}: its LVM metadata is too long and is not read")
            return
        data = read_metadata(read, text)
        if data is None:
            self._notes.append(f"{name}: a copy of the LVM metadata has a wrong checksum and is not used")
            return
        self._seen.add((text.checksum, text.size))
        try:
            group = lvmgroup.group(lvmtext.parse(data))
        except lvmtext.BadText as error:
            self._notes.append(f"{name}: the LVM metadata is damaged: {error}")
            return
        known = self._groups.get(group.uuid)
        if known is None or known.seqno < group.seqno:
            self._groups[group.uuid] = group

    def newest(self) -> Sequence[Group]:
        """Return each group as its newest text has it."""
        return list(self._groups.values())


def _add(found: Found, group: Group, members: dict[str, _Member]) -> None:
    here = {key: members[one.uuid] for key, one in group.physical.items() if one.uuid in members}
    names = {volume.name for volume, _ in found.volumes}
    for logical in group.logical:
        name = f"{_escaped(group.name)}-{_escaped(logical.name)}".encode()
        if name in names or len(name) > limits.MAX_LVM_NAME:
            why = "too long" if len(name) > limits.MAX_LVM_NAME else "that of another one"
            found.notes.append(f"the logical volume {name.decode()} is not shown: its name is {why}")
            continue
        if len(found.volumes) >= limits.MAX_LVM_VOLUMES:
            found.notes.append(f"only the first {limits.MAX_LVM_VOLUMES} logical volumes are shown")
            return
        pieces = [here[key] for key in logical.physical if key in here] or list(here.values())
        on = frozenset(member.disk for member in pieces)
        found.volumes.append((_volume(name, logical, group, here), on))


def _escaped(name: str) -> str:
    """Return a name as device-mapper writes it: the dash between the group and the volume is the single one."""
    return name.replace("-", "--")


def _volume(name: bytes, logical: LogicalVolume, group: Group, here: dict[str, _Member]) -> Volume:
    segments: list[Segment] = []
    trouble = logical.trouble
    if trouble and here:
        trouble += f"; its parts are in {', '.join(sorted({member.place for member in here.values()}))}"
    for run in logical.runs:
        member = here.get(run.physical)
        if member is None:
            trouble = f"the physical volume {printable(group.physical[run.physical].uuid)} is missing"
            break
        if run.offset + run.length > member.volume.size:
            trouble = f"it reaches past the end of {member.place}"
            break
        segments.append(Segment(run.start, run.length, member.disk, member.volume.segments[0].offset + run.offset))
    return Volume(
        name=name,
        kind="lv",
        segments=() if trouble else tuple(segments),
        size=logical.size,
        uuid=logical.uuid if lvmgroup.is_name(logical.uuid) else "",
        trouble=trouble,
    )

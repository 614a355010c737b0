"""A volume group of LVM2, as its metadata describes it; every number checked.

Used by lvm.py. Pure. Sizes are in bytes. docs: lib/format_text/import_vsn1.c of LVM2 says what the fields are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qcowfs import limits
from qcowfs.inside.lvmtext import BadText, Section

__all__ = ["Group", "LogicalVolume", "PhysicalVolume", "Run", "group", "is_name"]

SECTOR = 512
NAME = re.compile(rf"[A-Za-z0-9_.+][A-Za-z0-9_.+-]{{0,{limits.MAX_LVM_NAME - 1}}}")
LINEAR = ("striped", "linear")


@dataclass(frozen=True, slots=True)
class PhysicalVolume:
    """Where the extents of a physical volume begin, and how many there are."""

    uuid: str
    start: int
    extents: int


@dataclass(frozen=True, slots=True)
class Run:
    """`length` bytes at `start` of a logical volume are at `offset` of a physical one, named as in the text."""

    start: int
    length: int
    physical: str
    offset: int


@dataclass(frozen=True, slots=True)
class LogicalVolume:
    """A volume that a person would see.

    Attributes:
        runs: without gaps; empty if `trouble` says why.
        trouble: what it is that is not supported: "an LVM thin volume is not supported yet"; "".
        physical: names of the physical volumes that its own segments name.
    """

    name: str
    uuid: str
    size: int
    runs: Sequence[Run]
    trouble: str
    physical: frozenset[str]


@dataclass(frozen=True, slots=True)
class Group:
    """A volume group; of two with one `uuid` that with the higher `seqno` is newer."""

    name: str
    uuid: str
    seqno: int
    physical: Mapping[str, PhysicalVolume]
    logical: Sequence[LogicalVolume]


def group(text: Section) -> Group:
    """Return the group that `text` describes.

    Raises:
        BadText: it does not describe one.
    """
    name, section = next(((name, value) for name, value in text.items() if isinstance(value, dict)), ("", {}))
    if not is_name(name):
        raise BadText("it has no volume group with a name that LVM would take")
    extent_size = number(section, "extent_size") * SECTOR
    if not extent_size:
        raise BadText("its extents have no size")
    physical = {
        key: PhysicalVolume(string(one, "id"), number(one, "pe_start") * SECTOR, number(one, "pe_count"))
        for key, one in sections(section, "physical_volumes")
    }
    volumes = dict(sections(section, "logical_volumes"))
    stores = _stores(volumes)
    logical = [
        _logical(name, one, extent_size, physical, stores.get(name, ""))
        for name, one in volumes.items()
        if is_name(name) and (name in stores or "VISIBLE" in strings(one, "status")) and not _is_snapshot(one)
    ]
    return Group(name, string(section, "id"), number(section, "seqno"), physical, logical)


def is_name(name: str) -> bool:
    """Tell whether LVM takes this as a name of a group or a volume: none of others is shown."""
    return NAME.fullmatch(name) is not None and name not in (".", "..")


def number(section: Section, key: str) -> int:
    """Return a number of 0 to 2 ** 64 - 1."""
    value = section.get(key)
    if not isinstance(value, int) or not 0 <= value < 1 << 64:
        raise BadText(f"{key} is no number, or too large")
    return value


def string(section: Section, key: str) -> str:
    value = section.get(key)
    return value if isinstance(value, str) else ""


def strings(section: Section, key: str) -> list[int | str]:
    value = section.get(key)
    return value if isinstance(value, list) else []


def sections(section: Section, key: str) -> Iterator[tuple[str, Section]]:
    """Yield name and content of each section within the section `key`; nothing if there is none."""
    inner = section.get(key)
    if isinstance(inner, dict):
        yield from ((name, value) for name, value in inner.items() if isinstance(value, dict))


def _segments(volume: Section) -> list[Section]:
    """Return the segments by where they start, as LVM sorts them."""
    found = [value for name, value in volume.items() if name.startswith("segment") and isinstance(value, dict)]
    return sorted(found, key=lambda segment: number(segment, "start_extent"))


def _is_snapshot(volume: Section) -> bool:
    """Tell whether this only ties a snapshot's store to its origin; LVM shows it in the place of the store."""
    return any(segment.get("type") == "snapshot" for segment in _segments(volume))


def _stores(volumes: Mapping[str, Section]) -> dict[str, str]:
    """Return what is no plain volume though its segments are, with its trouble: snapshots, and where one is merged.

    A snapshot's store is not marked as visible; LVM shows it unless it is being merged.
    """
    found = {}
    for volume in volumes.values():
        for segment in _segments(volume):
            if segment.get("type") == "snapshot":
                found[string(segment, "cow_store")] = "an LVM snapshot is not supported yet"
            if string(segment, "merging_store"):
                found[string(segment, "origin")] = "an LVM volume into which a snapshot is merged is not supported yet"
    return found


def _logical(
    name: str, volume: Section, extent_size: int, physical: Mapping[str, PhysicalVolume], trouble: str
) -> LogicalVolume:
    runs: list[Run] = []
    named: set[str] = set()
    size = 0
    for segment in _segments(volume):
        start, extents = number(segment, "start_extent") * extent_size, number(segment, "extent_count")
        stripes = strings(segment, "stripes")
        named.update(stripe for stripe in stripes[::2] if isinstance(stripe, str) and stripe in physical)
        trouble = trouble or _what_it_is(segment)
        if start != size or not extents or size + extents * extent_size > limits.MAX_VIRTUAL_SIZE:
            trouble = trouble or "the LVM metadata of this volume contradicts itself"
            break
        if not trouble:
            run, trouble = _run(size, extents, extent_size, stripes, physical)
            runs += run
        size += extents * extent_size
    if not size and not trouble:
        trouble = "the LVM metadata of this volume contradicts itself"
    return LogicalVolume(name, string(volume, "id"), size, [] if trouble else runs, trouble, frozenset(named))


def _what_it_is(segment: Section) -> str:
    """Return why a segment is not a piece of a physical volume; "" if it is one."""
    kind = string(segment, "type").partition("+")[0]
    if kind not in LINEAR:
        printed = kind if is_name(kind) else "unknown"
        return f"an LVM volume of the kind {printed} is not supported yet"
    if len(strings(segment, "stripes")) != 2:
        return "a striped volume is not supported yet"
    return ""


def _run(
    start: int, extents: int, extent_size: int, stripes: list[int | str], physical: Mapping[str, PhysicalVolume]
) -> tuple[list[Run], str]:
    """Return the run of a linear segment, or trouble."""
    name, first = stripes
    if not isinstance(name, str) or not isinstance(first, int):
        return [], "the LVM metadata of this volume contradicts itself"
    if name not in physical:  # another logical volume: of a mirror, or of what is being moved
        return [], "an LVM volume of other volumes is not supported yet"
    if first < 0 or first + extents > physical[name].extents:
        return [], "the LVM metadata of this volume contradicts itself"
    return [Run(start, extents * extent_size, name, physical[name].start + first * extent_size)], ""

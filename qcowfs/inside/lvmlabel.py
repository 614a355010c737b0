"""A physical volume of LVM2: its label, and the areas of metadata that the label leads to.

Used by lvm.py, and by the probe that recognises one. The structures and their names are those of LVM2's
lib/format_text/layout.h. Every one has a checksum; what fails it does not count.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from qcowfs import limits
from qcowfs.inside.probes import Read

__all__ = ["Area", "Label", "Text", "checksum", "dashed", "locate", "read_label", "read_metadata"]

SECTOR = 512
LABEL_SECTORS = 4  # it is in one of the first
LABEL_ID = b"LABELONE"
LABEL_TYPE = b"LVM2 001"
PV_HEADER = struct.Struct("<32sQ")
DISK_LOCN = struct.Struct("<QQ")
MDA_HEADER = struct.Struct("<I16sIQQ")
MDA_HEADER_SIZE = 512
MDA_MAGIC = b" LVM2 x[5A%r0N*>"
RAW_LOCN = struct.Struct("<QQII")
RAW_LOCN_IGNORED = 1
INITIAL_CRC = 0xF597A6CF
UUID_DASHES = (6, 10, 14, 18, 22, 26)


class Area(NamedTuple):
    """Bytes of a physical volume."""

    offset: int
    size: int


class Label(NamedTuple):
    """What a physical volume says of itself."""

    uuid: str
    device_size: int
    areas: Sequence[Area]


class Text(NamedTuple):
    """Where the newest metadata of an area is: `size` bytes at `offset` of the area, going round at its end."""

    area: Area
    offset: int
    size: int
    checksum: int


def checksum(data: bytes) -> int:
    """Return LVM's checksum: CRC-32 with a start of its own and no inversions."""
    return zlib.crc32(data, INITIAL_CRC ^ 0xFFFFFFFF) ^ 0xFFFFFFFF


def dashed(identity: str) -> str:
    """Return a UUID as LVM shows it, with dashes."""
    return "-".join(identity[start:end] for start, end in zip((0, *UUID_DASHES), (*UUID_DASHES, 32), strict=True))


def read_label(read: Read) -> Label | None:
    """Return the label of a physical volume; None if there is none.

    Args:
        read: returns exactly what was asked for, zeros past the volume's end.

    Raises:
        QcowfsError: it cannot be read.
    """
    sectors = read(0, LABEL_SECTORS * SECTOR)
    for number in range(LABEL_SECTORS):
        sector = sectors[number * SECTOR : (number + 1) * SECTOR]
        identity, place, crc, offset, kind = struct.unpack_from("<8sQII8s", sector)
        if identity == LABEL_ID and kind == LABEL_TYPE and place == number and checksum(sector[20:]) == crc:
            return _pv_header(sector, offset)
    return None


def _pv_header(sector: bytes, offset: int) -> Label | None:
    if not 32 <= offset <= SECTOR - PV_HEADER.size:
        return None
    identity, device_size = PV_HEADER.unpack_from(sector, offset)
    if not identity.isalnum():
        return None
    lists = list(_areas(sector, offset + PV_HEADER.size))
    metadata = lists[lists.index(Area(0, 0)) + 1 :] if Area(0, 0) in lists else []
    return Label(dashed(identity.decode("ascii")), device_size, [area for area in metadata if area.offset])


def _areas(sector: bytes, place: int) -> Iterator[Area]:
    """Yield the data areas, an empty one, and the metadata areas."""
    ends = 0
    for _ in range(limits.MAX_LVM_AREAS):
        if place + DISK_LOCN.size > len(sector) or ends == 2:
            return
        area = Area(*DISK_LOCN.unpack_from(sector, place))
        ends += not area.offset
        place += DISK_LOCN.size
        yield area if area.offset else Area(0, 0)


def locate(read: Read, area: Area) -> Text | None:
    """Return where the text of a metadata area is; None if the area holds none, or its header is damaged.

    Raises:
        QcowfsError: the header cannot be read.
    """
    header = read(area.offset, MDA_HEADER_SIZE)
    crc, magic, version, start, size = MDA_HEADER.unpack_from(header)
    if checksum(header[4:]) != crc or magic != MDA_MAGIC or version != 1 or start != area.offset:
        return None
    offset, length, text_crc, flags = RAW_LOCN.unpack_from(header, MDA_HEADER.size)
    if not offset or flags & RAW_LOCN_IGNORED:
        return None
    if not MDA_HEADER_SIZE <= offset < size or not 0 < length <= min(size - MDA_HEADER_SIZE, limits.MAX_LVM_TEXT):
        return None
    return Text(Area(area.offset, size), offset, length, text_crc)


def read_metadata(read: Read, text: Text) -> bytes | None:
    """Return the metadata; None if its checksum is wrong.

    Raises:
        QcowfsError: it cannot be read.
    """
    first = min(text.size, text.area.size - text.offset)
    data = read(text.area.offset + text.offset, first)
    if first < text.size:
        data += read(text.area.offset + MDA_HEADER_SIZE, text.size - first)
    return data if checksum(data) == text.checksum else None

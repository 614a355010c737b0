"""What of a foreign image could lead out of its own file: QEMU reads these formats, and opens what they name.

Used by foreign. The rules are those of QEMU's drivers (block/vmdk.c, block/qed.c, block/vpc.c), and of the formats
where QEMU does not follow them. vdi, vhdx and parallels: QEMU opens nothing that they name, and refuses those based on
others, as far as they say so. Pure; any thread.
"""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

from qcowfs import limits
from qcowfs.errors import CorruptImage, UnsupportedImage

if TYPE_CHECKING:
    from qcowfs._source import Source

__all__ = ["FORMATS", "require_alone"]

FORMATS = ("vmdk", "vdi", "vhdx", "vpc", "qed", "parallels")
SECTOR = 512
VMDK = struct.Struct("<4sIIQQQQ")  # magic, version, flags, capacity, grain size, descriptor: sector, sectors
VMDK_PARENT = re.compile(rb"parentFileNameHint|parentCID\s*=\s*(?!f{8})", re.IGNORECASE)
VMDK_SECOND = (1, 20)  # sectors where QEMU looks for a parent, whatever the header says
VPC_MAGIC = b"conectix"
VPC_TYPE = 60  # offset in the footer
VPC_ALONE = (2, 3)  # fixed, dynamic
QED_FEATURES = 16  # offset
QED_BACKING_FILE = 1
CONVERT = "qemu-img convert -O qcow2 makes one image of it"


def require_alone(source: Source, image_format: str) -> None:
    """Refuse an image that QEMU would follow to other files, or whose content is not all in its own.

    Args:
        source: the image's file.
        image_format: one of FORMATS.

    Raises:
        UnsupportedImage: it is such an image.
        CorruptImage: it does not begin like that format.
        OSError: it cannot be read.
    """
    {"vmdk": _vmdk, "vpc": _vpc, "qed": _qed}.get(image_format, _nothing)(source)


def _nothing(source: Source) -> None:
    pass


def _refused(source: Source, what: str, why: str) -> UnsupportedImage:
    return UnsupportedImage(source.name, what, why, hint=CONVERT)


def _vmdk(source: Source) -> None:
    start = source.read_at(0, VMDK.size)
    if start[:4] != b"KDMV" or len(start) < VMDK.size:
        why = "files that an image names are opened by nobody but qcowfs itself"
        raise _refused(source, "a vmdk image of several files", why)
    _, _, _, capacity, _, sector, sectors = VMDK.unpack(start)
    if capacity == 0 or sector == 0:  # QEMU takes the first for a list of extents, the second is one of several
        raise _refused(source, "a vmdk image of several files", "only those in one file are supported")
    for first, count in ((sector, sectors), VMDK_SECOND):
        if VMDK_PARENT.search(source.read_at(first * SECTOR, min(count * SECTOR, limits.MAX_VMDK_DESCRIPTOR))):
            raise _refused(source, "a vmdk image with a parent", "only those that stand alone are supported")


def _vpc(source: Source) -> None:
    footer = source.read_at(0, SECTOR)
    if not footer.startswith(VPC_MAGIC):
        footer = source.read_at(max(source.size - SECTOR, 0), SECTOR)
    if not footer.startswith(VPC_MAGIC) or len(footer) < SECTOR:
        raise CorruptImage(source.name, "not a vpc image", "no footer was found")
    if int.from_bytes(footer[VPC_TYPE : VPC_TYPE + 4], "big") not in VPC_ALONE:
        raise _refused(source, "a vpc image with a parent", "only those that stand alone are supported")


def _qed(source: Source) -> None:
    features = int.from_bytes(source.read_at(QED_FEATURES, 8), "little")
    if features & QED_BACKING_FILE:
        raise _refused(source, "a qed image with a backing file", "only those that stand alone are supported")

"""Raw images: every byte of the file is a byte of the disk; and what other formats look like.

Used by chain. Pure functions; any thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcowfs._source import Source

__all__ = ["foreign_footer", "foreign_format", "virtual_size"]

SECTOR = 512
PROBE_LENGTH = 80
VPC_MAGIC = b"conectix"

# Formats that qcowfs itself does not read: (offset, magic, QEMU's name). A file that starts so is never taken for a raw
# disk by guessing.
FOREIGN = (
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, VPC_MAGIC, "vpc"),
    (0, b"QED\0", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
)


def virtual_size(source: Source) -> int:
    """Return the bytes of a raw disk: QEMU rounds a file up to whole sectors of 512 bytes, and so reads zeros there."""
    return -(-source.size // SECTOR) * SECTOR


def foreign_format(data: bytes) -> str | None:
    """Return QEMU's name of the format that `data`, the first PROBE_LENGTH bytes, belongs to; None if none is known."""
    return next((name for offset, magic, name in FOREIGN if data[offset : offset + len(magic)] == magic), None)


def foreign_footer(source: Source) -> str | None:
    """Return QEMU's name of the format that is known by how `source` ends: a fixed vpc image is a disk and a footer.

    Raises:
        OSError: it cannot be read.
    """
    start = source.size - SECTOR
    return "vpc" if start >= 0 and source.read_at(start, len(VPC_MAGIC)) == VPC_MAGIC else None

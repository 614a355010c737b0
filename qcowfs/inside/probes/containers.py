"""What holds volumes instead of files: LUKS, physical volumes of LVM2, members of a Linux RAID.

Used by filesystems.py, and asked first: what such a container was made over often left its own superblock behind.
"""

from __future__ import annotations

import struct
import uuid

from qcowfs.inside.lvmlabel import read_label
from qcowfs.inside.probes import Filesystem, Read, text
from qcowfs.inside.probes.windows import bitlocker

__all__ = ["PROBES"]

RAID_MAGIC = 0xA92B4EFC
RAID_PLACES = (0, 4096)  # of version 1.1 and 1.2
SECTOR = 512


def luks(read: Read, size: int) -> Filesystem | None:
    """Recognise LUKS 1 and 2."""
    data = read(0, 208)
    version = int.from_bytes(data[6:8], "big")
    if not data.startswith(b"LUKS\xba\xbe") or version not in (1, 2):
        return None
    label = text(data[24:72]) if version == 2 else ""
    return Filesystem(kind="crypto_LUKS", label=label, uuid=text(data[168:208]))


def lvm(read: Read, size: int) -> Filesystem | None:
    """Recognise a physical volume of LVM2."""
    label = read_label(read)
    if label is None:
        return None
    return Filesystem(kind="LVM2_member", uuid=label.uuid, size=label.device_size)


def raid(read: Read, size: int) -> Filesystem | None:
    """Recognise a member of a Linux RAID, by a superblock of version 1.1 or 1.2, then 1.0, then 0.90."""
    at_end = (size // SECTOR - 16) // 8 * 8 * SECTOR  # 1.0: 8 KiB before the end at least, aligned to 4 KiB
    for place in (*RAID_PLACES, at_end):
        data = read(place, 256)
        magic, version = struct.unpack_from("<II", data)
        if (magic, version) == (RAID_MAGIC, 1) and int.from_bytes(data[144:152], "little") == place // SECTOR:
            return Filesystem(kind="linux_raid_member", label=text(data[32:64]), uuid=str(uuid.UUID(bytes=data[16:32])))
    magic, version, first, *others = struct.unpack("<II12xI28xIII", read((size & ~0xFFFF) - 0x10000, 64))
    if (magic, version) != (RAID_MAGIC, 0):
        return None
    return Filesystem(kind="linux_raid_member", uuid=str(uuid.UUID(bytes=struct.pack(">4I", first, *others))))


PROBES = (lvm, luks, bitlocker, raid)

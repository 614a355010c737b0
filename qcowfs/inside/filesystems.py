"""What a volume holds: a file system of some kind, or what is below one.

Used by contents.py. Only whether there is a reader for it is decided here; the reader itself judges the rest.
"""

from __future__ import annotations

from dataclasses import replace

from qcowfs.errors import QcowfsError
from qcowfs.inside.probes import Filesystem, Read, containers, ext, linux, padded, windows

__all__ = ["Filesystem", "probe"]

READABLE = frozenset({"ext2", "ext3", "ext4", "vfat", "exfat", "ntfs"})
TROUBLES = {
    "LVM2_member": "it is a physical volume of LVM",
    "linux_raid_member": "it is a member of a Linux RAID, which is not supported yet",
    "crypto_LUKS": "it is encrypted (LUKS)",
    "BitLocker": "it is encrypted (BitLocker)",
    "swap": "it is swap space",
    "swsuspend": "it is swap space that holds a hibernated system",
    "bcache": "it is a part of a bcache, which is not supported yet",
    "zfs_member": "it is a part of a ZFS pool, which is not supported yet",
}
PROBES = (*containers.PROBES, *windows.PROBES, *linux.PROBES[:1], ext.probe, *linux.PROBES[1:])


def probe(read: Read, size: int) -> Filesystem | None:
    """Return what a volume of `size` bytes holds; None if nothing known.

    Args:
        read: returns the bytes at an offset, of a length; fewer at the volume's end.

    Raises:
        QcowfsError: a place where a superblock could be cannot be read, and there is none elsewhere.
    """
    failure: QcowfsError | None = None
    for recognise in PROBES:
        try:
            found = recognise(padded(read, size), size)
        except QcowfsError as error:
            failure = failure or error
            continue
        if found is not None:
            return replace(found, trouble=found.trouble or _trouble(found.kind))
    if failure is not None:
        raise failure
    return None


def _trouble(kind: str) -> str:
    return "" if kind in READABLE else TROUBLES.get(kind, f"{kind} is not supported yet")

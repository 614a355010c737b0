"""What reparse points of NTFS stand for: links of Windows, of its subsystem for Linux, and files it has compressed.

Used by ntfs.py. Pure.
"""

from __future__ import annotations

import struct

from qcowfs.inside.directories import utf8

__all__ = ["WOF", "tag", "target"]

SYMLINK, JUNCTION, LINUX_SYMLINK, WOF = 0xA000000C, 0xA0000003, 0xA000001D, 0x80000017  # tags
LONGEST_LINK = 4095


def tag(stored: bytes) -> int:
    """Return which kind of reparse point it is."""
    return int.from_bytes(stored[:4], "little")


def target(stored: bytes) -> bytes:
    r"""Return where a link leads, b"" for what is no link.

    A path of Windows has / for its \, and begins with its drive, which is no place here.
    """
    kind = tag(stored)
    if kind == LINUX_SYMLINK:
        found = stored[12:]
    elif kind in (SYMLINK, JUNCTION) and len(stored) >= 16:
        place, length = struct.unpack_from("<HH", stored, 8)
        names = stored[20 if kind == SYMLINK else 16 :]
        found = utf8(names[place : place + length]).removeprefix(b"\\??\\").replace(b"\\", b"/")
    else:
        return b""
    return found.partition(b"\0")[0][:LONGEST_LINK]

"""What the kernel remembers of a mount, and how it is told to forget: FUSE's notifications.

Used by mount.py. They are written to the device itself, by a thread that has nothing else to do: the kernel waits for
the root directory's lock before it obeys, and whoever has that may be waiting for one of our answers. libfuse's own
functions would send them through the data plane's relay, which carries these answers.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from contextlib import suppress

__all__ = ["KernelCache"]

# Linux, fuse.h: struct fuse_out_header, fuse_notify_inval_inode_out and fuse_notify_inval_entry_out
_HEADER = struct.Struct("=IiQ")
_INODE = struct.Struct("=Qqq")
_ENTRY = struct.Struct("=QII")
FUSE_NOTIFY_INVAL_INODE = 2
FUSE_NOTIFY_INVAL_ENTRY = 3
ROOT = 1


class KernelCache:
    """The kernel's side of a mount.

    Args:
        device: a descriptor of the FUSE device, which belongs to this object from now on.
    """

    def __init__(self, device: int) -> None:
        self._device = device

    def close(self) -> None:
        """Let go of the device: the kernel takes a daemon for dead only when nobody has it open."""
        os.close(self._device)

    def forget(self, names: Iterable[bytes]) -> None:
        """Let the kernel look these names in the root directory up again, and read the directory and its attributes.

        May wait for all lookups that are under way: never in the mount's thread.
        """
        for name in names:
            self._tell(FUSE_NOTIFY_INVAL_ENTRY, _ENTRY.pack(ROOT, len(name), 0) + name + b"\0")
        self._tell(FUSE_NOTIFY_INVAL_INODE, _INODE.pack(ROOT, 0, 0))

    def _tell(self, code: int, body: bytes) -> None:
        with suppress(OSError):  # ENOENT: the kernel has no such name; ENODEV: it has no such mount any more
            os.write(self._device, _HEADER.pack(_HEADER.size + len(body), code, 0) + body)

"""A reader whose tree no file system could hold: directories in themselves, without an end, or without a bottom.

Runs in a real worker. What an inode number is stands in KINDS.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator

from qcowfs.inside.reader import Device, Extents
from qcowfs.inside.record import NO_XATTRS, Inode, fill, pack_entry

__all__ = ["BOTTOMLESS", "ENDLESS", "SIZE", "WildReader", "open_reader"]

ROOT = 2
PLAIN, ENDLESS, BREAKS, COMPRESSED, SHORT, BOTTOMLESS = 10, 20, 30, 40, 41, 1000
SIZE = 3 << 20  # bytes of each file
TREE = {
    ROOT: {b"self": ROOT, b"one": PLAIN, b"two": PLAIN, b"endless": ENDLESS, b"breaks": BREAKS, b"deep": BOTTOMLESS},
    PLAIN: {b"compressed": COMPRESSED, b"short": SHORT, b"up": ROOT},
}


class WildReader:
    root = ROOT

    def __init__(self, device: Device) -> None:
        self.device = device

    def facts(self) -> dict[str, str]:
        return {}

    def stat(self, ino: int) -> bytes:
        mode = stat.S_IFREG | 0o644 if ino in (COMPRESSED, SHORT) else stat.S_IFDIR | 0o755
        return Inode(ino, SIZE, 0, 1, 2, 3, 4, 5, 6, mode, 1, 0, 0, 0, NO_XATTRS, 0).pack()

    def lookup(self, ino: int, name: bytes) -> int:
        for other, child in self._names(ino):
            if other == name:
                return child
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    def entries(self, ino: int, cookie: int, room: int) -> bytes:
        if ino == BREAKS and cookie:
            raise OSError(errno.EIO, "the second page is damaged")
        if ino in (ENDLESS, BREAKS):
            names = ((b"%020d" % number, PLAIN) for number in range(cookie, cookie + 1000))
        else:
            names = iter(list(self._names(ino))[cookie:])
        return fill((pack_entry(name, self.stat(child), cookie + n) for n, (name, child) in enumerate(names, 1)), room)

    def readlink(self, ino: int) -> bytes:
        raise OSError(errno.EINVAL, "no link")

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        return {}

    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        return None

    def read(self, ino: int, offset: int, length: int) -> bytes:
        if ino == SHORT and offset:
            return b""
        return bytes([offset >> 20]) * length

    def _names(self, ino: int) -> Iterator[tuple[bytes, int]]:
        yield from TREE.get(ino, {b"d": ino + 1} if ino >= BOTTOMLESS else {}).items()


def open_reader(device: Device, *, recover: bool) -> WildReader:
    return WildReader(device)

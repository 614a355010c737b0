"""A reader whose directory has the same names again and again: links, directories and files. Runs in a real worker."""

from __future__ import annotations

import errno
import stat

from qcowfs.inside.reader import Device, Extents
from qcowfs.inside.record import NO_XATTRS, Inode, fill, pack_entry

__all__ = ["NamesakeReader", "open_reader"]

ROOT, LINK, DIRECTORY, FILE, SECOND, DEVICE, BROKEN, OTHER = 2, 10, 11, 12, 13, 14, 15, 16
OUTSIDE = b"../outside"
MODES = {
    LINK: stat.S_IFLNK | 0o777,
    ROOT: stat.S_IFDIR | 0o755,
    DIRECTORY: stat.S_IFDIR | 0o755,
    OTHER: stat.S_IFDIR | 0o755,
    DEVICE: stat.S_IFCHR | 0o666,
}
TREE = {
    ROOT: [
        (b"a", LINK),
        (b"a", DIRECTORY),
        (b"a", FILE),
        (b"b", OTHER),
        (b"b", LINK),
        (b"c", FILE),
        (b"c", LINK),
        (b"d", DEVICE),
        (b"d", SECOND),
        (b"e", BROKEN),
    ],
    DIRECTORY: [(b"made", FILE), (b"made", LINK)],
    OTHER: [(b"made", FILE)],
}


class NamesakeReader:
    root = ROOT

    def facts(self) -> dict[str, str]:
        return {}

    def stat(self, ino: int) -> bytes:
        mode = MODES.get(ino, stat.S_IFREG | 0o644)
        size = 5 if stat.S_ISREG(mode) else 0
        return Inode(ino, size, 0, 1, 2, 3, 4, 5, 6, mode, 1, 0, 0, 0, 0 if ino == BROKEN else NO_XATTRS, 0).pack()

    def lookup(self, ino: int, name: bytes) -> int:
        return dict(TREE[ino])[name]

    def entries(self, ino: int, cookie: int, room: int) -> bytes:
        names = TREE[ino][cookie:]
        return fill((pack_entry(name, self.stat(child), cookie + n) for n, (name, child) in enumerate(names, 1)), room)

    def readlink(self, ino: int) -> bytes:
        return OUTSIDE

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        raise OSError(errno.EIO, "the attributes are damaged")

    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        return None

    def read(self, ino: int, offset: int, length: int) -> bytes:
        return b"bytes"[offset : offset + length]


def open_reader(device: Device, *, recover: bool) -> NamesakeReader:
    return NamesakeReader()

"""A reader of no file system: what an inode number does to it, a test decides. Runs in a real worker."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import stat

from qcowfs.inside.reader import DIGEST, INLINE, Device, Extents, Layout, Unproven, Unreadable
from qcowfs.inside.record import Extent, Inode, fill, pack_entry

__all__ = ["NONSENSE", "FakeReader", "inode", "open_reader"]

ROOT = 2
MANY = 5000
NONSENSE = 666  # of this inode everything that is said breaks a rule
LIBC = ctypes.CDLL(None, use_errno=True)


def inode(ino: int, mode: int = stat.S_IFREG | 0o644) -> bytes:
    return Inode(ino, 1 << 20, 8, 1, -2, 3, 4, 5, 6, mode, 1, 70000, 4_000_000_000, 0, 0, 0).pack()


class FakeReader:
    root = ROOT

    def __init__(self, device: Device) -> None:
        self.device = device
        self.suspects: bytes | None = None

    def facts(self) -> dict[str, str]:
        return {"recovery": "none"}

    def stat(self, ino: int) -> bytes:
        return inode(ino + (ino == NONSENSE))

    def lookup(self, ino: int, name: bytes) -> int:
        """Do what the name says, to see what becomes of it."""
        if name == b"segv":
            ctypes.string_at(8)
        if name == b"spin":
            while True:
                pass
        if name == b"memory":
            bytearray(1 << 30)
        if name == b"bug":
            return [0][1]
        if name in FORBIDDEN:
            return _errno_of(name)
        raise FileNotFoundError(errno.ENOENT, "no such\nname")

    def entries(self, ino: int, cookie: int, room: int) -> bytes:
        if ino == NONSENSE:
            return pack_entry(b"a/b", inode(7), 1)
        names = range(cookie, MANY)
        return fill((pack_entry(b"file-%06d" % n, inode(n + 10), n + 1, [Extent(0, 4096, n)]) for n in names), room)

    def layout(self) -> Layout:
        return Layout(b"d" * DIGEST, [(4096, 8192), (8192, self.device.size)])

    def suspect(self, ranges: bytes) -> None:
        self.suspects = ranges

    def unproven(self, ino: int) -> Unproven | None:
        """Tell how many bytes `suspect` had, as an inode number; None before it."""
        if ino == NONSENSE:
            return Unproven(pack_entry(b"a/b", inode(7), 1), True, b"")
        if self.suspects is None:
            return None
        return Unproven(pack_entry(b"name", inode(10 + len(self.suspects)), 1), False, b"m" * DIGEST)

    def readlink(self, ino: int) -> bytes:
        return b"" if ino == NONSENSE else b"/etc/\xff"

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        if ino == NONSENSE:
            return {b"user.%d" % number: bytes(60000) for number in range(100)}
        return {b"user.a": b"", b"security.b": b"\0" * 30000}

    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        if ino == NONSENSE:
            return Extents([Extent(0, 10, self.device.size)], 10)
        return None if ino == ROOT else Extents([Extent(0, 10, 20), Extent(10, 3, INLINE)], 100, b"abc")

    def read(self, ino: int, offset: int, length: int) -> bytes:
        return self.device.read(offset, length)


def _errno_of(name: bytes) -> int:
    """Return the errno of a thing that is forbidden, or 4000 if it was possible."""
    try:
        FORBIDDEN[name]()
    except OSError as error:
        return error.errno or 0
    return 4000


FORBIDDEN = {
    b"open": lambda: os.open("/etc/passwd", os.O_RDONLY),
    b"create": lambda: os.open("/tmp/qcowfs-sandbox-test", os.O_CREAT | os.O_WRONLY, 0o600),
    b"unlink": lambda: os.unlink("/tmp/qcowfs-sandbox-test"),
    b"stat": lambda: os.stat("/etc/passwd"),
    b"dup": lambda: os.dup(3),
    b"setuid": lambda: os.setuid(0),
    b"pipe": lambda: os.pipe(),
    b"exec": lambda: os.execv("/bin/true", ["true"]),
    b"fork": lambda: os.fork(),
    b"socket": lambda: socket.socket(),
    b"kill": lambda: os.kill(1, signal.SIGTERM),
    b"unshare": lambda: LIBC.unshare(0x10000000),
}


def open_reader(device: Device, *, recover: bool) -> FakeReader:
    if device.size == 13:
        raise Unreadable("thirteen\x1b bytes")
    if device.size == 14:
        try:
            device.read(0, 14)
        except OSError as error:
            raise Unreadable("it cannot be read") from error
    return FakeReader(device)

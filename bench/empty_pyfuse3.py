"""What a mount costs that does nothing: the smallest file system on pyfuse3 and trio, one file of one byte.

`python empty_pyfuse3.py MOUNTPOINT` serves in the foreground until it is unmounted. Alone in its folder on purpose: it
imports nothing of this project.
"""

from __future__ import annotations

import errno
import stat
import sys

import pyfuse3
import trio

NAME, INODE, CONTENT = b"disk.raw", pyfuse3.InodeT(2), b"\0"


class Empty(pyfuse3.Operations):
    """One file in the root directory."""

    async def getattr(
        self, inode: pyfuse3.InodeT, ctx: pyfuse3.RequestContext | None = None
    ) -> pyfuse3.EntryAttributes:
        """Say what the file or the root is."""
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFREG | 0o444 if inode == INODE else stat.S_IFDIR | 0o555
        entry.st_size = len(CONTENT)
        return entry

    async def lookup(
        self, parent_inode: pyfuse3.InodeT, name: pyfuse3.FileNameT, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        """Find the file."""
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(INODE)

    async def open(self, inode: pyfuse3.InodeT, flags: pyfuse3.FlagT, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        """Open the file."""
        return pyfuse3.FileInfo(fh=pyfuse3.FileHandleT(1))

    async def read(self, fh: pyfuse3.FileHandleT, off: int, size: int) -> bytes:
        """Read the file."""
        return CONTENT[off : off + size]


def main() -> None:
    """Serve until unmounted."""
    pyfuse3.init(Empty(), sys.argv[1], {"fsname=empty", *pyfuse3.default_options})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


if __name__ == "__main__":
    main()

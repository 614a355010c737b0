"""Nodes of the mount: directories, symbolic links, and the raw disks of points.

Used by vfs/tree.py, which makes them, and by fuse.py, which asks them. One thread (the mount's), but for
`DiskFile.count`, which walks tables and may run in any one thread at a time, and `RawFile`'s `read`, `end` and
`report`, which are for the threads of the data plane too. Nodes live as long as their point is shown, and as long as
they are open, so FUSE's lookup counts are of no interest here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from qcowfs.errors import QcowfsError
from qcowfs.vfs.faults import FaultLog

__all__ = ["Attributes", "Directory", "Disk", "DiskFile", "LiveFile", "Node", "Place", "RawFile", "Symlink"]

BLOCK = 512  # the unit of st_blocks, whatever st_blksize says


class Disk(Protocol):
    """What a file reads from: a `_core.Disk`, a `snapshot.LiveDisk`, or a test's."""

    @property
    def virtual_size(self) -> int: ...
    def pread(self, offset: int, length: int) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """What stat(2) shows of a node.

    `blocks` is in units of 512 bytes, times are nanoseconds since the epoch. `lasting` is True if nothing of it can
    change while the mount lives.
    """

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    rdev: int
    lasting: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a node stands in the mount, and whose it is.

    Attributes:
        ino: the inode number, from `inodes`.
        name: the name in the parent directory, as the file system has it; b"/" for the root.
        path: where it is, for messages; empty: `name` says it.
        owner: (uid, gid).
        date_ns: nanoseconds since the epoch: mtime, ctime and atime alike.
        xattrs: user.qcowfs.* names and values.
    """

    ino: int
    name: bytes
    owner: tuple[int, int]
    date_ns: int
    xattrs: Mapping[bytes, bytes] = field(default_factory=dict)
    path: bytes = b""


class Node:
    """What all nodes have: a place, and attributes."""

    __slots__ = ("place",)

    mode = 0

    def __init__(self, place: Place) -> None:
        self.place = place

    def attributes(self) -> Attributes:
        """Return what stat(2) shows, with little or no I/O."""
        return self._attributes(size=0)

    def listed(self) -> Attributes:
        """Return what a directory listing shows in passing: cheap, and nothing that can fail."""
        return self.attributes()

    def _attributes(
        self, *, size: int, nlink: int = 1, blocks: int = 0, date_ns: int | None = None, lasting: bool = True
    ) -> Attributes:
        uid, gid = self.place.owner
        date_ns = self.place.date_ns if date_ns is None else date_ns
        return Attributes(
            ino=self.place.ino,
            mode=self.mode,
            nlink=nlink,
            uid=uid,
            gid=gid,
            size=size,
            blocks=blocks,
            atime_ns=date_ns,
            mtime_ns=date_ns,
            ctime_ns=date_ns,
            rdev=0,
            lasting=lasting,
        )


class Directory(Node):
    """A directory of the mount's own; who makes it fills `entries`, and only the root's change afterwards."""

    __slots__ = ("entries", "parent")

    mode = stat.S_IFDIR | 0o555

    def __init__(self, place: Place, parent: Directory | None = None) -> None:
        super().__init__(place)
        self.parent = parent or self  # the root is its own parent
        self.entries: dict[bytes, Node] = {}

    def attributes(self) -> Attributes:
        # 1 is "nobody counted": whether a point has a directory is found out when somebody asks.
        return self._attributes(size=0, nlink=1)


class Symlink(Node):
    """A symbolic link to a name in its own directory."""

    __slots__ = ("target",)

    mode = stat.S_IFLNK | 0o777

    def __init__(self, place: Place, target: bytes) -> None:
        super().__init__(place)
        self.target = target

    def attributes(self) -> Attributes:
        return self._attributes(size=len(self.target))


class RawFile(Node):
    """NAME.raw: a point as raw bytes. Its disk exists while somebody has it open, and all of them share it.

    Args:
        make_disk: opens the disk; may raise QcowfsError.
        faults: hears of what cannot be read.
        virtual_size: bytes, at the time of the mount.
    """

    __slots__ = ("_disk", "_faults", "_make_disk", "_opened", "_virtual_size")

    mode = stat.S_IFREG | 0o444
    live = False  # True: no answer may be cached

    def __init__(self, place: Place, make_disk: Callable[[], Disk], faults: FaultLog, *, virtual_size: int) -> None:
        super().__init__(place)
        self._make_disk = make_disk
        self._faults = faults
        self._virtual_size = virtual_size
        self._disk: Disk | None = None  # not None exactly while _opened > 0
        self._opened = 0  # handles

    @property
    def opened(self) -> int:
        """Handles that are open."""
        return self._opened

    def open(self) -> Disk:
        """Take one more handle, and return the disk; the first handle makes it.

        Raises:
            QcowfsError: this point cannot be read. It is logged.
        """
        if self._disk is None:
            self._disk = self._made()
        self._opened += 1
        return self._disk

    def release(self) -> None:
        """Give one handle back; the last one lets go of the disk and its tables."""
        self._opened = max(0, self._opened - 1)
        if not self._opened:
            self._disk = None

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`, fewer only at the end of the disk.

        Raises:
            QcowfsError: they cannot be read right. It is logged.
            OSError: EBADF, nobody has the file open.
        """
        try:
            return self._open_disk().pread(offset, length)
        except QcowfsError as fault:
            self.report(fault)
            raise

    def end(self) -> int:
        """Return where the disk ends now, in bytes.

        Raises:
            QcowfsError: nobody can tell right now. It is logged.
            OSError: EBADF, nobody has the file open.
        """
        try:
            return self._open_disk().virtual_size
        except QcowfsError as fault:
            self.report(fault)
            raise

    def report(self, fault: QcowfsError) -> None:
        """Log that something of this file cannot be read."""
        self._faults.report(os.fsdecode(self.place.path or self.place.name), fault)

    def _open_disk(self) -> Disk:
        disk = self._disk
        if disk is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return disk

    def _made(self) -> Disk:
        try:
            return self._make_disk()
        except QcowfsError as fault:
            self.report(fault)
            raise


class DiskFile(RawFile):
    """A frozen point, or a volume inside of one.

    Args:
        count_allocated: returns the bytes that it allocates; may walk tables, is called at most once.
    """

    __slots__ = ("_blocks", "_changed", "_count_allocated", "_count_changed", "_predecessor")

    def __init__(
        self,
        place: Place,
        make_disk: Callable[[], Disk],
        faults: FaultLog,
        *,
        virtual_size: int,
        count_allocated: Callable[[], int],
    ) -> None:
        super().__init__(place, make_disk, faults, virtual_size=virtual_size)
        self._count_allocated = count_allocated
        self._blocks: int | None = None  # None until counted
        self._predecessor: object = None
        self._count_changed: Callable[[], int | None] | None = None
        self._changed: int | None = None

    def compare_with(self, predecessor: object, count_changed: Callable[[], int | None] | None) -> None:
        """Say which point is the one before it.

        Args:
            predecessor: a point; None: there is none.
            count_changed: returns the bytes that may have changed since then, None if that takes too long; may walk
                tables, is called at most once.
        """
        if predecessor is not self._predecessor:
            self._predecessor, self._count_changed, self._changed = predecessor, count_changed, None

    @property
    def has_predecessor(self) -> bool:
        """True if there is a point before it, since which something may have changed."""
        return self._count_changed is not None

    def changed(self) -> int | None:
        """Return the bytes that may have changed since the point before it; None if nobody can tell in time.

        May read megabytes of tables: call it off the mount's thread, one call at a time.
        """
        if self._changed is None and self._count_changed is not None:
            self._changed = self._count_changed()
        return self._changed

    @property
    def counted(self) -> bool:
        """True once `attributes` knows st_blocks."""
        return self._blocks is not None

    def count(self) -> None:
        """Find out st_blocks. May read megabytes of tables: call it off the mount's thread, one call at a time."""
        if self._blocks is None:
            self._blocks = -(-self._count_allocated() // BLOCK)

    def attributes(self) -> Attributes:
        """Return what stat(2) shows; until `count` was called with st_blocks 0, and not lasting."""
        return self._attributes(size=self._virtual_size, blocks=self._blocks or 0, lasting=self.counted)


class LiveFile(RawFile):
    """A point that another process may be writing: every answer is of this moment.

    Args:
        look: returns the status of the layer's file now.
    """

    __slots__ = ("_look",)

    live = True

    def __init__(
        self,
        place: Place,
        make_disk: Callable[[], Disk],
        faults: FaultLog,
        *,
        virtual_size: int,
        look: Callable[[], os.stat_result],
    ) -> None:
        super().__init__(place, make_disk, faults, virtual_size=virtual_size)
        self._look = look

    def listed(self) -> Attributes:
        """Return what was true at the time of the mount; the kernel asks again before it believes it."""
        return self._attributes(size=self._virtual_size, lasting=False)

    def attributes(self) -> Attributes:
        """Return what stat(2) shows, from the header and the file as they are now.

        st_blocks are the file's own: a count of tables would be out of date before it ended. A block device has
        none, and tar -S takes a file without blocks for one hole.

        Raises:
            QcowfsError: the header cannot be read right now. It is logged.
        """
        status = self._look()
        return self._attributes(
            size=self._made().virtual_size, blocks=max(status.st_blocks, 1), date_ns=status.st_mtime_ns, lasting=False
        )

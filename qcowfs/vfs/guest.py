"""A tree of files inside a volume, as the mount shows it: NAME/ of a bare file system, NAME/p1/ of a partition.

Used by vfs/folder.py, which makes them, and by fuse.py and the data plane, which ask them. Everything may wait for the
tree's worker and for the image: never in the mount's thread. Nothing is remembered here but what `_nodes` keeps.
"""

from __future__ import annotations

import errno
import logging
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qcowfs._mapped import Mapped
from qcowfs.errors import QcowfsError, TreeFault, printable
from qcowfs.inside.record import INODE, INODE_BITS, Inode, unpack_entries
from qcowfs.vfs.faults import FaultLog
from qcowfs.vfs.links import Depths, contained
from qcowfs.vfs.node import Attributes, Directory, Node, Place
from qcowfs.vfs.xattrs import PREFIX

if TYPE_CHECKING:
    from qcowfs._nodes import Nodes
    from qcowfs.inside.client import Tree
    from qcowfs.inside.guestfile import Broken

__all__ = ["Entry", "Guest", "GuestFile", "GuestListing", "GuestRoot", "Presentation"]

PAGE = 64 << 10  # bytes of entries that are asked for at once: some 300, of which the kernel takes 20 at a time
TRUSTED = b"trusted."  # attributes that only root may see, says xattr(7)
# Faults of who asks, not of what is asked.
SILENT = frozenset((errno.ENOENT, errno.ENODATA, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ESTALE))
ERROR = struct.Struct("<I")  # the last field of record.INODE
SECOND = 1_000_000_000  # nanoseconds
NUMBERS = (1 << INODE_BITS) - 1

logger = logging.getLogger("qcowfs.mount")


@dataclass(frozen=True, slots=True)
class Presentation:
    """How the files of trees are shown.

    Attributes:
        uid, gid: instead of the stored ones; -1: as stored.
        umask: bits that are taken away from the modes of files and directories.
        recover: as the guest's next boot would find them, not as they are on the disk.
        contain: symbolic links lead to the same place in the tree, and never out of it.
    """

    uid: int = -1
    gid: int = -1
    umask: int = 0
    recover: bool = True
    contain: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """A name in a directory; `readable` is False if nothing but its type is known, and `cookie` is where to go on."""

    name: bytes
    attributes: Attributes
    readable: bool
    cookie: int


class Guest:
    """One tree.

    Args:
        base: of its inode numbers in the mount.
        own_xattrs: returns the root's user.qcowfs.*, by what was done to bring the tree up to date.
        make_tree: makes the tree, of which nothing is read yet.
        volume: the bytes that the tree is on.
    """

    def __init__(
        self,
        base: int,
        own_xattrs: Callable[[str], Mapping[bytes, bytes]],
        make_tree: Callable[[], Tree],
        volume: Mapped,
        nodes: Nodes,
        presentation: Presentation,
        faults: FaultLog,
    ) -> None:
        self.base = base
        self.volume = volume
        self._own_xattrs = own_xattrs
        self._make_tree = make_tree
        self._nodes = nodes
        self._presentation = presentation
        self._faults = faults
        self._lock = threading.Lock()
        self._tree: Tree | None = None
        self._root = 0
        self._recovery = ""
        self._depths = Depths(base) if presentation.contain else None
        self.resolved = False
        self.attributes_of_root: Attributes | None = None

    def resolve(self) -> bool:
        """Open the tree, if nobody did; return whether it can be shown. If not, the log says why.

        Raises:
            TreeFault: nobody can tell now; the next one who asks may.
        """
        with self._lock, self._reported():
            if not self.resolved:
                self._open()
            return self.attributes_of_root is not None

    def _open(self) -> None:
        shown = self._presentation
        tree = self._tree = self._tree or self._make_tree()
        try:
            self._root, facts = tree.root, tree.facts()
            root = tree.stat(self._root)
        except TreeFault as fault:
            if fault.errno != errno.ENOTSUP:
                raise
            logger.warning("%s is not shown as a directory", fault)
            self.resolved = True
            return
        self._shown(root)  # before it is entered: it may be damaged
        self._nodes.enter(self.base, self._root, self.volume, self, uid=shown.uid, gid=shown.gid, umask=shown.umask)
        self._recovery = facts.get("recovery", "")
        self.attributes_of_root = self._shown(self._nodes.inode(self.base, root))
        self.resolved = True

    def attributes(self, number: int) -> Attributes:
        """Return what stat(2) shows of an inode.

        Args:
            number: of the mount.

        Raises:
            TreeFault: it cannot be read.
        """
        with self._reported():
            return self._shown(self._nodes.inode(self.base, self._opened().stat(self._ino(number))))

    def lookup(self, number: int, name: bytes) -> Attributes | None:
        """Return what stat(2) shows of `name` in a directory, None if there is no such name.

        Raises:
            TreeFault: that cannot be told.
        """
        with self._reported():
            tree = self._opened()
            try:
                ino = tree.lookup(self._ino(number), name)
            except TreeFault as fault:
                if fault.errno != errno.ENOENT:
                    raise
                return None
            found = self._shown(self._nodes.inode(self.base, tree.stat(ino)))
            if self._depths is not None and not self._depths.learn(number, found.ino, found.mode):
                raise TreeFault(tree.name, f"inode {ino}: a directory that is in two places", errno.EIO)
            return found

    def page(self, number: int, cookie: int) -> bytes:
        """Return some entries of a directory (record.pack_entry), as the mount shows them; b"" after the last.

        Args:
            cookie: 0, or that of the last entry before.

        Raises:
            TreeFault: they cannot be read.
        """
        with self._reported():
            page = self._nodes.page(self.base, self._opened().entries(self._ino(number), cookie, PAGE))
            return page if self._depths is None else self._learned(self._depths, number, page)

    def _learned(self, depths: Depths, number: int, page: bytes) -> bytes:
        """Note which links and directories are in a directory; return its page, errors where `lookup` raises one."""
        learned = bytearray(page)
        for _, _, place, _ in unpack_entries(page):
            inode = Inode(*INODE.unpack_from(page, place))
            if not depths.learn(number, inode.ino, inode.mode):
                ERROR.pack_into(learned, place + INODE.size - ERROR.size, errno.EIO)
        return bytes(learned)

    def readlink(self, number: int) -> bytes:
        """Return the target of a symbolic link, as it is stored or contained."""
        with self._reported():
            target = self._opened().readlink(self._ino(number))
            return target if self._depths is None else contained(target, self._depths.of(number))

    def xattrs(self, number: int, *, privileged: bool) -> list[bytes]:
        """Return the names of an inode's extended attributes; those that only root may see if `privileged`."""
        with self._reported():
            found = self._opened().xattrs(self._ino(number))
            return [name for name in found if privileged or not name.startswith(TRUSTED)]

    def xattr(self, number: int, name: bytes) -> bytes:
        """Return the value of an extended attribute; of the root also user.qcowfs.*, which are not listed.

        Raises:
            TreeFault: ENODATA, there is none; or it cannot be read.
        """
        with self._reported():
            tree = self._opened()
            if number == self.base and name.startswith(PREFIX):
                found = self._own_xattrs(self._recovery).get(name)
            else:
                found = tree.xattrs(self._ino(number)).get(name)
            if found is None:
                raise TreeFault(tree.name, "no such attribute", errno.ENODATA)
            return found

    def open(self, number: int) -> GuestFile:
        """Open a regular file.

        Raises:
            TreeFault: it is none, or cannot be read.
        """
        from qcowfs.inside.guestfile import file_disk

        with self._reported():
            attributes = self.attributes(number)
            if attributes.mode & 0o170000 != 0o100000:
                raise TreeFault(self._opened().name, f"inode {self._ino(number)}: not a file", errno.EINVAL)
            stored = file_disk(self._opened(), self.volume, self._ino(number), attributes.size)
            return GuestFile(self, number, attributes.size, stored)

    def read(self, number: int, offset: int, length: int) -> bytes:
        """Return bytes of a file that is not stored as it is, fewer only at its end."""
        with self._reported():
            tree, found = self._opened(), b""
            while length and (part := tree.read(self._ino(number), offset, length)):
                found, offset, length = found + part, offset + len(part), length - len(part)
            return found

    def report(self, number: int, fault: QcowfsError) -> None:
        """Log that bytes of a file cannot be read."""
        name = self._tree.name if self._tree is not None else ""
        self._faults.report(f"{printable(name)}: inode {self._ino(number)}", fault)

    def _opened(self) -> Tree:
        if self._tree is None:  # it was shown, so it is open
            raise TreeFault("", "nothing is open here", errno.ESTALE)
        return self._tree

    def _ino(self, number: int) -> int:
        return (number & NUMBERS) or self._root

    def _shown(self, record: bytes) -> Attributes:
        inode = Inode(*INODE.unpack(record))
        if inode.error:
            what = f"inode {self._ino(inode.ino)} cannot be read"
            raise TreeFault(self._opened().name, what, inode.error)
        return _attributes(inode)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        try:
            yield
        except TreeFault as fault:
            if fault.errno not in SILENT:
                self._faults.report_tree(fault)
            raise


class GuestRoot(Node):
    """The root of a tree, where it hangs in the mount. Its attributes are made up until the tree is open."""

    __slots__ = ("guest", "parent")

    mode = Directory.mode

    def __init__(self, place: Place, parent: Directory, guest: Guest) -> None:
        super().__init__(place)
        self.parent = parent
        self.guest = guest

    def attributes(self) -> Attributes:
        """Return those of the tree's root; before it is open, what a listing needs."""
        return self.guest.attributes_of_root or self._attributes(size=0, lasting=False)


class GuestFile:
    """An open file of a tree.

    Args:
        stored: its bytes; None: the tree's worker makes them.

    Attributes:
        guest: the tree.
        made: the worker makes the bytes.
        disk: the bytes, if the data plane can read them.
    """

    __slots__ = ("_number", "_size", "_stored", "disk", "guest", "made")

    live = False

    def __init__(self, guest: Guest, number: int, size: int, stored: Mapped | Broken | None) -> None:
        self.guest = guest
        self._number = number
        self._size = size
        self._stored = stored
        self.made = stored is None
        self.disk = stored if isinstance(stored, Mapped) else None

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`, fewer only at the end of the file.

        Raises:
            QcowfsError: they cannot be read right. It is logged.
        """
        if self._stored is None:
            return self.guest.read(self._number, offset, max(0, min(length, self._size - offset)))
        try:
            return self._stored.pread(offset, length)
        except QcowfsError as fault:
            self.report(fault)
            raise

    def end(self) -> int:
        """Return the size in bytes."""
        return self._size

    def report(self, fault: QcowfsError) -> None:
        """Log that something of this file cannot be read."""
        self.guest.report(self._number, fault)

    def release(self) -> None:
        """Nothing is held."""


class GuestListing:
    """A directory of the tree `guest` that is read from time to time, a few entries at once."""

    def __init__(self, guest: Guest, number: int) -> None:
        self.guest = guest
        self._number = number
        self._page: list[Entry] = []
        self._before = -1  # the cookie that _page was asked with

    def after(self, cookie: int) -> Sequence[Entry]:
        """Return the next entries after the one with `cookie` (0: from the start); none at the end.

        Raises:
            TreeFault: they cannot be read.
        """
        places = [place for place, entry in enumerate(self._page) if entry.cookie == cookie]
        if places and places[-1] + 1 < len(self._page):
            return self._page[places[-1] + 1 :]
        if cookie != self._before or not self._page:
            self._page = list(_unpacked(self.guest.page(self._number, cookie)))
            self._before = cookie
        return self._page


def _unpacked(page: bytes) -> Iterator[Entry]:
    """Return the entries of a page."""
    for cookie, name, place, _ in unpack_entries(page):
        inode = Inode(*INODE.unpack_from(page, place))
        yield Entry(name, _attributes(inode), not inode.error, cookie)


def _attributes(inode: Inode) -> Attributes:
    return Attributes(
        ino=inode.ino,
        mode=inode.mode,
        nlink=inode.nlink,
        uid=inode.uid,
        gid=inode.gid,
        size=inode.size,
        blocks=inode.blocks,
        atime_ns=inode.atime * SECOND + inode.atime_ns,
        mtime_ns=inode.mtime * SECOND + inode.mtime_ns,
        ctime_ns=inode.ctime * SECOND + inode.ctime_ns,
        rdev=inode.rdev,
        lasting=True,
    )

"""Files of a tree by their paths, followed as the guest's own kernel would, with the tree's root as "/".

Used by the commands. One thread. What a tree says is not trusted: whatever could go on for ever is counted.
"""

from __future__ import annotations

import difflib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from qcowfs import limits
from qcowfs._mapped import Mapped
from qcowfs.errors import TreeFault, printable
from qcowfs.inside.client import Tree
from qcowfs.inside.guestfile import Broken, file_disk
from qcowfs.inside.record import INODE, NO_XATTRS, Inode, unpack_entries

__all__ = [
    "Children",
    "File",
    "Place",
    "Trouble",
    "chunks",
    "join",
    "plain",
    "resolve",
    "root_of",
    "suggestion",
    "unpacked",
    "walk",
]

CHUNK = limits.INSIDE_WANT  # bytes that are read at once
MAX_LINKS = 40  # Linux: symbolic links of one path
COMPARED_NAMES = 5000  # of a directory, for a hint on a misspelt one: difflib takes 20 µs for each


class Trouble(NamedTuple):
    """What is wrong with the entry `name` of a directory; b"": with the directory itself."""

    name: bytes
    what: str


@dataclass(slots=True)
class Children:
    """Name and packed record.INODE of all that could be listed in a directory, by name; and what is wrong there."""

    entries: list[tuple[bytes, bytes]]
    troubles: list[Trouble] = field(default_factory=list)


class Place:
    """A file or directory below NAME/, and what can be asked of any; what it is not answers with TreeFault.

    Attributes:
        name: of the tree or volume, for messages; where `inode.ino` is a number of its own.
        inode: what stat(2) tells.
    """

    __slots__ = ()
    name: str
    inode: Inode

    def resolve(self, path: bytes, *, follow: bool) -> Place:
        """Return what `path` means from here; of its last component a symbolic link is only followed if `follow`."""
        if path:
            raise self.fault(errno.ENOTDIR)
        return self

    def plain(self, path: bytes) -> bytes:
        """Return the same path from here without what can be left out, whatever there is."""
        return plain(path)

    def children(self) -> Children:
        """Return what is in this directory."""
        raise self.fault(errno.ENOTDIR)

    def child(self, name: bytes, inode: Inode) -> Place:
        """Return an entry of `children`."""
        raise self.fault(errno.ENOTDIR)

    def target(self, inode: Inode) -> bytes:
        """Return the target of the symbolic link that is this, or an entry of this directory."""
        raise self.fault(errno.EINVAL)

    def entries(self) -> Iterator[tuple[bytes, Place]]:
        """Yield name and Place of all that is in this directory, in the order of the tree, as they are read.

        For what keeps nothing of them: a directory may have more entries than there is memory for `children`.

        Raises:
            TreeFault: the rest cannot be listed.
        """
        raise self.fault(errno.ENOTDIR)

    def again(self, name: bytes, ino: int) -> Place:
        """Return what `entries` told before, by its name and inode number."""
        raise self.fault(errno.ENOTDIR)

    def trouble(self) -> str:
        """Return why this, which `entries` told, cannot be read; "" if it can."""
        return ""

    def xattrs(self) -> dict[bytes, bytes]:
        """Return the extended attributes."""
        return {}

    def disk(self) -> Mapped | Broken | None:
        """Return the bytes of this regular file; None: `read` makes them."""
        raise TreeFault(self.name, "not a regular file", errno.EINVAL)

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of this regular file, fewer than `length` only at its end or if that is more than CHUNK."""
        raise TreeFault(self.name, "not a regular file", errno.EINVAL)

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes of this regular file."""
        if stat.S_ISDIR(self.inode.mode):
            raise self.fault(errno.EISDIR)
        disk = self.disk()
        return chunks(self.read if disk is None else disk.pread, self.inode.size, self.name)

    def stored(self) -> Mapped | None:
        """Return this regular file where its bytes are stored; None if that is not known of all, and `chunks` tells."""
        disk = self.disk()
        return disk if isinstance(disk, Mapped) else None

    def fault(self, number: int) -> TreeFault:
        """Return the error of a system call on this."""
        return TreeFault(self.name, os.strerror(number), number)


class File(Place):
    """A Place in a tree.

    Args:
        tree: it is in.
        volume: the bytes of the tree.
        extents: packed record.EXTENTs, if a listing had all that the file has.
    """

    __slots__ = ("extents", "inode", "name", "tree", "volume")

    def __init__(self, tree: Tree, volume: Mapped, inode: Inode, extents: bytes | None = None) -> None:
        self.tree = tree
        self.volume = volume
        self.inode = inode
        self.extents = extents
        self.name = tree.name

    def resolve(self, path: bytes, *, follow: bool) -> File:
        return resolve(self, path, follow=follow)

    def children(self) -> Children:
        if not stat.S_ISDIR(self.inode.mode):
            raise self.fault(errno.ENOTDIR)
        found = Children([])
        try:
            for name, inode, _ in _entries(self.tree, self.inode.ino, limits.MAX_LISTED_ENTRIES):
                found.entries.append((name, inode))
        except TreeFault as fault:
            found.troubles.append(Trouble(b"", fault.what))
        found.entries.sort()
        found.troubles += [
            Trouble(name, self._what(inode)) for name, inode in map(unpacked, found.entries) if inode.error
        ]
        return found

    def child(self, name: bytes, inode: Inode) -> File:
        return File(self.tree, self.volume, inode)

    def target(self, inode: Inode) -> bytes:
        return self.tree.readlink(inode.ino)

    def entries(self) -> Iterator[tuple[bytes, Place]]:
        if not stat.S_ISDIR(self.inode.mode):
            raise self.fault(errno.ENOTDIR)
        for name, inode, extents in _entries(self.tree, self.inode.ino, limits.MAX_WALKED_ENTRIES):
            yield name, File(self.tree, self.volume, Inode._make(INODE.unpack(inode)), extents)

    def again(self, name: bytes, ino: int) -> File:
        return _file(self.tree, self.volume, ino)

    def trouble(self) -> str:
        return self._what(self.inode) if self.inode.error else ""

    def xattrs(self) -> dict[bytes, bytes]:
        return {} if self.inode.flags & NO_XATTRS else self.tree.xattrs(self.inode.ino)

    def disk(self) -> Mapped | Broken | None:
        if not stat.S_ISREG(self.inode.mode):
            return super().disk()
        if self.extents is None:
            return file_disk(self.tree, self.volume, self.inode.ino, self.inode.size)
        try:
            return self.volume.part(self.inode.size, self.extents)
        except ValueError as error:
            what = f"inode {self.inode.ino}: the file's extents contradict its size or each other"
            raise TreeFault(self.name, what) from error

    def read(self, offset: int, length: int) -> bytes:
        return self.tree.read(self.inode.ino, offset, length)

    def _what(self, inode: Inode) -> str:
        """Return why an entry is damaged: a listing has no room for the text."""
        try:
            self.tree.stat(inode.ino)
        except TreeFault as fault:
            return fault.what
        return os.strerror(inode.error)


def root_of(tree: Tree, volume: Mapped) -> File:
    """Return the root of a tree."""
    return _file(tree, volume, tree.root)


def chunks(read: Callable[[int, int], bytes], size: int, name: str) -> Iterator[bytes]:
    """Yield `size` bytes from a function that reads some at an offset.

    Args:
        name: for messages.
    """
    place = 0
    while place < size:
        data = read(place, min(CHUNK, size - place))
        if not data:
            raise TreeFault(name, f"the file ends at {place}, and its size is {size}")
        yield data
        place += len(data)


def plain(path: bytes) -> bytes:
    """Return a path without needless slashes."""
    return b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))


def join(path: bytes, name: bytes) -> bytes:
    """Return the path of `name` in `path`; either may be empty."""
    return path + b"/" + name if path and name else path or name


def resolve(root: File, path: bytes, *, follow: bool) -> File:
    """Return the file at `path` from `root`, which no "..", no absolute target and no loop of links leaves.

    Args:
        follow: also a symbolic link that is the last component. With a slash after it, it is always followed.

    Raises:
        TreeFault: ENOENT, with a hint if another name is near; ENOTDIR, ELOOP, or what the tree said.
    """
    trail = [root]  # only its last can be no directory
    left = path.split(b"/")[::-1] if path else []  # nothing is no "/", which only a directory has behind it
    links = 0
    while left:
        name = left.pop()
        if not stat.S_ISDIR(trail[-1].inode.mode):
            raise trail[-1].fault(errno.ENOTDIR)
        if name == b"..":
            del trail[max(1, len(trail) - 1) :]
        if name in (b"", b".", b".."):
            continue
        found = _lookup(trail[-1], name)
        if not stat.S_ISLNK(found.inode.mode) or (not left and not follow):
            trail.append(found)
            continue
        links += 1
        if links > MAX_LINKS:
            raise found.fault(errno.ELOOP)
        target = found.target(found.inode)
        if target.startswith(b"/"):
            del trail[1:]
        left += target.split(b"/")[::-1]
    return trail[-1]


def walk(top: Place, path: bytes) -> Iterator[tuple[bytes, Place, Children]]:
    """Yield the path of each directory from `top` on, the directory, and what is in it; none of them twice.

    A directory comes before those in it, which come by name. A directory that cannot be listed is a trouble.

    Args:
        path: of `top`.
    """
    seen = {top.name: {top.inode.ino}}
    waiting = [(path, top, 0)]
    count = 0
    while waiting:
        at, directory, depth = waiting.pop()
        found = _children(directory)
        below = []
        for name, inode in map(unpacked, found.entries):
            if not stat.S_ISDIR(inode.mode) or inode.error:
                continue
            child = directory.child(name, inode)
            known = seen.setdefault(child.name, set())
            count += 1
            if inode.ino in known:
                found.troubles.append(Trouble(name, "the directory is also in another place, or in itself"))
            elif depth == limits.MAX_WALK_DEPTH or count > limits.MAX_WALKED_DIRECTORIES:
                found.troubles.append(Trouble(name, "not listed: there are too many directories, or too deep ones"))
            else:
                known.add(inode.ino)
                below.append((join(at, name), child, depth + 1))
        yield at, directory, found
        waiting += below[::-1]


def _children(directory: Place) -> Children:
    try:
        return directory.children()
    except TreeFault as fault:
        return Children([], [Trouble(b"", fault.what)])


def _entries(tree: Tree, ino: int, most: int) -> Iterator[tuple[bytes, bytes, bytes | None]]:
    """Yield name, packed INODE and packed EXTENTs (None: not told) of each entry, in the order of the tree."""
    cookie = count = 0
    while page := tree.entries(ino, cookie, limits.INSIDE_WANT):
        for following, name, inode, extents in unpack_entries(page):
            cookie = following
            yield name, page[inode : inode + INODE.size], extents
            count += 1
        if count > most:
            raise TreeFault(tree.name, f"inode {ino}: the directory has too many entries", errno.EFBIG)


def unpacked(entry: tuple[bytes, bytes]) -> tuple[bytes, Inode]:
    """Return name and inode of one of `Children.entries`."""
    return entry[0], Inode._make(INODE.unpack(entry[1]))


def _lookup(directory: File, name: bytes) -> File:
    try:
        ino = directory.tree.lookup(directory.inode.ino, name)
    except TreeFault as fault:
        if fault.errno == errno.ENOENT:
            fault.hint = _near(directory, name)
        raise
    return _file(directory.tree, directory.volume, ino)


def _near(directory: File, name: bytes) -> str | None:
    found = directory.children().entries
    return suggestion(name, [other for other, _ in found])


def suggestion(name: bytes, others: list[bytes]) -> str | None:
    """Return a hint on those of `others` that are like `name`, None if none is."""
    names = [os.fsdecode(other) for other in others[:COMPARED_NAMES]]
    near = difflib.get_close_matches(os.fsdecode(name), names, 3)
    return f"did you mean {' or '.join(printable(one) for one in near)}?" if near else None


def _file(tree: Tree, volume: Mapped, ino: int) -> File:
    found = File(tree, volume, Inode._make(INODE.unpack(tree.stat(ino))))
    if found.inode.error:
        raise found.fault(found.inode.error)
    return found

"""What is under NAME/ in a mount, without a mount: the volumes of a point as raw files and as trees.

Used by the commands. One thread. Trees are opened when somebody asks for them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping, Sequence

from qcowfs._mapped import Mapped
from qcowfs.errors import TreeFault, printable
from qcowfs.inside import walk
from qcowfs.inside.contents import Contents, Item
from qcowfs.inside.record import Inode
from qcowfs.inside.trees import Trees, unreadable
from qcowfs.inside.walk import Children, Place, Trouble

__all__ = ["SUFFIX", "RawVolume", "Volumes", "point_root"]

SUFFIX = b".raw"
NANOSECONDS = 1_000_000_000
BLOCK = 512


def point_root(name: str, date_ns: int, found: tuple[Contents, Sequence[Mapped | None]], trees: Trees) -> Place:
    """Return what NAME/ of a point is: the root of its tree where it is one file system, else its volumes.

    Args:
        name: of the point, for messages.
        date_ns: of the point, nanoseconds since the epoch.
        found: what opened.open_disks returned.

    Raises:
        TreeFault: nothing is found in it, or the one file system cannot be read.
    """
    contents, disks = found
    pairs = list(zip(contents.items, disks, strict=True))
    named = {item.volume.name: (item, disk) for item, disk in pairs if item.volume.name}
    if named:
        return Volumes(name, named, trees, _inode(stat.S_IFDIR | 0o555, 0, date_ns))
    for item, disk in pairs:
        return _root(name, item, disk, trees)
    raise TreeFault(name, "no partition, no logical volume and no file system is found in it", errno.ENOENT)


class RawVolume(Place):
    """A volume as raw bytes."""

    __slots__ = ("_disk", "inode", "name")

    def __init__(self, name: str, disk: Mapped, inode: Inode) -> None:
        self.name = name
        self._disk = disk
        self.inode = inode

    def disk(self) -> Mapped:
        return self._disk


class Volumes(Place):
    """The directory of a point that has volumes.

    Args:
        name: of the point, for messages.
        volumes: by name, without ".raw"; no bytes where they cannot be read.
        trees: opens them.
        inode: of the directory.
    """

    __slots__ = ("_roots", "_trees", "inode", "name", "volumes")

    def __init__(
        self, name: str, volumes: Mapping[bytes, tuple[Item, Mapped | None]], trees: Trees, inode: Inode
    ) -> None:
        self.name = name
        self.volumes = volumes
        self.inode = inode
        self._trees = trees
        self._roots: dict[bytes, Place] = {}

    def resolve(self, path: bytes, *, follow: bool) -> Place:
        first, slash, rest = self._entered(path).partition(b"/")
        return self._named(first).resolve(slash + rest, follow=follow) if first else self

    def plain(self, path: bytes) -> bytes:
        return walk.plain(self._entered(path))

    def _entered(self, path: bytes) -> bytes:
        """Return a path from here without what leads back here: ".." above, or behind a volume, which is no link."""
        parts = path.split(b"/")
        left = [number for number, part in enumerate(parts) if part not in (b"", b".")]
        while left:
            words = [parts[number] for number in left[:2]]
            if words[0] == b"..":
                del left[:1]
            elif words[1:] == [b".."] and words[0] in self.volumes:
                del left[:2]
            else:
                return b"/".join(parts[left[0] :])
        return b""

    def children(self) -> Children:
        found = Children([])
        for name, (item, disk) in self.volumes.items():
            if disk is not None:
                found.entries.append((name + SUFFIX, self._raw(name, disk).inode.pack()))
            if not unreadable(item):
                self._add_tree(found, name)
        found.entries.sort()
        return found

    def child(self, name: bytes, inode: Inode) -> Place:
        return self._named(name)

    def entries(self) -> Iterator[tuple[bytes, Place]]:
        found = self.children()
        for name, _ in found.entries:
            yield name, self._named(name)
        if found.troubles:
            raise TreeFault(self.name, "; ".join(f"{printable(name)}: {what}" for name, what in found.troubles))

    def again(self, name: bytes, ino: int) -> Place:
        return self._named(name)

    def _add_tree(self, found: Children, name: bytes) -> None:
        try:
            found.entries.append((name, self._tree(name).inode.pack()))
        except TreeFault as fault:
            found.troubles.append(Trouble(name, fault.what))

    def _named(self, name: bytes) -> Place:
        if name in self.volumes:
            return self._tree(name)
        item, disk = self.volumes.get(name.removesuffix(SUFFIX), (None, None))
        if not name.endswith(SUFFIX) or item is None:
            known = [one + end for one in self.volumes for end in (b"", SUFFIX)]
            hint = walk.suggestion(name, known) or "qcowfs ls shows what is there, qcowfs list -v why something is not"
            raise TreeFault(self.name, os.strerror(errno.ENOENT), errno.ENOENT, hint=hint)
        if disk is None:
            raise _refused(self.name, item, item.volume.trouble)
        return self._raw(name.removesuffix(SUFFIX), disk)

    def _raw(self, name: bytes, disk: Mapped) -> RawVolume:
        inode = _inode(stat.S_IFREG | 0o444, disk.virtual_size, self.inode.mtime * NANOSECONDS + self.inode.mtime_ns)
        return RawVolume(f"{self.name}/{os.fsdecode(name)}", disk, inode)

    def _tree(self, name: bytes) -> Place:
        if name not in self._roots:
            self._roots[name] = _root(f"{self.name}/{os.fsdecode(name)}", *self.volumes[name], self._trees)
        return self._roots[name]


def _root(name: str, item: Item, disk: Mapped | None, trees: Trees) -> Place:
    why = unreadable(item)
    if why or disk is None:
        raise _refused(name, item, why)
    return walk.root_of(trees.tree(name, item, disk), disk)


def _refused(name: str, item: Item, why: str) -> TreeFault:
    elsewhere = item.volume.kind == "lv" and item.volume.trouble
    hint = "--with adds the image of another disk, if a part of the volume is there" if elsewhere else None
    return TreeFault(name, printable(why), errno.ENOTSUP, hint=hint)


def _inode(mode: int, size: int, date_ns: int) -> Inode:
    """Return attributes of what no tree has: as they are in a mount, but for the number."""
    seconds, nano = divmod(date_ns, NANOSECONDS)
    times = (seconds, seconds, seconds, nano, nano, nano)
    return Inode(0, size, -(-size // BLOCK), *times, mode, 1, os.getuid(), os.getgid(), 0, 0, 0)

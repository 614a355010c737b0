"""The tree of one mount: which names there are, what each of them is, and the node of each inode number.

Used by fuse.py; made in the foreground by mount.py, so that whatever is wrong reaches the person. Pure but for what
the nodes do. The mount's thread only.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from qcowfs import limits
from qcowfs._cache import Cache
from qcowfs._mapped import Mapped
from qcowfs._source import FileSource
from qcowfs.errors import TreeFault
from qcowfs.sizes import Sizes
from qcowfs.snapshot import LiveDisk, by_age, newness, open_disk
from qcowfs.vfs import names, xattrs
from qcowfs.vfs.beside import Beside
from qcowfs.vfs.faults import FaultLog
from qcowfs.vfs.folder import Folder
from qcowfs.vfs.guest import Guest, GuestRoot, Presentation
from qcowfs.vfs.guests import Guests
from qcowfs.vfs.inodes import INODE_BITS, ROOT, Inodes
from qcowfs.vfs.node import Directory, Disk, DiskFile, LiveFile, Node, Place, Symlink

if TYPE_CHECKING:
    from qcowfs.chain import Chain
    from qcowfs.inside.contents import Contents, Item
    from qcowfs.snapshot import Point

__all__ = ["ChainDisks", "Disks", "Tree", "latest"]

DEFAULT_PRESENTATION = Presentation()
CHANGED_CACHE = 4 << 20  # bytes of tables that a count of changes keeps, apart from those that are read
CHANGED_SECONDS = 2.0  # that it takes at most
LOOK_SECONDS = 10.0  # that a listing spends on finding out which points have a directory

logger = logging.getLogger("qcowfs.mount")


class Disks(Protocol):
    """What a tree asks of the rooms below: the disks of points. The tests have their own."""

    def frozen(self, point: Point, identity: int) -> Disk: ...
    def live(self, point: Point) -> Disk: ...
    def allocated(self, point: Point) -> int: ...
    def changed(self, point: Point, before: Point) -> int | None: ...
    def file_status(self, point: Point) -> os.stat_result: ...
    def inside(self, point: Point, name: str) -> tuple[Contents, Sequence[Mapped | None]]: ...


class ChainDisks:
    """The disks of a chain, with one cache for all of them, so that memory stays bounded however many are open.

    Args:
        cache_size: bytes of that cache.
        others: chains of further disks that belong to the same volume groups.
    """

    def __init__(self, chain: Chain, cache_size: int = limits.DEFAULT_CACHE_SIZE, others: Sequence[Chain] = ()) -> None:
        self._chain = chain
        self._cache = Cache(cache_size)
        self._beside = Beside(others, self._cache)
        self._sizes = Sizes(chain)

    def frozen(self, point: Point, identity: int) -> Disk:
        """Return the disk of a point that cannot change; `identity` is a number of its own."""
        return open_disk(self._chain, point, self._cache, identity)

    def live(self, point: Point) -> Disk:
        """Return the disk of a point that another process may be writing."""
        return LiveDisk(self._chain, point)

    def allocated(self, point: Point) -> int:
        """Return the bytes that `point` allocates; walks its tables."""
        return self._sizes.allocated(point)

    def changed(self, point: Point, before: Point) -> int | None:
        """Return the bytes of `point` that may have changed since `before`, None if to find out takes too long."""
        from qcowfs.blockdiff import may_differ

        cache = Cache(CHANGED_CACHE)
        deadline = time.monotonic() + CHANGED_SECONDS
        total = 0
        for _, length in may_differ(*(open_disk(self._chain, one, cache) for one in (before, point))):
            total += length
            if time.monotonic() > deadline:
                return None
        return total

    def inside(self, point: Point, name: str) -> tuple[Contents, Sequence[Mapped | None]]:
        """Return the volumes of a point that cannot change, and their bytes; `name` is the point's."""
        from qcowfs.inside.opened import open_disks  # 10 ms, and no mount has to wait for it

        return open_disks([open_disk(self._chain, point, self._cache), *self._beside.disks(name)])

    def file_status(self, point: Point) -> os.stat_result:
        """Return the status of the file of `point`'s layer now, by its descriptor: the path may lie under the mount."""
        source = point.layer.source
        return os.fstat(source.fileno()) if isinstance(source, FileSource) else os.stat(point.layer.path)


class Tree:
    """The nodes of one mount.

    Args:
        points: of one chain.
        disks: opens them.
        image: the image's path, for the root's attributes.
        owner: (uid, gid) of every node.
        live: show the points that another process may be writing, too.
        presentation: how the files inside the points are shown.

    Attributes:
        root: the directory that is mounted.
        guests: the trees inside the points; there are none before it is started.
        shown: the points that have a file, in the order of `points`.
        left_out: the names of the points that are not frozen and not shown.
    """

    def __init__(
        self,
        points: Sequence[Point],
        disks: Disks,
        *,
        image: str,
        owner: tuple[int, int],
        live: bool = False,
        presentation: Presentation = DEFAULT_PRESENTATION,
    ) -> None:
        self._disks = disks
        self._image = image
        self._owner = owner
        self._inodes = Inodes()
        self._faults = FaultLog()
        self.guests = Guests(presentation, self._faults)
        self._nodes: dict[int, Node] = {}
        self._guests: dict[int, Guest] = {}  # by what all of its inode numbers begin with
        self._folders: dict[bytes, Folder] = {}  # in the root, by name
        # Names are given to all points, so that a point has the same name whether the others are shown or not.
        named = list(zip(names.assign(points), points, strict=True))
        shown = [(name, point) for name, point in named if point.frozen or live]
        self.shown: tuple[Point, ...] = tuple(point for _, point in shown)
        self.left_out = tuple(name for name, point in named if not (point.frozen or live))
        aged = by_age(point for _, point in shown if point.frozen)
        self._before = {id(point): before for before, point in itertools.pairwise(aged)}
        self.root = self._make_root()
        self._add_files(shown)

    def node(self, ino: int) -> Node:
        """Return the node that has this inode number.

        Raises:
            KeyError: no node has it.
        """
        return self._nodes[ino]

    def guest(self, ino: int) -> Guest | None:
        """Return the tree that has this inode number; None if it is the mount's own."""
        return self._guests.get(ino >> INODE_BITS)

    def lookup(self, directory: Directory, name: bytes) -> Node | None:
        """Return the node called `name` in `directory`, None if there is none. "." and ".." are names.

        A directory of a point is found after its folder was resolved.
        """
        if name == b".":
            return directory
        if name == b"..":
            return directory.parent
        folder = self.folder(directory, name)
        return directory.entries.get(name) if folder is None else folder.directory

    def folder(self, directory: Directory, name: bytes) -> Folder | None:
        """Return the folder called `name` in `directory`, None if nothing inside a point has that name."""
        return self._folders.get(name) if directory is self.root else None

    def resolved(self, directory: Directory) -> bool:
        """Tell whether all that is in `directory` is known."""
        if directory is self.root and not all(folder.resolved for folder in self._folders.values()):
            return False
        return all(guest.resolved for guest in self._to_open(directory))

    def resolve(self, directory: Directory) -> None:
        """Find out what is in `directory`; reads disks: call it off the mount's thread.

        A thousand honest points take less than a second; hostile ones may take two each, and are not waited for.
        """
        deadline = time.monotonic() + LOOK_SECONDS
        folders = self._folders.values() if directory is self.root else ()
        if not (_resolved_by(deadline, folders) and _resolved_by(deadline, self._to_open(directory))):
            logger.warning("looking into the points takes too long: some directories are not listed, but are there")

    def _to_open(self, directory: Directory) -> Sequence[Guest]:
        """Return the trees in `directory` that a listing opens, so that it shows none that turns out to be none.

        Where there are more than can be open at once, they are listed as they are found, and opened when entered.
        """
        found = [node.guest for node in self.entries(directory).values() if isinstance(node, GuestRoot)]
        return found if len(found) <= limits.INSIDE_WORKERS else ()

    def entries(self, directory: Directory) -> Mapping[bytes, Node]:
        """Return what is in `directory`, as far as it is known; no tree that cannot be shown."""
        found: dict[bytes, Node | None] = {**directory.entries}
        if directory is self.root:
            found |= {name: folder.directory for name, folder in self._folders.items()}
        return {name: node for name, node in found.items() if node is not None and not _is_refused(node)}

    def xattrs(self, node: Node) -> Mapping[bytes, bytes]:
        """Return the extended attributes of `node`; the root's tell of the process that asks."""
        return xattrs.of_root(self._image) if node is self.root else node.place.xattrs

    def _make_root(self) -> Directory:
        date_ns = max((point.date_ns for point in self.shown), default=0)
        root = Directory(Place(ino=ROOT, name=b"/", owner=self._owner, date_ns=date_ns))
        self._nodes[ROOT] = root
        return root

    def _add_files(self, shown: Sequence[tuple[str, Point]]) -> None:
        newest = latest(self.shown)
        for name, point in shown:
            file_name = (name + names.SUFFIX).encode()
            self._add(self._file(file_name, point))
            if point.frozen:
                self._add_folder(name, point)
            if point is newest:
                link = self._place((names.LATEST + names.SUFFIX).encode(), point.date_ns)
                self._add(Symlink(link, file_name))

    def _add_folder(self, name: str, point: Point) -> None:
        place = self._place(name.encode(), point.date_ns)
        look = partial(self._disks.inside, point, name)
        self._folders[place.name] = Folder(
            place, self.root, look, self._place_inside, self._number, self._guest_of, self._faults
        )

    def _guest_of(self, path: bytes, item: Item, volume: Mapped) -> Guest | None:
        return self.guests.guest(self._inodes.tree(b"/" + path), path, item, volume)

    def _file(self, name: bytes, point: Point) -> Node:
        disks = self._disks
        place = self._place(name, point.date_ns, xattrs.of_point(point))
        if not point.frozen:
            look = partial(disks.file_status, point)
            make_disk = partial(disks.live, point)
            return LiveFile(place, make_disk, self._faults, virtual_size=point.virtual_size, look=look)
        before = self._before.get(id(point))
        return DiskFile(
            place,
            partial(disks.frozen, point, len(self._nodes)),
            self._faults,
            virtual_size=point.virtual_size,
            count_allocated=partial(disks.allocated, point),
            count_changed=None if before is None else partial(disks.changed, point, before),
        )

    def _place(self, name: bytes, date_ns: int, attributes: dict[bytes, bytes] | None = None) -> Place:
        ino = self._inodes.number(b"/" + name)
        return Place(ino=ino, name=name, owner=self._owner, date_ns=date_ns, xattrs=attributes or {})

    def _place_inside(self, folder: Place, name: bytes) -> Place:
        path = folder.name + b"/" + name
        return replace(folder, ino=self._inodes.number(b"/" + path), name=name, path=path)

    def _add(self, node: Node) -> None:
        self.root.entries[node.place.name] = node
        self._number(node)

    def _number(self, node: Node) -> None:
        if isinstance(node, GuestRoot):
            self._guests[node.guest.base >> INODE_BITS] = node.guest
        else:
            self._nodes[node.place.ino] = node


def _resolved_by(deadline: float, unknown: Iterable[Folder | Guest]) -> bool:
    """Resolve all of them; return whether there was time for it."""
    for which in unknown:
        if not which.resolved and time.monotonic() > deadline:
            return False
        with suppress(TreeFault):  # it is listed; whoever enters it hears why not
            which.resolve()
    return True


def _is_refused(node: Node) -> bool:
    return isinstance(node, GuestRoot) and node.guest.resolved and node.guest.attributes_of_root is None


def latest(points: Iterable[Point]) -> Point | None:
    """Return the newest frozen point; never the active state. None if there is none."""
    return max((point for point in points if point.frozen and point.kind != "active"), key=newness, default=None)

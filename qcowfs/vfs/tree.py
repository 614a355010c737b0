"""The tree of one mount: which names there are, what each of them is, and the node of each inode number.

Used by fuse.py; made in the foreground by mount.py, so that whatever is wrong reaches the person; follow.py lets it
show other points. Pure but for what the nodes do. The mount's thread only, but for `resolve`.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
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
from qcowfs.vfs.node import Directory, Disk, DiskFile, LiveFile, Node, Place, RawFile, Symlink

if TYPE_CHECKING:
    from qcowfs.chain import Chain
    from qcowfs.inside.contents import Contents, Item
    from qcowfs.snapshot import Point

__all__ = ["ChainDisks", "Disks", "Tree", "latest"]

DEFAULT_PRESENTATION = Presentation()
CHANGED_CACHE = 4 << 20  # bytes of tables that a count of changes keeps, apart from those that are read
CHANGED_SECONDS = 2.0  # that it takes at most
LATEST = (names.LATEST + names.SUFFIX).encode()
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

    def renewed(self, chain: Chain, others: Sequence[Chain]) -> ChainDisks:
        """Return the disks of this chain opened again, with the same cache; both go with `others` from now on."""
        disks = copy.copy(self)
        disks._chain = chain
        disks._sizes = Sizes(chain)
        self._beside.show(others)
        return disks

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
        points: all points.
        shown: those that have a file, in the order of `points`.
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
        self._live = live
        self._nodes: dict[int, Node] = {}
        self._gone: list[RawFile] = []  # not in the root any more, and open when they went
        self._guests: dict[int, Guest] = {}  # by what all of its inode numbers begin with
        self._folders: dict[bytes, Folder] = {}  # in the root, by name
        self._points: dict[bytes, Point] = {}  # that the files in the root are of, by name
        self._turns: Counter[bytes] = Counter()  # of names in the root: how often each was given away
        self._identities = itertools.count(1)  # of disks in their cache
        self.points: tuple[Point, ...] = ()
        self.shown: tuple[Point, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self._before: dict[int, Point] = {}  # the point before, by the point's id()
        self.root = Directory(Place(ino=ROOT, name=b"/", owner=owner, date_ns=0))
        self._nodes[ROOT] = self.root
        self.follow(points, disks)

    def hear_of_stale(self, heard: Callable[[], None]) -> None:
        """Let `heard` be called, by any thread, whenever something was found to be gone by who read it."""
        self._faults.stale = heard

    def follow(self, points: Sequence[Point], disks: Disks) -> Sequence[bytes]:
        """Show `points` instead of those before; a point that is the same object keeps its nodes.

        Files that are open stay so: what is gone answers ESTALE when it is read.

        Returns:
            The names in the root that mean something else than before, if anything at all.
        """
        self._disks = disks
        self.points = tuple(points)
        # Names are given to all points, so that a point has the same name whether the others are shown or not.
        named = list(zip(names.assign(points), points, strict=True))
        shown = [(name, point) for name, point in named if point.frozen or self._live]
        self.shown = tuple(point for _, point in shown)
        self.left_out = tuple(name for name, point in named if not (point.frozen or self._live))
        aged = by_age(point for _, point in shown if point.frozen)
        self._before = {id(point): before for before, point in itertools.pairwise(aged)}
        wanted = {_file_name(name): point for name, point in shown}
        stay = {name for name, point in self._points.items() if wanted.get(name) is point}
        changed = self._drop(stay)
        changed += [
            word for name, point in shown if _file_name(name) not in stay for word in self._add_point(name, point)
        ]
        changed += self._link_latest(shown)
        self._points = wanted
        for name in stay:
            self._set_predecessor(self.root.entries[name], wanted[name])
        date_ns = max((point.date_ns for point in self.shown), default=0)
        self.root.place = replace(self.root.place, date_ns=date_ns)
        return changed

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
        if directory is self.root and not all(folder.resolved for folder in tuple(self._folders.values())):
            return False
        return all(guest.resolved for guest in self._to_open(directory))

    def resolve(self, directory: Directory) -> None:
        """Find out what is in `directory`; reads disks: call it off the mount's thread.

        A thousand honest points take less than a second; hostile ones may take two each, and are not waited for.
        """
        deadline = time.monotonic() + LOOK_SECONDS
        folders = tuple(self._folders.values()) if directory is self.root else ()
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
            found |= {name: folder.directory for name, folder in tuple(self._folders.items())}
        return {name: node for name, node in found.items() if node is not None and not _is_refused(node)}

    def xattrs(self, node: Node) -> Mapping[bytes, bytes]:
        """Return the extended attributes of `node`; the root's tell of the process that asks."""
        return xattrs.of_root(self._image) if node is self.root else node.place.xattrs

    def _drop(self, stay: Container[bytes]) -> list[bytes]:
        """Forget the points whose files do not stay; return the names that they had."""
        self._gone = [node for node in self._gone if self._still_open(node)]
        gone = [name for name in self._points if name not in stay]
        for name in gone:
            self._forget(self.root.entries.pop(name))
        folders = dict.fromkeys(name.removesuffix(names.SUFFIX.encode()) for name in gone)
        # A listing in another thread may be going through it.
        dropped, self._folders = self._folders, {k: v for k, v in self._folders.items() if k not in folders}
        for name in folders:
            directory = dropped[name].directory if name in dropped else None
            for node in [directory, *(directory.entries.values() if isinstance(directory, Directory) else ())]:
                if node is not None:
                    self._forget(node)
        self._turns.update([*gone, *folders])
        return [*gone, *folders]

    def _forget(self, node: Node) -> None:
        if isinstance(node, GuestRoot):
            self._guests.pop(node.guest.base >> INODE_BITS, None)
        elif isinstance(node, RawFile) and node.opened:
            self._gone.append(node)  # fstat(2) asks for it
        else:
            self._nodes.pop(node.place.ino, None)

    def _still_open(self, node: RawFile) -> bool:
        if not node.opened:
            self._nodes.pop(node.place.ino, None)
        return node.opened > 0

    def _add_point(self, name: str, point: Point) -> list[bytes]:
        """Add the files of a point; return their names."""
        node = self._file(_file_name(name), point)
        self._set_predecessor(node, point)
        self._add(node)
        if point.frozen:
            self._add_folder(name, point)
        return [node.place.name, name.encode()]

    def _set_predecessor(self, node: Node, point: Point) -> None:
        before = self._before.get(id(point))
        if isinstance(node, DiskFile):
            node.compare_with(before, None if before is None else partial(self._disks.changed, point, before))

    def _link_latest(self, shown: Sequence[tuple[str, Point]]) -> list[bytes]:
        """Let latest.raw lead to the newest point; return its name, if it led elsewhere."""
        newest = latest(self.shown)
        target = next(((_file_name(name), point.date_ns) for name, point in shown if point is newest), None)
        before = self.root.entries.get(LATEST)
        if target == ((before.target, before.place.date_ns) if isinstance(before, Symlink) else None):
            return []
        if before is not None:
            self._forget(self.root.entries.pop(LATEST))
            self._turns[LATEST] += 1
        if target is not None:
            self._add(Symlink(self._place(LATEST, target[1]), target[0]))
        return [LATEST]

    def _add_folder(self, name: str, point: Point) -> None:
        place = self._place(name.encode(), point.date_ns)
        look = partial(self._disks.inside, point, name)
        turn = self._turns[place.name]
        place_of, guest_of = partial(self._place_inside, turn), partial(self._guest_of, turn)
        self._folders[place.name] = Folder(place, self.root, look, place_of, self._number, guest_of, self._faults)

    def _guest_of(self, turn: int, path: bytes, item: Item, volume: Mapped) -> Guest | None:
        base = self._inodes.tree(b"/" + path, turn)
        return None if base is None else self.guests.guest(base, path, item, volume)

    def _file(self, name: bytes, point: Point) -> Node:
        disks = self._disks
        place = self._place(name, point.date_ns, xattrs.of_point(point))
        if not point.frozen:
            look = partial(disks.file_status, point)
            make_disk = partial(disks.live, point)
            return LiveFile(place, make_disk, self._faults, virtual_size=point.virtual_size, look=look)
        return DiskFile(
            place,
            partial(disks.frozen, point, next(self._identities)),
            self._faults,
            virtual_size=point.virtual_size,
            count_allocated=partial(disks.allocated, point),
        )

    def _place(self, name: bytes, date_ns: int, attributes: dict[bytes, bytes] | None = None) -> Place:
        ino = self._inodes.number(b"/" + name, self._turns[name])
        return Place(ino=ino, name=name, owner=self._owner, date_ns=date_ns, xattrs=attributes or {})

    def _place_inside(self, turn: int, folder: Place, name: bytes) -> Place:
        path = folder.name + b"/" + name
        return replace(folder, ino=self._inodes.number(b"/" + path, turn), name=name, path=path)

    def _add(self, node: Node) -> None:
        self.root.entries[node.place.name] = node
        self._number(node)

    def _number(self, node: Node) -> None:
        if isinstance(node, GuestRoot):
            self._guests[node.guest.base >> INODE_BITS] = node.guest
        else:
            self._nodes[node.place.ino] = node


def _file_name(name: str) -> bytes:
    return (name + names.SUFFIX).encode()


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

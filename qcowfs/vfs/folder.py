"""NAME/: what is inside a point, found out when somebody asks for it: volumes and their trees, or one tree.

Used by vfs/tree.py, which makes one for each frozen point, and by fuse.py, which resolves them off the mount's thread.
A point in which nothing is known has no directory.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from qcowfs._mapped import Mapped
from qcowfs.errors import QcowfsError
from qcowfs.vfs.faults import FaultLog
from qcowfs.vfs.guest import Guest, GuestRoot
from qcowfs.vfs.names import SUFFIX
from qcowfs.vfs.node import Directory, DiskFile, Node, Place

if TYPE_CHECKING:
    from qcowfs.inside.contents import Contents, Item

__all__ = ["Folder"]

AGAIN_SECONDS = 10.0  # between two looks at a disk that cannot be read
COUNT_SECONDS = 1.0  # of walking a volume for st_blocks

logger = logging.getLogger("qcowfs.mount")


class Folder:
    """The directory of a point before anybody knows whether there is one.

    Args:
        place: of the directory.
        parent: where it is.
        look: returns what is inside the point, and the volumes' bytes, None where they cannot be read; may raise
            QcowfsError.
        place_of: returns the place of a file in the directory, by its name.
        add: enters a node into the mount's inode numbers.
        guest_of: returns the tree of a volume, by its path in the mount; None if there is none that can be shown.

    Attributes:
        known: it is known whether there is a directory.
    """

    def __init__(
        self,
        place: Place,
        parent: Directory,
        look: Callable[[], tuple[Contents, Sequence[Mapped | None]]],
        place_of: Callable[[Place, bytes], Place],
        add: Callable[[Node], None],
        guest_of: Callable[[bytes, Item, Mapped], Guest | None],
        faults: FaultLog,
    ) -> None:
        self.place = place
        self._parent = parent
        self._look = look
        self._place_of = place_of
        self._add = add
        self._guest_of = guest_of
        self._faults = faults
        self._lock = threading.Lock()
        self.known = False
        self._told: set[str] = set()  # notes that are in the log; a disk has a few
        self._again = 0.0  # when to look once more, after the disk could not be read
        self._directory: Directory | GuestRoot | None = None

    @property
    def directory(self) -> Directory | GuestRoot | None:
        """The directory; None if there is none, or nobody has resolved this yet."""
        return self._directory

    @property
    def resolved(self) -> bool:
        """True while there is no need to look: it is known, or could not be found out just now."""
        return self.known or time.monotonic() < self._again

    def resolve(self) -> Directory | GuestRoot | None:
        """Return the directory, None if there is none. The first call reads the disk, a few hundred KiB at most.

        A directory that is a tree may still turn out to be none when the tree is opened.
        """
        with self._lock:
            if not self.resolved:
                self._again = time.monotonic() + AGAIN_SECONDS
                try:
                    contents, disks = self._look()
                    self._directory = self._made(contents, disks)
                    # Nothing was found, and something could not be read: a source that is away comes back.
                    self.known = bool(contents.items) or not contents.notes
                except QcowfsError as fault:
                    self._faults.report(os.fsdecode(self.place.name), fault)
            return self._directory

    def _made(self, contents: Contents, disks: Sequence[Mapped | None]) -> Directory | GuestRoot | None:
        for note in contents.notes:
            if note not in self._told:
                self._told.add(note)
                logger.warning("%s: %s", os.fsdecode(self.place.name), note)
        directory = Directory(self.place, self._parent)
        pairs = list(zip(contents.items, disks, strict=True))
        volumes = [pair for pair in pairs if pair[0].volume.name]
        if pairs and not volumes:  # the whole disk is one file system, and NAME.raw already
            item, disk = pairs[0]
            return None if disk is None else self._root_of(self.place, self._parent, item, disk)
        for item, disk in volumes:
            self._add_volume(directory, item, disk)
        if not directory.entries:
            return None
        self._add(directory)
        return directory

    def _add_volume(self, directory: Directory, item: Item, disk: Mapped | None) -> None:
        name = item.volume.name
        if disk is None:
            logger.warning("%s/%s: %s", os.fsdecode(self.place.name), os.fsdecode(name), item.volume.trouble)
            return
        self._add_file(directory, name + SUFFIX.encode(), disk)
        root = self._root_of(self._place_of(self.place, name), directory, item, disk)
        if root is not None:
            directory.entries[name] = root

    def _root_of(self, place: Place, parent: Directory, item: Item, disk: Mapped) -> GuestRoot | None:
        guest = self._guest_of(place.path or place.name, item, disk)
        if guest is None:
            return None
        root = GuestRoot(replace(place, ino=guest.base), parent, guest)
        self._add(root)
        return root

    def _add_file(self, directory: Directory, name: bytes, disk: Mapped) -> None:
        node = DiskFile(
            self._place_of(self.place, name),
            lambda: disk,
            self._faults,
            virtual_size=disk.virtual_size,
            count_allocated=partial(_stored, disk),
        )
        directory.entries[name] = node
        self._add(node)


def _stored(disk: Mapped) -> int:
    """Return the bytes of `disk` that lie between its holes; what was not walked in time counts too."""
    deadline = time.monotonic() + COUNT_SECONDS
    stored = 0
    place = disk.seek(0, os.SEEK_DATA)
    while place is not None:
        hole = disk.seek(place, os.SEEK_HOLE) if time.monotonic() < deadline else disk.virtual_size
        assert hole is not None  # one is at the end
        stored += hole - place
        place = disk.seek(hole, os.SEEK_DATA)
    return stored

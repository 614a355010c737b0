"""The trees of one mount: what they share, and how one is made.

Used by vfs/folder.py, which asks for the tree of a volume, and by cli/mount.py, which gives them their workers.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import TYPE_CHECKING

from qcowfs._nodes import Nodes
from qcowfs.errors import printable
from qcowfs.vfs import xattrs
from qcowfs.vfs.faults import FaultLog
from qcowfs.vfs.guest import Guest, Presentation

if TYPE_CHECKING:
    from qcowfs._mapped import Mapped
    from qcowfs.inside.contents import Item
    from qcowfs.inside.trees import Trees

__all__ = ["Guests"]

WITHOUT_FILES = frozenset(("LVM2_member", "swap"))
MAX_TOLD = 1000  # lines in the log
IDLE_SECONDS = 60.0  # after which a tree's worker ends until somebody asks again

logger = logging.getLogger("qcowfs.mount")


class Guests:
    """Makes the trees of one mount. Before `start` there are none.

    Attributes:
        nodes: the inodes of all trees, for the data plane.
    """

    def __init__(self, presentation: Presentation, faults: FaultLog) -> None:
        self.nodes = Nodes()
        self._presentation = presentation
        self._faults = faults
        self._trees: Trees | None = None
        self._told: set[tuple[bytes, str]] = set()  # volumes' names, and why they have no directory

    def start(self, trees: Trees) -> None:
        """From now on there are trees: `trees` has their workers, and belongs to the caller."""
        self._trees = trees

    def retire(self) -> None:
        """End the workers that nobody asked anything for a while."""
        if self._trees is not None:
            self._trees.idle(IDLE_SECONDS)

    def guest(self, base: int, path: bytes, item: Item, volume: Mapped) -> Guest | None:
        """Return the tree of a volume, of which nothing is read yet; None if there is none that can be shown.

        Args:
            base: of its inode numbers.
            path: of its root in the mount.
            item: the volume, and what it holds.
            volume: its bytes.
        """
        if self._trees is None or item.filesystem is None:
            return None
        from qcowfs.inside.trees import unreadable

        found, name = item.filesystem, os.fsdecode(path)
        if trouble := unreadable(item):
            self._tell(name, item, trouble)
            return None
        make_tree = partial(self._trees.tree, name, item, volume)
        not_done = "" if self._presentation.recover or found.clean is not False else "not done, though it is needed"
        return Guest(
            base,
            lambda recovery: xattrs.of_tree(found, recovery or not_done),
            make_tree,
            volume,
            self.nodes,
            self._presentation,
            self._faults,
        )

    def _tell(self, name: str, item: Item, trouble: str) -> None:
        """Log why there is no directory: once of a volume that all points have, never where nobody expects one."""
        assert item.filesystem is not None
        known = (item.volume.name, trouble)
        if item.filesystem.kind not in WITHOUT_FILES and known not in self._told and len(self._told) < MAX_TOLD:
            self._told.add(known)
            logger.warning("%s: no directory, here and wherever else it is the same: %s", printable(name), trouble)

"""Disks of other images, on which parts of a disk's volume groups are: what --with names.

Used by vfs/tree.py and the commands. Any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qcowfs.errors import UnsupportedImage, printable
from qcowfs.snapshot import open_disk, points
from qcowfs.vfs import names

if TYPE_CHECKING:
    from qcowfs._cache import Cache
    from qcowfs._core import Disk
    from qcowfs.chain import Chain
    from qcowfs.snapshot import Point

__all__ = ["Beside", "frozen_disk"]


class Beside:
    """Other images, whose disks go with those of one image."""

    def __init__(self, chains: Sequence[Chain], cache: Cache) -> None:
        self._cache = cache
        self.show(chains)

    def show(self, chains: Sequence[Chain]) -> None:
        """Take `chains` from now on."""
        self._chains = [
            (chain, list(zip(names.assign(found := points(chain)), found, strict=True))) for chain in chains
        ]

    def disks(self, name: str) -> Sequence[Disk]:
        """Return the disk of each image at the point of this name, in its active state if it has none.

        Raises:
            QcowfsError: one cannot be read, or may change.
        """
        return [self._disk(chain, named, name) for chain, named in self._chains]

    def _disk(self, chain: Chain, named: Sequence[tuple[str, Point]], name: str) -> Disk:
        found, point = next((pair for pair in named if pair[0] == name), named[0])
        return frozen_disk(chain, found, point, self._cache)


def frozen_disk(chain: Chain, name: str, point: Point, cache: Cache) -> Disk:
    """Return the disk of a point that cannot change.

    Raises:
        QcowfsError: it may change, or cannot be read.
    """
    if not point.frozen:
        what, why = f"cannot look into {printable(name)}", "another process has it open for writing"
        raise UnsupportedImage(chain.image, what, why, hint="internal snapshots can be looked into meanwhile")
    return open_disk(chain, point, cache)

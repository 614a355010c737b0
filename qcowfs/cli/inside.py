"""What is inside the points of an image, for the verbs that look there: opening it, and finding POINT:PATH.

Used by the other files of this room.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from qcowfs import limits
from qcowfs._cache import Cache
from qcowfs._mapped import Mapped
from qcowfs.chain import Chain
from qcowfs.cli.options import open_chain
from qcowfs.cli.points import find_place, named_points
from qcowfs.errors import PointNotFound, QcowfsError, TreeFault, printable
from qcowfs.inside.contents import Contents
from qcowfs.inside.opened import open_disks
from qcowfs.inside.pointfiles import point_root
from qcowfs.inside.trees import Trees
from qcowfs.inside.walk import Place
from qcowfs.snapshot import Point
from qcowfs.vfs.beside import Beside, frozen_disk

__all__ = ["PLACE_HELP", "Inside", "Spot", "open_inside", "told"]

PLACE_HELP = "a point of qcowfs list, and a path in its directory of a mount: p1/etc/fstab, VG-LV/var, p1.raw"
SEARCHED_POINTS = 64  # that are looked through for a path that another has not
SEARCH_SECONDS = 4.0  # that somebody waits for a hint
logger = logging.getLogger("qcowfs")


@contextmanager
def open_inside(args: argparse.Namespace) -> Iterator[Inside]:
    """Open the image of `args` and the others that --with names.

    Raises:
        QcowfsError: one of them cannot be opened.
    """
    with Trees(recover=not args.norecovery) as trees, ExitStack() as stack:
        chain = stack.enter_context(open_chain(args))
        others = [stack.enter_context(open_chain(args, other)) for other in args.others]
        yield Inside(chain, others, trees)


@dataclass(frozen=True, slots=True)
class Spot:
    """A place that was found.

    Attributes:
        image: the path of the image.
        point: the name of its point.
        path: in the point's directory, without needless slashes.
    """

    image: str
    point: str
    path: bytes
    place: Place

    def where(self, path: bytes) -> str:
        """Return how a place of the same point is called on the command line."""
        return f"{self.point}:{os.fsdecode(path)}" if path else self.point


class Inside:
    """An image whose points are looked into.

    Attributes:
        chain: of the image.
        trees: opens the trees in it.
    """

    def __init__(self, chain: Chain, others: Sequence[Chain], trees: Trees) -> None:
        self.chain = chain
        self.trees = trees
        self._cache = Cache(limits.DEFAULT_CACHE_SIZE)
        self._beside = Beside(others, self._cache)

    def find(self, text: str, *, follow: bool) -> Spot:
        """Return what POINT or POINT:PATH means.

        Args:
            follow: a symbolic link that it ends with, too.

        Raises:
            QcowfsError: there is no such thing, or it cannot be read.
        """
        name, point, path = find_place(self.chain, text)
        raw = os.fsencode(path)
        spot_path = b"/".join(part for part in raw.split(b"/") if part not in (b"", b"."))
        try:
            place = self._resolved(name, point, self.look(name, point), raw, follow=follow)
            return Spot(self.chain.image, name, spot_path, place)
        except TreeFault as fault:
            raise told(fault, self.chain.image, f"{name}:{path}" if path else name) from fault

    def elsewhere(self, text: str) -> list[str]:
        """Return the points that have the PATH of POINT:PATH, as far as they are found in a short time."""
        name, _, path = find_place(self.chain, text)
        deadline = time.monotonic() + SEARCH_SECONDS
        found = []
        for other, point in named_points(self.chain)[:SEARCHED_POINTS]:
            if other == name or time.monotonic() > deadline:
                continue
            with suppress(QcowfsError):  # it has nothing to look into, or is being written
                self._resolved(other, point, self._opened(other, point), os.fsencode(path), follow=False)
                found.append(other)
        return found

    def _resolved(
        self, name: str, point: Point, opened: tuple[Contents, Sequence[Mapped | None]], path: bytes, *, follow: bool
    ) -> Place:
        return point_root(name, point.date_ns, opened, self.trees).resolve(path, follow=follow)

    def look(self, name: str, point: Point) -> tuple[Contents, Sequence[Mapped | None]]:
        """Return the volumes of a point and their bytes; what is wrong with its tables goes to the log.

        Raises:
            QcowfsError: its disk cannot be read, or may change.
        """
        contents, volumes = self._opened(name, point)
        for note in contents.notes:
            logger.warning("%s: %s", printable(name), note)
        return contents, volumes

    def _opened(self, name: str, point: Point) -> tuple[Contents, Sequence[Mapped | None]]:
        return open_disks([frozen_disk(self.chain, name, point, self._cache), *self._beside.disks(name)])


def told(fault: TreeFault, image: str, where: str) -> QcowfsError:
    """Return `fault` with the place as the person knows it, and the exit code that it has."""
    if fault.errno in (errno.ENOENT, errno.ENOTDIR):
        return PointNotFound(image, printable(where), fault.what, hint=fault.hint)
    return TreeFault(where, fault.what, fault.errno, hint=fault.hint)

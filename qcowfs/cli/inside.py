"""What is inside the points of an image, for the verbs that look there: opening it, and finding POINT:PATH.

Used by the other files of this room.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

from qcowfs import limits
from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs._mapped import Mapped
from qcowfs._source import FileSource
from qcowfs.chain import Chain
from qcowfs.cli.options import open_chain
from qcowfs.cli.points import find_place, named_points
from qcowfs.errors import PointNotFound, QcowfsError, TreeFault, printable
from qcowfs.inside.contents import Contents
from qcowfs.inside.opened import open_disks
from qcowfs.inside.pointfiles import point_root
from qcowfs.inside.trees import Trees
from qcowfs.inside.walk import Place, plain
from qcowfs.snapshot import Point, require_unchanged
from qcowfs.vfs.beside import Beside, frozen_disk

__all__ = ["PLACE_HELP", "Inside", "Spot", "open_images", "open_inside", "plain", "told"]

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
    with open_images(args, [None]) as (inside,):
        yield inside


@contextmanager
def open_images(
    args: argparse.Namespace, images: Sequence[str | None], formats: Sequence[str | None] = (None, None)
) -> Iterator[list[Inside]]:
    """Open images, None for that of `args`, each with the others that --with names; `formats` are those of the images.

    Raises:
        QcowfsError: one of them cannot be opened; or, in the end, a snapshot that was read is not there any more.
    """
    with Trees(recover=not args.norecovery) as trees, ExitStack() as stack:
        pairs = zip(images, formats, strict=False)
        chains = [stack.enter_context(open_chain(args, image, other_format=known)) for image, known in pairs]
        others = [stack.enter_context(open_chain(args, other)) for other in args.others]
        insides = [Inside(chain, others, trees) for chain in chains]
        yield insides
        for inside in insides:
            require_unchanged(inside.read)


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
        chains: whose points the disks are that were looked into.
        read: the points that were looked into.
    """

    def __init__(self, chain: Chain, others: Sequence[Chain], trees: Trees) -> None:
        self.chain = chain
        self.trees = trees
        self.chains: dict[Disk, Chain] = {}
        self.read: list[Point] = []
        self._others = others
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
        return self._at(name, point, path, follow=follow)

    def find_in(self, name: str, path: str, *, follow: bool) -> Spot:
        """Return what a path means in the point that has this name; colons in the two mean nothing.

        Raises:
            QcowfsError: there is no such thing, or it cannot be read.
        """
        return self._at(name, dict(self.named_points())[name], path, follow=follow)

    def _at(self, name: str, point: Point, path: str, *, follow: bool) -> Spot:
        raw = os.fsencode(path)
        try:
            root = self.root(name, point)
            return Spot(self.chain.image, name, root.plain(raw), root.resolve(raw, follow=follow))
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
                opened = self._opened(other, point)
                point_root(other, point.date_ns, opened, self.trees).resolve(os.fsencode(path), follow=False)
                found.append(other)
        return found

    def root(self, name: str, point: Point) -> Place:
        """Return what NAME/ of a point is.

        Raises:
            QcowfsError: its disk cannot be read, or may change; TreeFault: nothing is found in it.
        """
        return point_root(name, point.date_ns, self.look(name, point), self.trees)

    def named_points(self) -> list[tuple[str, Point]]:
        """Return each point of the image with its name."""
        return named_points(self.chain)

    def file_of(self, disk: Disk, depth: int) -> object:
        """Return which file the data of a layer of a disk is in: equal for the same file, whatever image leads to it.

        Args:
            disk: one of `chains`.
        """
        source = self.chains[disk].layers[depth].data
        if not isinstance(source, FileSource):  # a window of a file has places of its own
            return source
        status = os.fstat(source.fileno())
        return (-1, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)

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
        disk = frozen_disk(self.chain, name, point, self._cache)
        self.read.append(point)
        beside = self._beside.disks(name)
        for one, chain in zip((disk, *beside), (self.chain, *self._others), strict=True):
            self.chains[one] = chain
        return open_disks([disk, *beside])


def told(fault: TreeFault, image: str, where: str) -> QcowfsError:
    """Return `fault` with the place as the person knows it, and the exit code that it has."""
    if fault.errno in (errno.ENOENT, errno.ENOTDIR):
        return PointNotFound(image, printable(where), fault.what, hint=fault.hint)
    return TreeFault(where, fault.what, fault.errno, hint=fault.hint)

"""The versions of files over the points of an image: what each point has at a path, the oldest point first.

Used by the commands. One thread. What is stored in the same places in two points is read once.
"""

from __future__ import annotations

import errno
import hashlib
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Protocol

from qcowfs import limits
from qcowfs._core import Disk
from qcowfs.errors import QcowfsError, TreeFault
from qcowfs.inside.record import Inode
from qcowfs.inside.walk import Place, join, unpacked
from qcowfs.snapshot import Point, by_age
from qcowfs.stored import FileOf, fingerprint

__all__ = ["Inside", "Version", "histories", "versions"]

MAGIC = re.compile(rb"[*?[]")
GONE = (errno.ENOENT, errno.ENOTDIR)

Tell = Callable[[str, bytes, QcowfsError], None]  # (point, path, what cannot be looked into there)


class TooManyPaths(QcowfsError):
    """{what}"""


class Inside(Protocol):
    """An image whose points are looked into."""

    def named_points(self) -> Sequence[tuple[str, Point]]: ...
    def root(self, name: str, point: Point) -> Place: ...
    def file_of(self, disk: Disk, depth: int) -> object: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """What is at a path in some points, one after the other.

    Attributes:
        number: from 1 on, the oldest first; None where there is nothing.
        points: the names of the points; the first is the oldest.
        date_ns: of the first of them, nanoseconds since the epoch.
        inode: in the first of them; None where there is nothing.
        digest: the SHA-256 of what it holds, 64 digits; "" of what holds nothing, as a device.
        same_as: the number of an older version that held the same; None.
        reappeared: there was nothing in the point before, but in an older one there was.
    """

    number: int | None
    points: tuple[str, ...]
    date_ns: int
    inode: Inode | None
    digest: str = ""
    same_as: int | None = None
    reappeared: bool = False


@dataclass(slots=True)
class _Timeline:
    """The versions of one path so far."""

    found: list[Version] = field(default_factory=list)
    numbers: dict[tuple[int, str, int], int] = field(default_factory=dict)  # of the first version that holds it
    count: int = 0

    def add(self, name: str, point: Point, inode: Inode, digest: str) -> None:
        last = self.found[-1] if self.found else None
        key = _key(inode, digest)
        if last is not None and last.inode is not None and _key(last.inode, last.digest) == key:
            self.found[-1] = replace(last, points=(*last.points, name))
            return
        self.count += 1
        same = self.numbers.setdefault(key, self.count)
        version = Version(
            number=self.count,
            points=(name,),
            date_ns=point.date_ns,
            inode=inode,
            digest=digest,
            same_as=same if same != self.count else None,
            reappeared=last is not None and last.inode is None,
        )
        self.found.append(version)

    def miss(self, name: str, point: Point) -> None:
        """Note that there is nothing at the path; that there was nothing at first is no news."""
        if not self.found:
            return
        last = self.found[-1]
        if last.inode is None:
            self.found[-1] = replace(last, points=(*last.points, name))
        else:
            self.found.append(Version(number=None, points=(name,), date_ns=point.date_ns, inode=None))


def _key(inode: Inode, digest: str) -> tuple[int, str, int]:
    return stat.S_IFMT(inode.mode), digest, inode.rdev


def versions(inside: Inside, path: bytes, tell: Tell) -> list[Version]:
    """Return the versions of what is at `path`, the oldest first; none if no point has it.

    A version ends where the type or the contents change: of a file its bytes, of a symbolic link its target, of a
    directory names, types, sizes and times of what is in it. Owner, permissions and times of its own make none.

    Args:
        path: as in the directory of a point in a mount; of its last component a symbolic link is not followed.
        tell: is told of points that cannot be looked into; what they hold is not known, and they are left out.
    """
    return _History(inside, tell).run(path, pattern=False).get(path, [])


def histories(inside: Inside, pattern: bytes, tell: Tell) -> dict[bytes, list[Version]]:
    """Return the versions of all that has a path like `pattern` in some point, by path.

    Args:
        pattern: a path whose components may have wildcards of fnmatch(3); where a point has just this path, it is
            meant as it is.
        tell: as in `versions`.
    """
    return _History(inside, tell).run(pattern, pattern=MAGIC.search(pattern) is not None)


class _History:
    def __init__(self, inside: Inside, tell: Tell) -> None:
        self._inside = inside
        self._tell = tell
        self._file_of: FileOf = inside.file_of
        self._digests: dict[bytes, str] = {}  # by fingerprint
        self._timelines: dict[bytes, _Timeline] = {}

    def run(self, path: bytes, *, pattern: bool) -> dict[bytes, list[Version]]:
        """Look into all points, the oldest first."""
        named = self._inside.named_points()
        names = {id(point): name for name, point in named}
        for point in by_age(point for _, point in named):
            name = names[id(point)]
            try:
                self._look(name, point, path, pattern=pattern)
            except TooManyPaths:
                raise
            except QcowfsError as error:
                self._tell(name, b"", error)
        return {path: timeline.found for path, timeline in sorted(self._timelines.items()) if timeline.found}

    def _look(self, name: str, point: Point, path: bytes, *, pattern: bool) -> None:
        unknown: set[bytes] = set()

        def tell(where: bytes, error: QcowfsError) -> None:
            unknown.add(where)
            self._tell(name, where, error)

        found = dict(self._expanded(self._root(name, point), path, tell, pattern=pattern))
        if len(self._timelines.keys() | found.keys()) > limits.MAX_HISTORY_PATHS:
            raise TooManyPaths(f"more than {limits.MAX_HISTORY_PATHS} paths are like the pattern")
        for where, place in found.items():
            try:
                self._timelines.setdefault(where, _Timeline()).add(name, point, place.inode, self._digest(place))
            except QcowfsError as error:
                tell(where, error)
        for where, timeline in self._timelines.items():
            if where not in found and not any(_is_at_or_below(where, one) for one in unknown):
                timeline.miss(name, point)

    def _root(self, name: str, point: Point) -> Place | None:
        """Return the directory of a point; None if nothing is found in it."""
        try:
            return self._inside.root(name, point)
        except TreeFault as fault:
            if fault.errno in GONE:
                return None
            raise

    def _expanded(
        self, root: Place | None, path: bytes, tell: Callable[[bytes, QcowfsError], None], *, pattern: bool
    ) -> Iterator[tuple[bytes, Place]]:
        """Yield what a path or a pattern means in a point."""
        if root is None:
            return
        exact = _resolved(root, path, _ignored if pattern else tell, follow=False)
        if exact is not None:
            yield path, exact
        if exact is not None or not pattern:
            return
        places = [(b"", root)]
        components = path.split(b"/")
        for number, component in enumerate(components):
            last = number == len(components) - 1
            places = [
                (where, place)
                for at, directory in places
                for where in _matches(at, directory, component, tell)
                if (place := _resolved(root, where, tell, follow=not last)) is not None
            ]
        yield from places

    def _digest(self, place: Place) -> str:
        """Return the SHA-256 of what a place holds."""
        mode = place.inode.mode
        if stat.S_ISDIR(mode):
            return _listing_digest(place)
        if stat.S_ISLNK(mode):
            return hashlib.sha256(place.target(place.inode)).hexdigest()
        if not stat.S_ISREG(mode):
            return ""
        stored = place.stored()
        mark = None if stored is None else fingerprint(stored, self._file_of)
        known = None if mark is None else self._digests.get(mark)
        if known is None:
            known = _bytes_digest(place)
            if mark is not None:
                self._digests[mark] = known
        return known


def _matches(
    at: bytes, directory: Place, component: bytes, tell: Callable[[bytes, QcowfsError], None]
) -> Iterator[bytes]:
    """Yield the paths in the directory `at` whose name is like `component`."""
    if not MAGIC.search(component):
        yield join(at, component)
        return
    if not stat.S_ISDIR(directory.inode.mode):
        return
    found = directory.children()
    for trouble in found.troubles:
        if not trouble.name or fnmatchcase(trouble.name, component):
            tell(join(at, trouble.name), TreeFault(directory.name, trouble.what))
    for name, inode in map(unpacked, found.entries):
        hidden = name.startswith(b".") and not component.startswith(b".")
        if fnmatchcase(name, component) and not hidden and not inode.error:
            yield join(at, name)


def _resolved(root: Place, path: bytes, tell: Callable[[bytes, QcowfsError], None], *, follow: bool) -> Place | None:
    """Return what is at a path; None if nothing is, or if it cannot be told what, and `tell` was told."""
    try:
        return root.resolve(path, follow=follow)
    except TreeFault as fault:
        if fault.errno not in GONE:
            tell(path, fault)
        return None


def _ignored(path: bytes, error: QcowfsError) -> None:
    """Say nothing: a pattern is hardly meant as a name, and looking for what is like it tells the same."""


def _is_at_or_below(path: bytes, top: bytes) -> bool:
    return not top or path == top or path.startswith(top + b"/")


def _bytes_digest(place: Place) -> str:
    if place.inode.size > limits.MAX_READ_FILE:
        raise TreeFault(place.name, f"too large to be hashed: {place.inode.size} bytes", errno.EFBIG)
    found = hashlib.sha256()
    for chunk in place.chunks():
        found.update(chunk)
    return found.hexdigest()


def _listing_digest(place: Place) -> str:
    found = hashlib.sha256()
    listing = place.children()
    for trouble in listing.troubles:
        raise TreeFault(place.name, trouble.what)
    for name, inode in map(unpacked, listing.entries):
        # What no tree has got its time from its point.
        time = (inode.mtime, inode.mtime_ns) if inode.ino else None
        found.update(repr((name, stat.S_IFMT(inode.mode), inode.size, time)).encode())
    return found.hexdigest()

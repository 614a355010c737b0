"""What differs between two points, or between what is under one path in them: volume by volume.

Used by the commands. One thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from qcowfs.errors import QcowfsError, TreeFault
from qcowfs.filediff import ADDED, MODIFIED, NEW, OLD, REMOVED, TYPE, Change, Comparison
from qcowfs.inside.pointfiles import SUFFIX, Volumes
from qcowfs.inside.walk import Place
from qcowfs.renames import with_renames

__all__ = ["differences"]

TooMany = Callable[[], None]


def differences(
    comparison: Comparison, path: bytes, old: Place | None, new: Place | None, too_many: TooMany
) -> Iterator[Change]:
    """Yield what differs between two places, renames found, by path.

    Args:
        path: of both, in the directory of a point; b"": the points themselves.
        old, new: None where there is none; not both.
        too_many: is called for each volume with so many differences that renames are not looked for.
    """
    if isinstance(old, Volumes) and isinstance(new, Volumes):
        for name in sorted(old.volumes.keys() | new.volumes.keys()):
            yield from _volume(comparison, name, old, new, too_many)
    elif isinstance(old, Volumes) or isinstance(new, Volumes):
        yield Change(TYPE, path, old, new, ("type",))  # one of them is one file system, without partitions
    else:
        yield from with_renames(comparison.compare(path, old, new), comparison, too_many)


def _volume(comparison: Comparison, name: bytes, old: Volumes, new: Volumes, too_many: TooMany) -> Iterator[Change]:
    if name not in new.volumes:
        yield Change(REMOVED, name, _shown(old, name), None)
    elif name not in old.volumes:
        yield Change(ADDED, name, None, _shown(new, name))
    elif not comparison.same_volume(old.volumes[name][1], new.volumes[name][1]):
        before, after = _root(old, name), _root(new, name)
        if isinstance(before, Place) and isinstance(after, Place):
            yield from with_renames(comparison.compare(name, before, after), comparison, too_many)
        else:
            yield from _raw(comparison, name, old, new, (before, after))


def _raw(
    comparison: Comparison, name: bytes, old: Volumes, new: Volumes, roots: tuple[Place | TreeFault, Place | TreeFault]
) -> Iterator[Change]:
    """Compare the bytes of a volume that has no tree in one of two points."""
    one, other = (_told_root(comparison, side, point, name + SUFFIX) for side, point in ((OLD, old), (NEW, new)))
    if one is None or other is None:
        return
    if any(isinstance(root, Place) for root in roots):
        for side, root in enumerate(roots):
            if isinstance(root, TreeFault):
                comparison.tell(side, name, f"{root.what}; the volume is compared as a whole", hint=root.hint)
    try:
        same = comparison.same_contents(one, other)
    except QcowfsError as error:
        comparison.tell(None, name + SUFFIX, error.what if isinstance(error, TreeFault) else str(error))
        return
    if not same:
        yield Change(MODIFIED, name + SUFFIX, one, other, ("contents",))


def _told_root(comparison: Comparison, side: int, volumes: Volumes, name: bytes) -> Place | None:
    """Return a volume or its tree; None if it cannot be read, and the comparison was told."""
    root = _root(volumes, name)
    if isinstance(root, Place):
        return root
    comparison.tell(side, name, root.what, hint=root.hint)
    return None


def _root(volumes: Volumes, name: bytes) -> Place | TreeFault:
    """Return the root of a volume's tree, or why it has none."""
    try:
        return volumes.resolve(name, follow=False)
    except TreeFault as fault:
        return fault


def _shown(volumes: Volumes, name: bytes) -> Place | None:
    """Return what there is of a volume: its tree, else its bytes."""
    for shown in (name, name + SUFFIX):
        root = _root(volumes, shown)
        if isinstance(root, Place):
            return root
    return None

"""A chain that was opened again: which of its layers and points are the ones that are known already.

Used by follow.py. What is known keeps its caches and its open files. What is new has a source of its own, so that
nothing that was remembered of clusters that are used again is ever taken for theirs: all states that share a source
were there at one time, and as long as one of them is there nothing that it uses changes. Any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from qcowfs.chain import Chain, Layer
from qcowfs.snapshot import Point, points

__all__ = ["known_points", "renewed"]


def renewed(old: Chain, new: Chain) -> Chain | None:
    """Return `new` with what is known of `old`; None, and `new` closed, if nothing has happened.

    Descriptors of `new` that are not needed are closed: a machine may make a snapshot every minute.

    Args:
        new: the same image, opened without locks: whoever wants to write it is not to be kept out from now on.
    """
    known = [*old.layers, *([None] * len(new.layers))]
    layers = tuple(_renewed(before, layer) for before, layer in zip(known, new.layers, strict=False))
    if len(layers) == len(old.layers) and all(map(_is, layers, old.layers)):
        return None
    return Chain(old.image, layers, new.warnings)


def known_points(known: Sequence[Point], old: Chain, new: Chain) -> tuple[Point, ...]:
    """Return the points of `new`, which `renewed` returned, and for each that was there before the one in `known`."""
    by_place: dict[tuple[int, bytes | None], list[Point]] = {}
    for point in known:
        by_place.setdefault(_place(point), []).append(point)
    found = []
    for point in points(new):
        same = (before for before in by_place.get(_place(point), ()) if _same_point(before, point, old, new))
        found.append(next(same, point))
    return tuple(found)


def _place(point: Point) -> tuple[int, bytes | None]:
    return point.depth, point.entry.stored if point.entry else None


def _same_point(before: Point, point: Point, old: Chain, new: Chain) -> bool:
    if (before.kind, before.frozen, before.virtual_size) != (point.kind, point.frozen, point.virtual_size):
        return False
    if len(old.layers) != len(new.layers) or not all(
        map(_is, old.layers[point.depth + 1 :], new.layers[point.depth + 1 :])
    ):
        return False
    if point.entry is None and point.frozen:
        return before.layer is point.layer
    # A file that is open keeps its number; the bytes of the entry are equal.
    return before.layer.file_id == point.layer.file_id


def _renewed(before: Layer | None, layer: Layer) -> Layer:
    if before is None or not _same_files(before, layer):
        return layer
    if _same_state(before, layer):
        _close(layer)
        return before
    source = before.source.again()
    data = source if before.data is before.source else before.data.again()
    if source is None or data is None:
        return layer
    _close(layer)
    return replace(layer, source=source, data=data)


def _same_files(before: Layer, layer: Layer) -> bool:
    if (before.format, before.depth, before.path) != (layer.format, layer.depth, layer.path):
        return False
    with suppress(OSError):
        return before.source.place() == layer.source.place() and before.data.place() == layer.data.place()
    return False


def _same_state(before: Layer, layer: Layer) -> bool:
    """Tell whether nothing of `before` has changed; of one that is being written, nothing but its active clusters."""
    if before.header != layer.header or before.written_by_other != layer.written_by_other:
        return False
    if [entry.stored for entry in before.snapshots] != [entry.stored for entry in layer.snapshots]:
        return False
    if before.held or before.written_by_other or before.url is not None:  # a server without versions tells no times
        return True
    return (before.modified_ns, before.data_modified_ns) == (layer.modified_ns, layer.data_modified_ns)


def _close(layer: Layer) -> None:
    for source in (layer.source, layer.data):
        with suppress(OSError):
            source.close()


def _is(first: Layer, second: Layer) -> bool:
    return first is second

"""Points by the names that people type: the mount's name, an id, a snapshot's own name.

Used by the verbs that take POINT.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from qcowfs.chain import Chain
from qcowfs.errors import PointNotFound, printable
from qcowfs.snapshot import Point, points
from qcowfs.source.url import is_url
from qcowfs.vfs import names

__all__ = ["find_named", "find_place", "find_point", "named_points", "split_image"]


def named_points(chain: Chain) -> list[tuple[str, Point]]:
    """Return each point of `chain` with its name in the mount (without ".raw")."""
    found = points(chain)
    return list(zip(names.assign(found), found, strict=True))


def split_image(text: str) -> tuple[str, str | None]:
    """Return IMAGE and POINT of IMAGE:POINT, None for POINT where there is only IMAGE.

    Both may have colons: the longest text before a colon that is the name of a file is IMAGE. Of a URL, POINT is what
    follows a colon in the last component.
    """
    if is_url(text):
        folder, slash, last = text.rpartition("/")
        image, colon, point = last.partition(":")
        return (folder + slash + image, point) if colon and not folder.endswith("/") else (text, None)
    words = text.split(":")
    images = [":".join(words[:count]) for count in range(len(words), 0, -1)]
    image = next((image for image in images if os.path.lexists(image)), words[0])
    return image, text[len(image) + 1 :] if len(image) < len(text) else None


def find_point(chain: Chain, text: str) -> Point:
    """Return the point that `text` means.

    Raises:
        PointNotFound: there is none, or more than one.
    """
    return find_named(chain, text)[1]


def find_named(chain: Chain, text: str) -> tuple[str, Point]:
    """Return the point that `text` means, with its name in the mount.

    `text` is that name, else a snapshot's id, else a snapshot's own name. The id goes before the name, as in `qemu-img
    snapshot -a`; both are looked for in the image itself first.

    Raises:
        PointNotFound: there is none, or more than one.
    """
    named = named_points(chain)
    found = _meant(chain, named, text)
    if found is None:
        raise _not_found(chain, named, text)
    return found


def find_place(chain: Chain, text: str) -> tuple[str, Point, str]:
    """Return the point of POINT or POINT:PATH, with its name before it and the path after it, "" if there is none.

    Names of points may have colons: the longest text before a colon that means a point is POINT.

    Raises:
        PointNotFound: no such text means a point, or it means more than one.
    """
    named = named_points(chain)
    words = text.split(":")
    for count in range(len(words), 0, -1):
        found = _meant(chain, named, ":".join(words[:count]))
        if found is not None:
            return (*found, ":".join(words[count:]))
    raise _not_found(chain, named, words[0], _colon_hint(chain, named, words[0]))


def _meant(chain: Chain, named: Sequence[tuple[str, Point]], text: str) -> tuple[str, Point] | None:
    wanted = os.fsencode(text)
    for matches in (
        [(name, point) for name, point in named if text in (name, name + names.SUFFIX)],
        [(name, point) for name, point in named if point.depth == 0 and point.snapshot_id == wanted],
        [(name, point) for name, point in named if point.snapshot_name == wanted],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise PointNotFound(
                chain.image, f"{printable(text)} means {len(matches)} points", "use a name of qcowfs list"
            )
    return None


def _colon_hint(chain: Chain, named: Sequence[tuple[str, Point]], text: str) -> str:
    """Return what helps somebody who wrote POINT/PATH, as in a mount, or PATH alone; "" if neither is likely."""
    point, slash, path = text.partition("/")
    if not slash:
        return ""
    if _meant(chain, named, point):
        return f"a colon stands between POINT and PATH: {printable(point)}:{printable(path)}"
    return f"POINT comes before PATH: {named[0][0]}:{printable(text)}"


def _not_found(chain: Chain, named: Sequence[tuple[str, Point]], text: str, hint: str = "") -> PointNotFound:
    import difflib  # 5 ms, for those who mistype

    near = difflib.get_close_matches(text, [name for name, _ in named], 3)
    if not hint:
        nearest = " or ".join(printable(name) for name in near)
        hint = f"did you mean {nearest}?" if near else "qcowfs list shows the points"
    return PointNotFound(
        chain.image, f"no point {printable(text)}", "not a name, an id or a snapshot's name", hint=hint
    )

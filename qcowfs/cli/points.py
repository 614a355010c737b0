"""Points by the names that people type: the mount's name, an id, a snapshot's own name.

Used by the verbs that take POINT.
"""

from __future__ import annotations

import difflib
import os

from qcowfs.chain import Chain
from qcowfs.errors import PointNotFound, printable
from qcowfs.snapshot import Point, points
from qcowfs.vfs import names

__all__ = ["find_point", "named_points"]


def named_points(chain: Chain) -> list[tuple[str, Point]]:
    """Return each point of `chain` with its name in the mount (without ".raw")."""
    found = points(chain)
    return list(zip(names.assign(found), found, strict=True))


def find_point(chain: Chain, text: str) -> Point:
    """Return the point that `text` means: its name in the mount, else a snapshot's id, else a snapshot's own name.

    The id goes before the name, as in `qemu-img snapshot -a`; both are looked for in the image itself first.

    Raises:
        PointNotFound: there is none, or more than one.
    """
    named = named_points(chain)
    wanted = os.fsencode(text)
    for matches in (
        [point for name, point in named if text in (name, name + names.SUFFIX)],
        [point for _, point in named if point.depth == 0 and point.snapshot_id == wanted],
        [point for _, point in named if point.snapshot_name == wanted],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise PointNotFound(
                chain.image, f"{printable(text)} means {len(matches)} points", "use a name of qcowfs list"
            )
    near = difflib.get_close_matches(text, [name for name, _ in named], 3)
    hint = f"did you mean {' or '.join(printable(name) for name in near)}?" if near else "qcowfs list shows the points"
    raise PointNotFound(chain.image, f"no point {printable(text)}", "not a name, an id or a snapshot's name", hint=hint)

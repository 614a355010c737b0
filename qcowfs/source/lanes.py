"""Further connections to the server of one source: each has to lead to what the first one leads to.

Used by the rooms of protocols. `_lanes` says when they are opened, and shares them out.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from qcowfs._lanes import LanesSource
from qcowfs._requests import QueuedSource
from qcowfs.errors import SourceError

__all__ = ["in_lanes"]

S = TypeVar("S", bound=QueuedSource)


def in_lanes(first: S, open_another: Callable[[], S], facts: Callable[[S], object]) -> LanesSource:
    """Return `first`, which is read over several connections when several readers want to.

    Args:
        open_another: opens the same once more.
        facts: what is equal for two connections to one thing.
    """

    def another() -> S:
        source = open_another()
        if facts(source) == facts(first):
            return source
        source.close()
        failure = SourceError(first.name, "cannot connect once more", "another connection shows something else")
        failure.errno = errno.ESTALE
        raise failure

    return LanesSource(first, another)

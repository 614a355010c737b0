"""Where something is below the destination, as a chain of names: a thousand deep directories share what they have.

Used by the other files of this room.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Trail"]


class Trail(NamedTuple):
    """A name in another place; without one it is the top, whose name is that of a person, with what joins the next."""

    above: Trail | None
    name: bytes

    def path(self) -> bytes:
        """Return the names with slashes between them."""
        top, *below = self.names()
        return top + b"/".join(below) if below else top.rstrip(b"/") or top

    def names(self) -> list[bytes]:
        """Return the names from the top on."""
        names = []
        at: Trail | None = self
        while at is not None:
            names.append(at.name)
            at = at.above
        return names[::-1]

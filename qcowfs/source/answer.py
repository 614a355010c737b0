"""What a server answers to a request for a range of an object, and the ways in which it does not.

Used by objects and by the two rooms that talk to servers, web and buckets. Pure; any thread.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Answer", "Content", "Failure", "Replaced", "Temporary", "Transport"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Which content of an object an answer is about.

    Attributes:
        size: bytes of the whole object.
        etag: the entity tag with its quotes, as the server wrote it; None: it sends none.
        modified: seconds since the epoch; None: the server does not tell.
        generation: the object's version in a store that counts them.
    """

    size: int
    etag: str | None = None
    modified: float | None = None
    generation: str | None = None

    @property
    def condition(self) -> str | None:
        """What If-Match may say: the comparison there is strong, and a weak tag never matches (RFC 9110, 13.1.1)."""
        return None if self.etag is None or self.etag.startswith("W/") else self.etag

    @property
    def version(self) -> str | None:
        """What names these bytes and no others, also later; None: nothing that the server says does.

        Two contents may share a weak tag (RFC 9110, 8.8.1), so it names nothing. A date has a resolution of one second;
        with the size beside it, it is what rsync and make go by.
        """
        if self.condition is not None:
            return f"{self.condition} {self.generation}" if self.generation else self.condition
        if self.etag is None and self.modified is not None:
            return f"{self.modified:.0f} {self.size}"
        return None

    def is_same(self, other: Content) -> bool:
        """Tell whether `other` is about the same bytes, as far as this server lets anybody know."""
        if (self.size, self.etag, self.generation) != (other.size, other.etag, other.generation):
            return False
        return self.condition is not None or self.modified == other.modified


@dataclass(frozen=True, slots=True)
class Answer:
    """The bytes that were asked for, in pieces, and of which content they are."""

    content: Content
    pieces: Sequence[bytes | bytearray | memoryview]


class Failure(Exception):
    """{why}"""

    def __init__(self, why: str, *, errno: int = _errno.EIO, hint: str | None = None) -> None:
        super().__init__(why)
        self.why = why
        self.errno = errno
        self.hint = hint


class Temporary(Failure):
    """A failure that may be over soon.

    Args:
        after: seconds that the server wants to be left alone.
        unreachable: nothing came from the server at all. Who opens an image is told at once; who reads, waits.
    """

    def __init__(self, why: str, *, after: float = 0.0, unreachable: bool = False, hint: str | None = None) -> None:
        super().__init__(why, hint=hint)
        self.after = after
        self.unreachable = unreachable


class Replaced(Failure):
    """There is another content now where the one was that is being read."""

    def __init__(self, why: str = "it was replaced or changed") -> None:
        super().__init__(why, errno=_errno.ESTALE)


class Transport(Protocol):
    """One object on one server."""

    @property
    def place(self) -> tuple[str, ...]:
        """What is equal for two URLs of the same object."""

    def get(self, start: int, length: int, held: Content | None, deadline: float) -> Answer:
        """Ask once for `length` bytes from `start` on; fewer come only from the end of the object.

        Args:
            held: the content that is being read, None: whichever there is.
            deadline: of time.monotonic.

        Raises:
            Failure: it did not work; Temporary: it may the next time; Replaced: `held` is there no more.
        """

    def close(self) -> None:
        """Let requests that wait fail, where that can be done."""

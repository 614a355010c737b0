"""What a worker may take for one request: time of its own, and bytes of its volume. Used by client.py. One thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from qcowfs import limits

__all__ = ["Allowance", "Overdrawn"]


class Overdrawn(Exception):
    """The worker has taken more than it may; the text says what of."""


class Allowance:
    """Begins with the request.

    Attributes:
        deadline: of time.monotonic(), until which the worker has to answer; it moves while the worker's bytes are read.
    """

    def __init__(self) -> None:
        began = time.monotonic()
        self.deadline = began + limits.INSIDE_ANSWER_SECONDS
        self._end = began + limits.INSIDE_TOTAL_SECONDS
        self._bytes = limits.INSIDE_REQUEST_BYTES

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Take what is done meanwhile for no time of the worker's: the disk may be far away."""
        began = time.monotonic()
        yield
        self.deadline += time.monotonic() - began

    def charge(self, length: int) -> None:
        """Note that so many bytes are given to the worker; few of them cost as much as a block.

        Raises:
            Overdrawn: it has had enough, or the whole has taken too long.
        """
        self._bytes -= max(length, limits.INSIDE_BLOCK)
        if self._bytes < 0:
            raise Overdrawn(f"it read more than {limits.INSIDE_REQUEST_BYTES >> 20} MiB for one request")
        if time.monotonic() > self._end:
            raise Overdrawn(f"one request took more than {limits.INSIDE_TOTAL_SECONDS} s")

"""A remote source made of bytes: it counts what it is asked, and fails, waits or changes when a test says so."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Hashable

from qcowfs._pysource import PythonSource

PATIENCE = 60  # seconds that a test waits for something that must happen


def content_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


class RemoteBase:
    """What stands behind a cache.

    Attributes:
        content: may be replaced.
        requests: (offset, length), in the order in which they came.
        bad: offsets; a request that has one of them is EIO.
        failure: an errno for every request; 0: none.
        most_at_once: requests that were under way at one time.
    """

    def __init__(self, content: bytes, name: str = "here://image", place: Hashable = ("here", "image")) -> None:
        self.content = content
        self.requests: list[tuple[int, int]] = []
        self.bad: set[int] = set()
        self.failure = 0
        self.most_at_once = 0
        self._at_once = 0
        self._changed = threading.Condition()
        self._held = False
        self._closed = False
        base = self

        class Closing(PythonSource):
            def close(self) -> None:
                base._end()
                super().close()

        self.source = Closing(name, len(content), self.read, place)

    def read(self, offset: int, buffer: memoryview) -> int:
        with self._changed:
            self.requests.append((offset, len(buffer)))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self._changed.notify_all()
            data = self.content[offset : offset + len(buffer)]  # as it is when the request comes
            free = self._changed.wait_for(lambda: not self._held or self._closed, PATIENCE)
            self._at_once -= 1
        if self._closed or not free:
            raise OSError(errno.EIO, "closed while it waited")
        if self.failure:
            raise OSError(self.failure, "fails")
        if any(offset <= place < offset + len(buffer) for place in self.bad):
            raise OSError(errno.EIO, "a bad sector")
        buffer[: len(data)] = data
        return len(data)

    def hold(self) -> None:
        """Let no request from now on be answered before `release`, or before the source is closed."""
        self._held = True

    def release(self) -> None:
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def wait_for_requests(self, number: int) -> None:
        """Return when that many are under way."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._at_once >= number, PATIENCE)

    def _end(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def fetched(self) -> int:
        return sum(length for _, length in self.requests)

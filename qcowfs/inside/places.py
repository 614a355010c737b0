"""Which trees have a worker: INSIDE_WORKERS at most, and in turn where more of them want one.

Used by client.py; a mount has one. Any number of threads. A tree that needs a place gets that of the longest idle one.
While all are in use it waits, first come, first served, and whoever has had a worker for a while gives it up after the
request that it answers. A start may have to read a whole journal, so a place is not taken away after each request.

Locks: a tree calls this with its own lock held, and `retire` only tries to take another tree's.
"""

from __future__ import annotations

import errno
import threading
import time
from collections import OrderedDict, deque
from typing import Protocol

from qcowfs import limits

__all__ = ["Places", "Tenant"]

RESTING = 0.05  # seconds without a request after which a tree counts as idle, and not as between two requests
TURN = 1.0  # seconds that a tree may keep its worker while others wait
PAUSE = 0.02  # seconds between two looks for a tree that has become idle


class Tenant(Protocol):
    """Who has a place: a Tree."""

    def retire(self) -> bool:
        """Give the worker and its place up if no request is under way; return whether none was."""


class _Stay:
    __slots__ = ("began", "used")

    def __init__(self) -> None:
        self.began = self.used = time.monotonic()


class Places:
    """The places for workers of one mount."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stays: OrderedDict[Tenant, _Stay] = OrderedDict()  # the longest unused one first
        self._waiting: deque[Tenant] = deque()
        self._closed = False

    def take(self, tenant: Tenant) -> None:
        """Get a place for a worker, and keep it until `leave`.

        Raises:
            OSError: EAGAIN, none became free in INSIDE_PLACE_SECONDS; ESHUTDOWN, after `close`.
        """
        deadline = time.monotonic() + limits.INSIDE_PLACE_SECONDS
        with self._changed:
            self._waiting.append(tenant)
        try:
            while not self._settle(tenant):
                if time.monotonic() > deadline:
                    raise OSError(errno.EAGAIN, f"{limits.INSIDE_WORKERS} others are being read")
                if not self._vacate(tenant):
                    with self._changed:
                        self._changed.wait(PAUSE)
        finally:
            with self._changed:
                self._waiting.remove(tenant)
                self._changed.notify_all()

    def _settle(self, tenant: Tenant) -> bool:
        with self._changed:
            if self._closed:
                raise OSError(errno.ESHUTDOWN, "the mount ends")
            if self._waiting[0] is not tenant or len(self._stays) >= limits.INSIDE_WORKERS:
                return False
            self._stays[tenant] = _Stay()
            return True

    def _vacate(self, tenant: Tenant) -> bool:
        """Make one place free if it is `tenant`'s turn and somebody can give one up; return whether one was."""
        with self._changed:
            now = time.monotonic()
            candidates = [
                other
                for other, stay in self._stays.items()
                if now - stay.used >= RESTING or now - stay.began >= TURN
                if self._waiting[0] is tenant
            ]
        return any(other.retire() for other in candidates)

    def used(self, tenant: Tenant) -> bool:
        """Note that a request of `tenant` has ended; return whether it shall give its worker up for another."""
        with self._changed:
            stay = self._stays[tenant]
            stay.used = time.monotonic()
            self._stays.move_to_end(tenant)
            return bool(self._waiting) and stay.used - stay.began >= TURN

    def leave(self, tenant: Tenant) -> None:
        """Note that `tenant` has no worker any more."""
        with self._changed:
            self._stays.pop(tenant, None)
            self._changed.notify_all()

    def idle(self, seconds: float) -> None:
        """End the workers that nobody asked anything for so long."""
        before = time.monotonic() - seconds
        with self._changed:
            candidates = [tenant for tenant, stay in self._stays.items() if stay.used <= before]
        for tenant in candidates:
            tenant.retire()

    def close(self) -> None:
        """Let nobody in any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

"""What became of a restore: counted, and told to the command as it happens.

Used by the other files of this room, and by the command, which prints. One thread.
"""

from __future__ import annotations

from typing import Protocol

from qcowfs.inside.walk import Place

__all__ = ["Ledger", "Listener"]


class Listener(Protocol):
    """Who is told. Paths are where things were restored, below the destination and with it."""

    def restored(self, path: bytes, place: Place) -> None:
        """Something is complete and has its name."""

    def skipped(self, path: bytes, why: str) -> None:
        """Something is left out, as it has to be for this user."""

    def failed(self, path: bytes, what: str, hint: str | None) -> None:
        """Something could not be restored right."""

    def warned(self, path: bytes, what: str) -> None:
        """Something was restored, but for a detail that cannot be kept here. Each kind of it is told once."""

    def moved(self, path: bytes, count: int) -> None:
        """So many further bytes were written for `path`, which has its name later."""


class Ledger:
    """Counts, and passes on.

    Attributes:
        files, directories: that were restored; a further hard link counts as a file.
        bytes: of the files, without holes.
        errors: how many.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._warned: set[str] = set()
        self.files = 0
        self.directories = 0
        self.bytes = 0
        self.errors = 0

    def restored(self, path: bytes, place: Place, *, directory: bool = False) -> None:
        """Note that something is complete and has its name."""
        self.files += not directory
        self.directories += directory
        self._listener.restored(path, place)

    def skipped(self, path: bytes, why: str) -> None:
        """Note that something is left out."""
        self._listener.skipped(path, why)

    def failed(self, path: bytes, what: str, hint: str | None = None) -> None:
        """Note that something could not be restored right."""
        self.errors += 1
        self._listener.failed(path, what, hint)

    def warn(self, kind: str, path: bytes, what: str) -> None:
        """Tell of a detail that cannot be kept, once for each `kind`."""
        if kind not in self._warned:
            self._warned.add(kind)
            self._listener.warned(path, what)

    def moved(self, path: bytes, count: int) -> None:
        """Note that `count` further bytes were written."""
        self._listener.moved(path, count)

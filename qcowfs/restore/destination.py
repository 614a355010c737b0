"""Where something is to be restored, by what a person typed: as cp(1) understands its last argument.

Used by the command. One thread.
"""

from __future__ import annotations

import os

from qcowfs.errors import QcowfsError, printable
from qcowfs.restore.directory import Directory, Existing

__all__ = ["Destination"]

FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC  # what a person typed is followed, symbolic links too


class Destination:
    """A directory to restore into, or a name to restore as.

    Attributes:
        directory: the directory, or the one that holds the name.
        name: b"" if `directory` is where to restore into.
        shown: how a person calls `directory`; b"" where the name alone was typed.
    """

    def __init__(self, typed: bytes, existing: Existing, *, directories: bool, several: bool) -> None:
        """Open the directory.

        Args:
            typed: by a person.
            existing: what becomes of files that are there.
            directories: nothing but directories is to be restored.
            several: sources have to go into a directory.

        Raises:
            QcowfsError: there is no such directory.
        """
        self.name = b""
        self.shown = typed.rstrip(b"/") or typed[:1]
        descriptor = _opened(typed)
        if descriptor is None and several:
            raise QcowfsError(f"{printable(typed)}: not a directory, and several sources need one")
        if descriptor is None and typed.endswith(b"/") and not directories:
            raise QcowfsError(f"{printable(typed)}: not a directory")
        if descriptor is None:
            above, _, self.name = self.shown.rpartition(b"/")
            self.shown = above or self.shown[: self.shown.startswith(b"/")]
            descriptor = _opened(self.shown or b".")
        if descriptor is None:
            raise QcowfsError(f"{printable(self.shown or b'.')}: no such directory")
        self.directory = Directory(descriptor, new=False, existing=existing)

    def close(self) -> None:
        """Close the directory."""
        self.directory.close()


def _opened(path: bytes) -> int | None:
    """Return a descriptor of a directory, None if there is none."""
    try:
        return os.open(path, FLAGS)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise QcowfsError(f"{printable(path)}: {error.strerror}") from error

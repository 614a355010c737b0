"""What the readers of FAT, exFAT and NTFS have in common: names as Linux has them, and directories that are held.

Used by fat.py, exfat.py and ntfs.py. One thread.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from qcowfs import limits
from qcowfs.inside.record import fill

__all__ = ["LONGEST_NAME", "Directories", "is_name", "utf8"]

LONGEST_NAME = 255
OVERHEAD = 128  # bytes that Python takes for a name and a number, and their place in a dict


def utf8(stored: bytes) -> bytes:
    """Return a name from UTF-16; one that ends in the middle, or that has half a pair, keeps it in three bytes.

    Linux drops such a half, and shows a name that it cannot find again then.
    """
    text = stored[: len(stored) & ~1].decode("utf-16-le", "surrogatepass").partition("\0")[0]
    return text.encode("utf-8", "surrogatepass")


def is_name(name: bytes) -> bool:
    """Return whether Linux can have a file of this name in a directory."""
    return 0 < len(name) <= LONGEST_NAME and b"/" not in name and b"\0" not in name and name not in (b".", b"..")


@dataclass(slots=True)
class _Directory:
    names: dict[bytes, int]
    size: int  # in bytes


class Directories:
    """The names of the directories that were looked at last, each with a number of its file.

    The same name twice is the first one, as it is for Linux. A cookie is the number of names before it.
    """

    def __init__(self, read: Callable[[int], Iterable[tuple[bytes, int]]]) -> None:
        """`read` yields the names of a directory and the numbers of their files, or raises OSError."""
        self._read = read
        self._held: OrderedDict[int, _Directory] = OrderedDict()
        self._size = 0  # bytes of all of them, and of the one that is being read

    def lookup(self, ino: int, name: bytes) -> int:
        """Return the number of the file `name`; raise ENOENT as reader.Reader.lookup does."""
        found = self._names(ino).get(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return found

    def entries(self, ino: int, cookie: int, room: int, entry: Callable[[bytes, int, int], bytes]) -> bytes:
        """Return entries as reader.Reader.entries does; `entry` makes one from a name, a number and a cookie."""
        names = islice(self._names(ino).items(), cookie, None)
        return fill((entry(name, child, number) for number, (name, child) in enumerate(names, cookie + 1)), room)

    def _names(self, ino: int) -> dict[bytes, int]:
        held = self._held.get(ino)
        if held is None:
            held = self._held[ino] = self._load(ino)
        self._held.move_to_end(ino)
        return held.names

    def _load(self, ino: int) -> _Directory:
        """Return a directory; others are forgotten where there is no room for it."""
        made = _Directory({}, OVERHEAD)
        self._size += made.size
        try:
            for name, child in self._read(ino):
                if name not in made.names:
                    made.names[name] = child
                    made.size += len(name) + OVERHEAD
                    self._make_room(len(name) + OVERHEAD)
        except BaseException:
            self._size -= made.size
            raise
        return made

    def _make_room(self, size: int) -> None:
        """Count `size` bytes more."""
        self._size += size
        while self._size > limits.MAX_HELD_NAMES:
            if not self._held:
                raise OSError(errno.EIO, "a directory of too many names")
            self._size -= self._held.popitem(last=False)[1].size

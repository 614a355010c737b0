"""The names in a FAT directory: which entries are files, and what their long names are, as Linux's vfat reads them.

Used by fat.py. Pure. A long name lies in entries before the file's own, its end first; each has a number, and a
checksum of the short name that follows. Where they do not fit together, the file is known by its short name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from qcowfs.inside.directories import is_name, utf8

__all__ = ["checksum", "names", "short_name"]

FREE = (0x00, 0xE5)  # the first byte of an entry that is not used; Linux reads on behind a 0, where others stop
VOLUME, LONG = 0x08, 0x0F  # attributes
LAST_PART = 0x40
MOST_PARTS = 20
LOWER_BASE, LOWER_EXTENSION = 0x08, 0x10  # Windows NT: the short name is to be shown in lower case
DOTS = (b".          ", b"..         ")


def checksum(short: bytes) -> int:
    """Return the checksum of the 11 bytes of a short name that its long name carries."""
    total = 0
    for byte in short:
        total = ((total >> 1 | total << 7) + byte) & 0xFF
    return total


class _LongName:
    """The parts of a long name, as they come."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._checksum = 0
        self._next = -1  # the number that the next part has to have; 0: it is whole; -1: there is none

    def add(self, entry: bytes) -> None:
        number = entry[0]
        if number & LAST_PART and 0 < number ^ LAST_PART <= MOST_PARTS:
            self._parts, self._checksum, self._next = [], entry[13], number ^ LAST_PART
        elif number != self._next or entry[13] != self._checksum or number == 0:
            self._next = -1
            return
        self._parts.append(entry[1:11] + entry[14:26] + entry[28:32])
        self._next -= 1

    def take(self, entry: bytes) -> bytes:
        """Return the long name of the file with this entry, b"" if it has none; the next file has another."""
        whole, self._next = self._next == 0, -1
        if not whole or self._checksum != checksum(entry[:11]):
            return b""
        return utf8(b"".join(reversed(self._parts)))


def names(entries: Iterable[tuple[int, bytes]]) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, place and attributes of each file; b"." and b".." where the directory names itself and its parent.

    Args:
        entries: place and bytes of each entry of the directory.
    """
    long = _LongName()
    for place, entry in entries:
        attributes = entry[11]
        if attributes == LONG and entry[0] != 0xE5:
            long.add(entry)
            continue
        name = long.take(entry)
        if entry[0] in FREE or attributes & VOLUME:
            continue
        if entry[:11] in DOTS:
            yield entry[:2].rstrip(), place, attributes
            continue
        if not is_name(name):  # also what is longer than Linux can have
            name = short_name(entry)
        if is_name(name):
            yield name, place, attributes


def short_name(entry: bytes) -> bytes:
    """Return the short name of an entry, b"" if it has none."""
    base, extension = entry[:8], entry[8:11]
    if base[0] == 0x05:
        base = b"\xe5" + base[1:]
    shown = _part(base, entry[12] & LOWER_BASE)
    more = _part(extension, entry[12] & LOWER_EXTENSION)
    return f"{shown}.{more}".encode() if more else shown.encode()


def _part(stored: bytes, lower: int) -> str:
    text = stored.partition(b"\0")[0].rstrip(b" ").decode("cp437")
    return "".join(map(_lower, text)) if lower else text


def _lower(letter: str) -> str:
    """Return what codepage 437 has as the lower case of a letter; itself if there is none."""
    small = letter.lower()
    try:
        small.encode("cp437")
    except UnicodeEncodeError:
        return letter
    return small

"""The name of each point in a mount, and only here: escaping, room, duplicates.

Used by vfs/tree.py and by the commands that print or accept names. Pure functions. The rules are the contract of
qcowfs-layout(7); the reasons are in docs/decisions/0004-names-and-inodes.md.

A name CAN be told apart from every other name of its mount, with and without ".raw", and always comes out the same.
A name CANNOT be turned back into a point without the list of points: cutting and numbering lose bytes.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from qcowfs.snapshot import Point

__all__ = ["ACTIVE", "LATEST", "SUFFIX", "assign", "escape", "file_name"]

ACTIVE = "current"
LATEST = "latest"
SUFFIX = ".raw"
NAME_MAX = 255  # bytes; Linux's
NAME_ROOM = NAME_MAX - len(SUFFIX)  # so that NAME.raw fits too
_HASH_ROOM = 1 + 8  # "~" and 8 hexadecimal digits
_RESERVED = frozenset({ACTIVE, LATEST})
_PARTIAL_ESCAPE = re.compile(r"%[0-9A-F]?\Z")


class _Wish(NamedTuple):
    """What one point wants to be called."""

    raw: bytes  # the name as the image has it
    identity: bytes  # what tells equal names apart
    text: str  # `raw`, escaped and cut
    settled: bool  # nobody else may have it, whoever asks: the active state
    unnamed: bool  # the image gives no name at all


def assign(points: Sequence[Point]) -> tuple[str, ...]:
    """Return the name of each point, without ".raw", in the order of `points`.

    The same points give the same names in every mount. For any two names, {NAME, NAME.raw} are disjoint.
    """
    stems = _layer_stems(points)
    wishes = [_wish(point, stems) for point in points]
    contested = _contested(wishes)
    return _made_unique([_with_id(wish) if ask else wish.text for wish, ask in zip(wishes, contested, strict=True)])


def file_name(name: str, suffix: str) -> str:
    """Return NAME with another suffix than ".raw"; where that does not fit, cut, with a hash of all of NAME."""
    room = NAME_MAX - len(suffix)
    if len(name.encode()) <= room:
        return name + suffix
    return f"{_cut(name, room - _HASH_ROOM)}~{_hash(name.encode())}{suffix}"


def escape(raw: bytes) -> str:
    """Return `raw` as text that a file name can hold.

    "/", control characters, bytes that are not UTF-8 and "%" itself become %XX; so do the dots of "." and "..".
    """
    if raw in (b".", b".."):
        return "%2E" * len(raw)
    return "".join(_escaped(character) for character in raw.decode("utf-8", "surrogateescape"))


def _escaped(character: str) -> str:
    code = ord(character)
    # C1 controls count: some terminals obey them. The surrogates are bytes that are not UTF-8.
    if character in "/%" or code < 0x20 or 0x7F <= code < 0xA0 or 0xDC80 <= code <= 0xDCFF:
        return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
    return character


def _layer_stems(points: Iterable[Point]) -> dict[int, bytes]:
    """Map a backing layer's depth to the stem of its file name; equal stems get the depth added."""
    stems = {point.depth: _stem(point.layer.name) for point in points if point.depth > 0}
    count = Counter(stems.values())
    return {depth: b"%s#layer%d" % (stem, depth) if count[stem] > 1 else stem for depth, stem in stems.items()}


def _stem(name: str) -> bytes:
    return os.path.splitext(os.fsencode(name))[0]


def _wish(point: Point, stems: dict[int, bytes]) -> _Wish:
    if point.kind == "active":
        return _Wish(ACTIVE.encode(), b"", ACTIVE, settled=True, unnamed=False)
    if point.kind == "layer":
        raw = stems[point.depth]
        return _Wish(raw, b"layer%d" % point.depth, _fitted(_start(raw), raw), settled=False, unnamed=not raw)
    own = point.snapshot_name or b""
    raw = own if point.depth == 0 else stems[point.depth] + b"@" + own
    return _Wish(raw, point.snapshot_id or b"", _fitted(_start(raw), raw), settled=False, unnamed=not own)


def _contested(wishes: Sequence[_Wish]) -> list[bool]:
    """Tell for each wish whether it needs its id: no name, a reserved one, a group's, or another's NAME.raw."""
    count = Counter(wish.text for wish in wishes)
    stems = count.keys() | _RESERVED

    def needs_id(wish: _Wish) -> bool:
        if wish.settled:
            return False
        shadows = wish.text.endswith(SUFFIX) and wish.text.removesuffix(SUFFIX) in stems
        return wish.unnamed or shadows or wish.text in _RESERVED or count[wish.text] > 1

    return [needs_id(wish) for wish in wishes]


def _with_id(wish: _Wish) -> str:
    text = f"{_start(wish.raw)}#{_start(wish.identity)}"
    return _fitted(text, wish.raw + b"#" + wish.identity)


def _start(raw: bytes) -> str:
    """Escape as much of `raw` as a name can need: names of 65,535 bytes are legal, and there may be 65,536 of them."""
    return escape(raw[: NAME_ROOM + 4])  # so much is cut off again, with the character that may be split here


def _fitted(text: str, raw: bytes) -> str:
    """Return `text`, cut at a character if it is too long for a file name, with a hash of all of `raw`."""
    if len(text.encode()) <= NAME_ROOM:
        return text
    return f"{_cut(text, NAME_ROOM - _HASH_ROOM)}~{_hash(raw)}"


def _hash(raw: bytes) -> str:
    from hashlib import blake2b  # with OpenSSL, 10 ms, and few names are cut

    return blake2b(raw, digest_size=4).hexdigest()


def _cut(text: str, room: int) -> str:
    """Cut `text` to `room` bytes, at a character and not inside an escape ("%" is always the start of one)."""
    return _PARTIAL_ESCAPE.sub("", text.encode()[:room].decode("utf-8", "ignore"))


def _made_unique(names: Sequence[str]) -> tuple[str, ...]:
    """Give the points whose names still meet (equal ids, names made to look like numbered ones) their place."""
    count = Counter(form for name in names for form in _forms(name))
    used = {form for form in count if count[form] == 1}
    unique: list[str] = []
    for place, name in enumerate(names):
        if any(count[form] > 1 for form in _forms(name)):
            name = _last_resort(name, place, len(names), used)
            used.update(_forms(name))
        unique.append(name)
    return tuple(unique)


def _last_resort(name: str, place: int, step: int, used: set[str]) -> str:
    """Return `name` with the first free number among place, place + step, ...

    A used name ends in one number, so it is in the way of one place only: all calls together try O(step) numbers.
    """
    while True:
        mark = f"~{place}"
        candidate = _cut(name, NAME_ROOM - len(mark)) + mark
        if used.isdisjoint(_forms(candidate)):
            return candidate
        place += step


def _forms(name: str) -> tuple[str, str]:
    return name, name + SUFFIX

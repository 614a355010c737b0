"""The text in which LVM2 writes its metadata: sections, values and lists -> nested dictionaries.

Used by lvm.py. The grammar is that of lvm.conf(5) as far as LVM itself writes metadata with it. Text of a guest: its
length is capped by who reads it, its depth here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeAlias

from qcowfs import limits

__all__ = ["BadText", "Section", "Value", "parse"]

Value: TypeAlias = int | str | list[int | str]
Section: TypeAlias = "dict[str, Value | Section]"

TOKEN = re.compile(
    r"""[\s\0]+ | \#[^\n]* | (?P<string>"(?:[^"\\]++|\\.)*+") | (?P<number>[-+]?\d+(?:\.\d+)?)(?![\w.+-])
    | (?P<name>[\w.+-]+) | (?P<mark>[{}\[\]=,])""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
ESCAPED = re.compile(r"\\(.)", re.DOTALL)
DIGITS = 20  # of a number: what has 64 bits fits


class BadText(Exception):
    """The text breaks the grammar or a cap; the message says where."""


def parse(text: bytes) -> Section:
    """Return the sections and values of `text`. Of a name that is there twice the first counts, as for LVM.

    Raises:
        BadText: see there.
    """
    return _Parser(text.decode("utf-8", errors="surrogateescape")).section(depth=0)


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens = _tokens(text)

    def section(self, depth: int) -> Section:
        """Parse up to the closing brace; at depth 0 up to the end of the text."""
        if depth > limits.MAX_LVM_DEPTH:
            raise BadText("sections are nested too deep")
        found: Section = {}
        for kind, word in self._tokens:
            if kind == "mark" and word == "}" and depth:
                return found
            if kind not in ("name", "number"):
                raise BadText(f"{word!r} where a name was expected")
            found.setdefault(word, self._after_name(depth))
        if depth:
            raise BadText("a section has no end")
        return found

    def _after_name(self, depth: int) -> Value | Section:
        mark = self._next()
        if mark == ("mark", "{"):
            return self.section(depth + 1)
        if mark != ("mark", "="):
            raise BadText(f"{mark[1]!r} where = or a brace was expected")
        token = self._next()
        return self._list() if token == ("mark", "[") else _scalar(*token)

    def _list(self) -> list[int | str]:
        found: list[int | str] = []
        while (token := self._next()) != ("mark", "]"):
            if token != ("mark", ","):
                found.append(_scalar(*token))
        return found

    def _next(self) -> tuple[str, str]:
        token = next(self._tokens, None)
        if token is None:
            raise BadText("it ends too early")
        return token


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    place = 0
    while place < len(text):
        match = TOKEN.match(text, place)
        if match is None:
            raise BadText(f"{text[place]!r} at {place:#x} is no word of its language")
        place = match.end()
        if match.lastgroup is not None:
            yield match.lastgroup, match.group()


def _scalar(kind: str, word: str) -> int | str:
    if kind == "string":
        return ESCAPED.sub(r"\1", word[1:-1])
    if kind != "number":
        raise BadText(f"{word!r} where a value was expected")
    if len(word) > DIGITS:
        raise BadText("a number is too long")
    return int(word.partition(".")[0])

"""The text of a json: name as a flat table of options: {"file": {"filename": x}} and {"file.filename": x} are one.

Used by filename, which knows what the options mean. QEMU's JSON (qobject/json-lexer.c) is a little more than JSON: a
string may stand in single quotes. Whatever two parsers could read in two ways is refused. Pure; any thread.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from qcowfs import limits

__all__ = ["parse"]

# One that does not end goes on to the end of the text, and is looked at once; the parser of JSON will refuse it.
_STRING = re.compile(r""" "(?:[^"\\]|\\.)*+(?:"|\\?\Z) | '(?:[^'\\]|\\.)*+(?:'|\\?\Z) """, re.DOTALL | re.VERBOSE)
_QUOTE = re.compile(r"""\\(.)|(")""", re.DOTALL)


def parse(text: bytes) -> dict[str, Any]:
    """Return the options of `text`, a json: name without its prefix, by their dotted names.

    Raises:
        ValueError: it is no object, nests too deep, has an option twice, or holds a string that no file can be called.
    """
    import json  # 5 ms, and few names are written in it

    unicode = text.decode()
    if _depth(_STRING.sub("", unicode)) > limits.MAX_JSON_DEPTH:
        raise ValueError("nested too deep")
    tree = json.loads(_STRING.sub(lambda string: _in_double_quotes(string[0]), unicode), object_pairs_hook=_unique)
    if not isinstance(tree, dict):
        raise ValueError("it is not an object")
    return _unique([*_flat(tree)])


def _depth(brackets: str) -> int:
    """Return how deep `brackets` nest; the parser's own recursion comes later."""
    return max(accumulate((char in "{[") - (char in "}]") for char in brackets), default=0)


def _in_double_quotes(string: str) -> str:
    return '"' + _QUOTE.sub(_standard_escape, string[1:-1]) + '"'


def _standard_escape(match: re.Match[str]) -> str:
    if match[2]:
        return '\\"'
    return "'" if match[1] == "'" else match[0]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict. With a name that comes twice, readers may differ in which one they take; QEMU refuses it."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{max(names, key=names.count)} is there twice")
    return found


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        name = prefix + key
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield _whole(name), _whole(value) if isinstance(value, str) else value


def _whole(text: str) -> str:
    """Return `text` if it is text: JSON can write half of a UTF-16 pair, and NUL, which ends a C string early."""
    if "\0" in text or any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError(f"{text!a} can be no file's name")
    return text

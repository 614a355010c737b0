"""How facts are printed: tables, sizes, dates, JSON. Names from images come out escaped.

Used by the other files of this room. Pure but for what prints and writes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from qcowfs.errors import QcowfsError, printable

__all__ = [
    "counted",
    "human_size",
    "image_text",
    "local_date",
    "name_text",
    "print_json",
    "print_table",
    "utc_date",
    "write_bytes",
]

NANOSECONDS = 1_000_000_000
UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
BOLD, PLAIN = "\x1b[1m", "\x1b[0m"


def human_size(size: int | None) -> str:
    """Return `size` (bytes) as qemu-img prints sizes: three digits and a binary unit; "-" for None."""
    if size is None:
        return "-"
    exponent = max(0, min((size.bit_length() - 1) // 10, len(UNITS) - 1))
    return f"{size / (1 << 10 * exponent):.3g} {UNITS[exponent]}"


def counted(count: int, noun: str) -> str:
    """Return "1 range" or "2 ranges"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def local_date(date_ns: int) -> str:
    """Return the local time to the second; seconds after "@" if no calendar has it."""
    from datetime import datetime

    try:
        return f"{datetime.fromtimestamp(date_ns // NANOSECONDS):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):  # a guest may say the year is 300 billion
        return f"@{date_ns // NANOSECONDS}"


def utc_date(date_ns: int) -> str:
    """Return ISO 8601 in UTC with nanoseconds; seconds after "@" if no calendar has it."""
    from datetime import UTC, datetime

    seconds, nanoseconds = divmod(date_ns, NANOSECONDS)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{nanoseconds:09d}Z"
    except (ValueError, OverflowError, OSError):
        return f"@{seconds}.{nanoseconds:09d}"


def image_text(key: str, raw: bytes | None) -> dict[str, str | None]:
    """Return {key: text} for bytes of an image; with KEY_b64, the bytes themselves, if they are not UTF-8."""
    if raw is None:
        return {key: None}
    try:
        return {key: raw.decode()}
    except UnicodeDecodeError:
        import base64  # as json and datetime below: 2 to 5 ms of commands that print none

        return {key: printable(raw), f"{key}_b64": base64.b64encode(raw).decode()}


def path_text(path: str) -> str:
    """Return a path for JSON, which can hold any UTF-8: as it is, or escaped if it is not UTF-8."""
    raw = os.fsencode(path)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return printable(raw)


def name_text(raw: bytes) -> bytes:
    """Return a name of a guest for standard output: escaped on a terminal, else as it is, for programs."""
    if sys.stdout is None or not sys.stdout.isatty():
        return raw
    return printable(raw).encode(sys.stdout.encoding, "backslashreplace")


def write_bytes(data: bytes | bytearray | memoryview) -> None:
    """Write to standard output, which must get either all of its output as bytes or none.

    Raises:
        QcowfsError: it is closed.
        OSError: it takes no more.
    """
    if sys.stdout is None:
        raise QcowfsError("standard output is closed")
    sys.stdout.buffer.write(data)


def print_json(document: Any) -> None:
    """Print one JSON document."""
    import json

    print(json.dumps(document, indent=4))


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> None:
    """Print columns wide enough for their contents; those whose numbers are in `right` are set to the right."""
    widths = [max(len(row[column]) for row in (headings, *rows)) for column in range(len(headings))]
    for number, row in enumerate((headings, *rows)):
        cells = [
            text.rjust(width) if column in right else text.ljust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        line = "  ".join(cells).rstrip()
        print(f"{BOLD}{line}{PLAIN}" if number == 0 and _colour() else line)


def _colour() -> bool:
    terminal = sys.stdout is not None and sys.stdout.isatty()  # None: the caller closed descriptor 1
    return terminal and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"

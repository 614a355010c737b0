"""The names that images hold for other files: which local path does a backing or data file name mean?

Used by chain. Pure but for looking whether a candidate exists. The rules are QEMU's (block.c, path_combine and
path_has_protocol); where they differ from QEMU it is said. Any thread.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qcowfs import limits
from qcowfs.errors import CorruptImage, UnsupportedImage, printable

__all__ = ["FileName", "parse"]

LOCAL_PROTOCOLS = ("file", "host_device")
FORMATS = ("qcow2", "qcow", "raw")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileName:
    """What a name says.

    Attributes:
        path: a local path as written, relative or absolute.
        relative_to_image: False for names that QEMU resolves against the working directory.
        format: the driver that a json: name asks for, None if it asks for none.
        offset, size: the window of the raw driver, in bytes; size None: up to the end.
    """

    path: str
    relative_to_image: bool = True
    format: str | None = None
    offset: int = 0
    size: int | None = None


def parse(name: bytes, image: str) -> FileName:
    """Return what `name`, found in `image`, says.

    Raises:
        UnsupportedImage: a protocol, driver or option that is not supported.
        CorruptImage: a json: name that is not JSON, or not an object of strings and numbers.
    """
    text = os.fsdecode(name)
    if "\0" in text:
        raise CorruptImage(image, "bad file name in the image", "it holds a NUL byte")
    if text.startswith("json:"):
        return _from_json(text[len("json:") :], image)
    protocol, colon, rest = text.partition(":")
    if not colon or "/" in protocol:
        return FileName(path=text)
    if protocol not in LOCAL_PROTOCOLS:
        raise UnsupportedImage(
            image, f"it names {printable(text)}", f"the protocol {printable(protocol)} is not supported yet"
        )
    return FileName(path=rest, relative_to_image=False)


def _from_json(text: str, image: str) -> FileName:
    try:
        if _depth(text) > limits.MAX_JSON_DEPTH:
            raise ValueError("nested too deep")
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptImage(image, "bad json: name in the image", printable(str(error))) from error
    if not isinstance(tree, dict):
        raise CorruptImage(image, "bad json: name in the image", "not an object")
    return _from_options(_flat(tree), image)


def _depth(text: str) -> int:
    """An upper bound of how deep `text` nests, without recursion: brackets inside strings count too."""
    return max(text.count("{"), text.count("["))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"file": {"filename": x}} and {"file.filename": x} are the same to QEMU."""
    options: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            options |= _flat(value, f"{prefix}{key}.")
        else:
            options[prefix + key] = value
    return options


def _from_options(options: dict[str, Any], image: str) -> FileName:
    driver = options.pop("driver", None)
    if driver in LOCAL_PROTOCOLS:  # a protocol node by itself: its format is found as if it were a plain name
        options = {f"file.{key}": value for key, value in options.items()}
        driver = None
    elif driver is not None and driver not in FORMATS:
        raise _unsupported(image, f"the driver {printable(str(driver))}")
    protocol = options.pop("file.driver", "file")
    if protocol not in LOCAL_PROTOCOLS:
        raise _unsupported(image, f"the driver {printable(str(protocol))}")
    path = options.pop("file.filename", None)
    if not isinstance(path, str):
        raise CorruptImage(image, "bad json: name in the image", "no file.filename")
    offset, size = (
        _number(options.pop(key, None), key, image) if driver == "raw" else None for key in ("offset", "size")
    )
    if options:
        raise _unsupported(image, f"the option {printable(min(options))}")
    return FileName(path=path, relative_to_image=False, format=driver, offset=offset or 0, size=size)


def _number(value: Any, key: str, image: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value[:20])
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limits.MAX_VIRTUAL_SIZE:
        raise CorruptImage(image, "bad json: name in the image", f"{key} is {printable(str(value)[:40])}")
    return value


def _unsupported(image: str, what: str) -> UnsupportedImage:
    return UnsupportedImage(image, "its json: name is not supported", f"{what} is not among those that are known")

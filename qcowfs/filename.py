"""The names that images hold for other files: what does the name of a backing file or a data file say?

Used by chain. The rules are QEMU's (block.c: path_has_protocol, parse_json_filename, bdrv_open_backing_file); where
they differ from QEMU it is said. Nothing is opened or looked at here. Pure; any thread.
"""

from __future__ import annotations

import os
import re
from typing import Any

from qcowfs import limits
from qcowfs.errors import CorruptImage, UnsupportedImage, printable
from qcowfs.frozen import dataclass

__all__ = ["FORMATS", "FileName", "parse", "parse_data_file_name"]

FORMATS = ("qcow2", "qcow", "raw")
LOCAL_PROTOCOLS = ("file", "host_device")
JSON = "json:"
SECTOR = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class FileName:
    """What a name says.

    Attributes:
        path: a local path as written, relative or absolute, never empty.
        relative_to_image: False for names that QEMU resolves against the working directory.
        format: the driver that a json: name asks for, None if it asks for none.
        offset, size: the window of the raw driver, in bytes; size None: up to the end.
        alone: its own backing file is not to be opened ("backing": null).
    """

    path: str
    relative_to_image: bool = True
    format: str | None = None
    offset: int = 0
    size: int | None = None
    alone: bool = False


def parse(name: bytes, image: str) -> FileName:
    """Return what the name of a backing file, found in `image`, says.

    Raises:
        UnsupportedImage: a protocol, driver or option that is not supported.
        CorruptImage: it cannot be a name at all.
    """
    text = _text(name, image)
    if text.startswith(JSON):
        return _from_json(name[len(JSON) :], image)
    protocol = _protocol(text)
    if protocol is None:
        return FileName(path=text)
    if protocol not in LOCAL_PROTOCOLS:
        raise _unsupported(text, f"the protocol {printable(protocol)} is not supported yet", image)
    return FileName(path=_text(name.partition(b":")[2], image), relative_to_image=False)


def parse_data_file_name(name: bytes, image: str) -> FileName:
    """Return what the name of an external data file, found in `image`, says: a path, and nothing else.

    QEMU once took protocols and json: here as well, and one could name any file (CVE-2024-4467). Since then it takes
    such a name for a path. Here it is refused: nobody has a data file called "json:{...}" in good faith.

    Raises:
        UnsupportedImage: it is more than a path.
        CorruptImage: it cannot be a name at all.
    """
    text = _text(name, image)
    if _protocol(text) is not None:
        raise _unsupported(text, "a data file has a plain name, without a protocol", image)
    return FileName(path=text, relative_to_image=False)


def _text(name: bytes, image: str) -> str:
    if not name or b"\0" in name:
        raise CorruptImage(image, "bad file name in the image", "it holds a NUL byte" if name else "it is empty")
    return os.fsdecode(name)


def _protocol(text: str) -> str | None:
    """Return what stands before the first colon, None where a slash comes first (path_has_protocol)."""
    before, colon, _ = text.partition(":")
    return before if colon and "/" not in before else None


def _unsupported(text: str, why: str, image: str) -> UnsupportedImage:
    shown = re.sub(r"//[^/@]*@", "//...@", text)  # a password in a URL does not belong into a log
    return UnsupportedImage(image, f"it names {printable(shown)}", why)


def _from_json(text: bytes, image: str) -> FileName:
    try:
        from qcowfs import jsonname  # 5 ms, and few names are written in it

        options = jsonname.parse(text)
    except (ValueError, RecursionError) as error:
        raise _bad(printable(str(error)), image) from error
    return _Options(options, image).file_name()


def _bad(why: str, image: str) -> CorruptImage:
    return CorruptImage(image, "bad json: name in the image", why)


class _Options:
    """The options of a json: name, taken one after the other; what is left in the end is not supported."""

    def __init__(self, options: dict[str, Any], image: str) -> None:
        self._left = options
        self._image = image

    def file_name(self) -> FileName:
        driver = self._format()
        protocol = self._left.pop("file.driver", "file")
        if protocol not in LOCAL_PROTOCOLS:
            raise self._refused(f"the driver {printable(str(protocol))}")
        path = self._left.pop("file.filename", None)
        if not isinstance(path, str) or not path:
            raise _bad("no file.filename", self._image)
        offset, size = (self._number(key) if driver == "raw" else None for key in ("offset", "size"))
        alone = self._without_backing()
        if self._left:
            raise self._refused(f"the option {printable(min(self._left))}")
        if size is not None and size % SECTOR:
            raise _bad(f"size is {size}, a multiple of {SECTOR} was expected", self._image)
        return FileName(path=path, relative_to_image=False, format=driver, offset=offset or 0, size=size, alone=alone)

    def _format(self) -> str | None:
        """Take the driver. A protocol's driver by itself has no format above it: the bytes as they are."""
        driver = self._left.pop("driver", None)
        if driver in LOCAL_PROTOCOLS:
            self._left = {f"file.{key}": value for key, value in self._left.items()} | {"file.driver": driver}
            return "raw"
        if driver is not None and driver not in FORMATS:
            raise self._refused(f"the driver {printable(str(driver))}")
        return None if driver is None else str(driver)

    def _number(self, key: str) -> int | None:
        value = self._left.pop(key, None)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20:
            value = int(value)
        if value is None or (type(value) is int and 0 <= value <= limits.MAX_VIRTUAL_SIZE):
            return value
        raise _bad(f"{key} is {printable(str(value)[:40])}", self._image)

    def _without_backing(self) -> bool:
        """`"backing": null` is the one thing that may be said of it; another backing file may not be put in here."""
        if self._left.get("backing", ...) is None:
            del self._left["backing"]
            return True
        return False

    def _refused(self, what: str) -> UnsupportedImage:
        return UnsupportedImage(
            self._image, "its json: name is not supported", f"{what} is not among those that are known"
        )

"""The names that images hold for other files: what does the name of a backing file or a data file say?

Used by chain. The rules are QEMU's (block.c: path_has_protocol, parse_json_filename, bdrv_open_backing_file); where
they differ from QEMU it is said. Nothing is opened or looked at here. Pure; any thread.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import Any

from qcowfs import limits, remotename
from qcowfs.errors import CorruptImage, UnsupportedImage, printable
from qcowfs.source import foreignformat
from qcowfs.source.remote import SCHEMES
from qcowfs.source.url import Url, is_url, parse_url

__all__ = ["FORMATS", "FileName", "parse", "parse_data_file_name"]

FORMATS = ("qcow2", "qcow", "raw", *foreignformat.FORMATS)
LOCAL_PROTOCOLS = ("file", "host_device")
JSON = "json:"
SECTOR = 512
BACKING = "backing."


@dataclass(frozen=True, slots=True, kw_only=True)
class FileName:
    """What a name says.

    Attributes:
        path: a local path as written, relative or absolute; empty if it is a URL.
        url: where it is on a server, None if it is a path.
        relative_to_image: False for names that QEMU resolves against the working directory.
        format: the driver that a json: name asks for, None if it asks for none.
        offset, size: the window of the raw driver, in bytes; size None: up to the end.
        alone: its own backing file is not to be opened ("backing": null).
        backing: what is its backing file, whatever its header says; None: what the header says. An empty name there
            says of the header's own file how it is read.
    """

    path: str
    url: Url | None = None
    relative_to_image: bool = True
    format: str | None = None
    offset: int = 0
    size: int | None = None
    alone: bool = False
    backing: FileName | None = None

    def over(self, header: FileName) -> FileName:
        """Return what this, the name of a backing file in a json: name, makes of what the overlay's header says."""
        if self.path or self.url:
            return self
        return replace(
            self,
            path=header.path,
            url=header.url,
            relative_to_image=header.relative_to_image,
            format=self.format or header.format,
            alone=self.alone or (self.backing is None and header.alone),
            backing=self.backing or (None if self.alone else header.backing),
        )


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
    if protocol in LOCAL_PROTOCOLS:
        return FileName(path=_text(name.partition(b":")[2], image), relative_to_image=False)
    return _from_url(remotename.from_legacy(text) or text, image)


def parse_data_file_name(name: bytes, image: str) -> FileName:
    """Return what the name of an external data file, found in `image`, says: a path, or a URL.

    QEMU once took json: here as well, and one could name any file (CVE-2024-4467). Since then it takes such a name for
    a path. Here it is refused: nobody has a data file called "json:{...}" in good faith. URLs go through the gate.

    Raises:
        UnsupportedImage: it is neither.
        CorruptImage: it cannot be a name at all.
    """
    text = _text(name, image)
    if _protocol(text) is None:
        return FileName(path=text, relative_to_image=False)
    if not is_url(text) or _protocol(text) in LOCAL_PROTOCOLS:
        raise _unsupported(text, "a data file has a plain name or a URL", image)
    return _from_url(text, image)


def _text(name: bytes, image: str) -> str:
    if not name or b"\0" in name:
        raise CorruptImage(image, "bad file name in the image", "it holds a NUL byte" if name else "it is empty")
    return os.fsdecode(name)


def _protocol(text: str) -> str | None:
    """Return what stands before the first colon, None where a slash comes first (path_has_protocol)."""
    before, colon, _ = text.partition(":")
    return before if colon and "/" not in before else None


def _from_url(text: str, image: str) -> FileName:
    try:
        url = parse_url(text) if is_url(text) else None
    except ValueError as error:
        raise CorruptImage(image, "bad URL in the image", str(error)) from error
    if url is None or url.scheme not in SCHEMES:
        protocol = printable(text.partition(":")[0])
        raise _unsupported(text, f"the protocol {protocol} is not supported", image)
    return FileName(path="", url=url, relative_to_image=False)


def _unsupported(text: str, why: str, image: str) -> UnsupportedImage:
    # A password in a URL does not belong into a log.
    try:
        shown = parse_url(text).shown
    except ValueError:
        shown = re.sub(r"//[^/@]*@", "//...@", text)
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
    """The options of a json: name, taken one after the other; what is left in the end is not supported.

    Args:
        options: by their dotted names; emptied.
        prefix: of their names, for messages: they are those of a backing file.
    """

    def __init__(self, options: dict[str, Any], image: str, prefix: str = "") -> None:
        self._left = options
        self._image = image
        self._prefix = prefix

    def file_name(self) -> FileName:
        alone, backing = self._without_backing(), self._backing()
        driver = self._format()
        if backing and (alone or driver == "raw"):
            raise self._refused(f"the option {self._prefix}backing")
        offset, size = (self._number(key) if driver == "raw" else None for key in ("offset", "size"))
        where = self._place()
        if self._left:
            raise self._refused(f"the option {self._prefix}{printable(min(self._left))}")
        if size is not None and size % SECTOR:
            raise _bad(f"{self._prefix}size is {size}, a multiple of {SECTOR} was expected", self._image)
        return replace(where, format=driver, offset=offset or 0, size=size, alone=alone, backing=backing)

    def _place(self) -> FileName:
        """Take the protocol and its options: where the file is. Of a backing file its overlay may say that."""
        if self._prefix and not any(key.startswith("file.") for key in self._left):
            return FileName(path="")
        protocol = self._left.pop("file.driver", "file")
        if protocol in remotename.DRIVERS:
            options = {key: self._left.pop(key) for key in [*self._left] if key.startswith("file.")}
            options = {key.removeprefix("file."): value for key, value in options.items()}
            try:
                text = remotename.from_options(str(protocol), options)
            except ValueError as error:
                raise _bad(printable(str(error)), self._image) from error
            self._left |= {f"file.{key}": value for key, value in options.items()}
            return _from_url(text, self._image)
        if protocol not in LOCAL_PROTOCOLS:
            raise self._refused(f"the driver {printable(str(protocol))}")
        path = self._left.pop("file.filename", None)
        if not isinstance(path, str) or not path:
            raise _bad("no file.filename", self._image)
        return FileName(path=path, relative_to_image=False)

    def _format(self) -> str | None:
        """Take the driver. A protocol's driver by itself has no format above it: the bytes as they are."""
        driver = self._left.pop("driver", None)
        if driver in (*LOCAL_PROTOCOLS, *remotename.DRIVERS):
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
        """Take `"backing": null`; the name of a node of QEMU's, which it may be as well, means nothing here."""
        if self._left.get("backing", ...) is None:
            del self._left["backing"]
            return True
        return False

    def _backing(self) -> FileName | None:
        """Take the options of its backing file: QEMU writes them where that is another one than the header says."""
        if self._prefix.count(BACKING) > limits.MAX_JSON_DEPTH:
            raise _bad("nested too deep", self._image)
        options = {key: self._left.pop(key) for key in [*self._left] if key.startswith(BACKING)}
        options = {key.removeprefix(BACKING): value for key, value in options.items()}
        return _Options(options, self._image, self._prefix + BACKING).file_name() if options else None

    def _refused(self, what: str) -> UnsupportedImage:
        return UnsupportedImage(
            self._image, "its json: name is not supported", f"{what} is not among those that are known"
        )

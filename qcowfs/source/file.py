"""A file, a block device or an image on a server that was opened: its bytes, and the facts about it.

Used by chain. What may be opened is the gate's business; here a descriptor, or what a protocol's room returned, becomes
a File. Immutable but for `close`; any thread.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qcowfs._source import FileSource, SliceSource, Source
from qcowfs.errors import SourceError

if TYPE_CHECKING:
    from qcowfs.source.remote import Remote
    from qcowfs.source.url import Url

__all__ = ["File", "open_file", "remote_file"]

BLOCK = 512  # the unit of st_blocks
SECOND = 1_000_000_000  # nanoseconds
COARSE = 2.05  # seconds; FAT counts two of them, ext4 with small inodes one
TICK = 0.02  # seconds; the clock of Linux' file systems has ticks of 1 to 10 ms, and in one of them all times are equal
SETTLING = 3  # looks at a file that somebody writes all the time without a lock


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """An opened file, or a window of it.

    Attributes:
        path: the absolute name that it was opened by, symbolic links and all; of a URL what may be shown of it.
        url: where it is on a server; None: on this machine.
        source: its bytes.
        descriptor: belongs to `source`; None if it is on a server.
        identity: tells whether two names lead to the same bytes: links of both kinds, two nodes of one device.
        modified_ns: when it was last written, nanoseconds since the epoch; where nobody knows, when it was opened.
        disk_size: bytes that it takes on the host: a device all of its own, though stat(2) counts no blocks of it.
        versioned: what replaces it would be noticed.
    """

    path: str
    url: Url | None
    source: Source
    descriptor: int | None
    identity: Hashable
    modified_ns: int
    disk_size: int
    versioned: bool

    def settled(self) -> File:
        """Return this file with a time of modification that every later write will change."""
        if self.descriptor is None:
            return self
        status = os.fstat(self.descriptor)
        for _ in range(SETTLING):
            tick = TICK if status.st_mtime_ns % SECOND else COARSE
            if stat.S_ISBLK(status.st_mode) or abs(time.time() - status.st_mtime) > tick:
                break
            time.sleep(tick)
            status = os.fstat(self.descriptor)
        return replace(self, modified_ns=status.st_mtime_ns)

    def start(self, length: int) -> bytes:
        """Return the first `length` bytes, fewer if there are no more.

        Raises:
            SourceError: they cannot be read.
        """
        try:
            return self.source.read_at(0, length)
        except OSError as error:
            raise SourceError.from_oserror(self.path, "cannot read", error) from error

    def close(self) -> None:
        """Give the descriptor back, and with it its locks."""
        with suppress(OSError):
            self.source.close()


def open_file(descriptor: int, path: str, *, offset: int = 0, size: int | None = None) -> File:
    """Make a File of an open descriptor, which belongs to it from now on, also if this fails.

    Args:
        path: for messages.
        offset, size: the window, in bytes; size None: up to the end.

    Raises:
        SourceError: the window reaches past the end of the file, or the device does not tell its length.
    """
    source = FileSource(descriptor, path)
    status = os.fstat(descriptor)
    return File(
        path=path,
        url=None,
        source=_window(source, path, offset, size),
        descriptor=descriptor,
        identity=source.place(),
        modified_ns=status.st_mtime_ns,
        disk_size=_size(source, path) if stat.S_ISBLK(status.st_mode) else status.st_blocks * BLOCK,
        versioned=False,
    )


def remote_file(remote: Remote, url: Url, *, offset: int = 0, size: int | None = None) -> File:
    """Make a File of what was opened on a server; it belongs to the File from now on, also if this fails.

    Raises:
        SourceError: the window reaches past the end.
    """
    source = _window(remote.source, url.shown, offset, size)
    return File(
        path=url.shown,
        url=url,
        source=source,
        descriptor=None,
        identity=remote.source.place(),
        modified_ns=time.time_ns() if remote.modified_ns is None else remote.modified_ns,
        disk_size=_size(remote.source, url.shown) if remote.disk_size is None else remote.disk_size,
        versioned=remote.version is not None,
    )


def _size(source: Source, path: str) -> int:
    try:
        return source.size
    except OSError as error:
        source.close()
        raise SourceError.from_oserror(path, "cannot tell its length", error) from error


def _window(source: Source, path: str, offset: int, size: int | None) -> Source:
    if not offset and size is None:
        return source
    try:
        return SliceSource(source, offset, size)
    except ValueError as error:
        length = source.size
        source.close()
        why = f"which reaches past its end at {length:#x}"
        wanted = f"{offset:#x} to {'the end' if size is None else hex(offset + size)}"
        raise SourceError(path, f"cannot take the window from {wanted}", why) from error

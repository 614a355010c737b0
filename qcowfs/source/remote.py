"""Images that are not files of this machine: which room opens which URL, and what it returns.

Used by chain, through the gate. A protocol's room is imported when a URL of it is opened for the first time, and its
library with it, so that nobody needs the libraries of protocols that he does not use. Any thread.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from qcowfs import limits
from qcowfs.errors import UnsupportedImage

if TYPE_CHECKING:
    from qcowfs._source import Source
    from qcowfs.source.url import Url

__all__ = ["DEFAULT_SETTINGS", "SCHEMES", "Remote", "RemoteSettings", "open_remote"]

# The room of each scheme, in this folder.
SCHEMES = {
    "iscsi": "iscsi",
    "nbd": "nbd",
    "nbd+unix": "nbd",
    "nbds": "nbd",
    "nbds+unix": "nbd",
    "http": "objects",
    "https": "objects",
    "s3": "objects",
    "gs": "objects",
    "az": "objects",
    "rbd": "foreign",
    "ssh": "foreign",
    "nfs": "foreign",
    "gluster": "foreign",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteSettings:
    """What a person said about all remote sources.

    Attributes:
        patience: seconds that one read, or opening, waits for a server that does not answer, until it is an error.
        cache_directory: where blocks are kept from one mount to the next, None: nowhere.
        cache_directory_size: bytes that they may take there, of all images together.
    """

    patience: float = limits.DEFAULT_PATIENCE
    cache_directory: str | None = None
    cache_directory_size: int = limits.DEFAULT_CACHE_DIRECTORY


DEFAULT_SETTINGS = RemoteSettings()


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """What a protocol's room returns.

    Attributes:
        source: the bytes; its `place()` is equal for two URLs of the same bytes. Read by any number of threads at once.
        version: what another content would change (an ETag, say); None where the protocol has no such thing, so that
            what was read may be another thing later.
        modified_ns: when it was last written, nanoseconds since the epoch; None: nobody knows.
        disk_size: bytes that it takes on the server; None: nobody knows.
    """

    source: Source
    version: str | None = None
    modified_ns: int | None = None
    disk_size: int | None = None


class _Room(Protocol):
    def open_url(self, url: Url, settings: RemoteSettings) -> Remote: ...


def open_remote(url: Url, settings: RemoteSettings) -> Remote:
    """Open `url` for reading.

    Raises:
        UnsupportedImage: no protocol that is known here, or its library is not installed.
        SourceError: it is missing, not allowed, or the server does not answer.
    """
    room = SCHEMES.get(url.scheme)
    if room is None:
        raise UnsupportedImage(url.shown, f"the protocol {url.scheme}", f"one of {', '.join(SCHEMES)} was expected")
    opener: _Room = importlib.import_module(f"qcowfs.source.{room}")
    return opener.open_url(url, settings)

"""Images that are not files of this machine: which room opens which URL, and what it returns.

Used by chain, through the gate. A protocol's room is imported when a URL of it is opened for the first time, and its
library with it, so that nobody needs the libraries of protocols that he does not use. Any thread.
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from qcowfs import limits
from qcowfs.errors import UnsupportedImage, printable

if TYPE_CHECKING:
    from qcowfs._blocks import BlockCache
    from qcowfs._source import Source
    from qcowfs.source.cachedir import CacheDirectory
    from qcowfs.source.url import Url

__all__ = ["SCHEMES", "Remote", "RemoteSettings", "Remotes", "lacking_library"]

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
        confined: the URL is an image's word, and no person allowed it: it leads to no other host.
        cache_directory: where blocks are kept from one mount to the next, None: nowhere.
        cache_directory_size: bytes that they may take there, of all images together.
    """

    patience: float = limits.DEFAULT_PATIENCE
    confined: bool = False
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
        near: its protocol is one of storage networks, where the way is shorter than the time that 64 KiB take on it.
    """

    source: Source
    version: str | None = None
    modified_ns: int | None = None
    disk_size: int | None = None
    near: bool = False


def lacking_library(image: str, what: str, library: str, error: ImportError) -> UnsupportedImage:
    """Return the error for a C library that is not here, or was not when qcowfs was built."""
    if isinstance(error, ModuleNotFoundError):
        hint = f"install {library} and its headers (Debian: {library}-dev), then qcowfs again"
        return UnsupportedImage(image, what, f"qcowfs was built without {library}", hint=hint)
    return UnsupportedImage(image, what, str(error), hint=f"install {library}")


class _Room(Protocol):
    def open_url(self, url: Url, settings: RemoteSettings) -> Remote: ...


class Remotes:
    """Opens URLs, each behind a cache of blocks that all of them share. One of a process; any thread.

    Attributes:
        settings: what a person said.
    """

    def __init__(self, settings: RemoteSettings = DEFAULT_SETTINGS) -> None:
        self.settings = settings
        self._making = threading.Lock()
        self._blocks: BlockCache | None = None
        self._directory: CacheDirectory | None = None

    def open(self, url: Url, *, confined: bool = False) -> Remote:
        """Open `url` for reading; `confined`: it leads to no other host.

        Raises:
            UnsupportedImage: no protocol that is known here, or its library is not installed.
            SourceError: it is missing, not allowed, or the server does not answer.
            UsageError: the directory for blocks cannot be used.
        """
        room = SCHEMES.get(url.scheme)
        if room is None:
            why = f"one of {', '.join(SCHEMES)} was expected"
            raise UnsupportedImage(url.shown, f"the protocol {printable(url.scheme)}", why)
        opener: _Room = importlib.import_module(f"qcowfs.source.{room}")
        self._caches()  # before a server is asked: the directory may not be usable
        remote = opener.open_url(url, replace(self.settings, confined=confined))
        return replace(remote, source=self.cached(remote.source, remote.version, near=remote.near))

    def cached(self, source: Source, version: str | None = None, *, near: bool = False) -> Source:
        """Put the cache before `source`, which belongs to what is returned, and is closed if this fails.

        Raises:
            UsageError: the directory for blocks cannot be used.
        """
        from qcowfs._blocks import BlockSource  # who opens no URL does not wait for it

        try:
            blocks, directory = self._caches()
            patience = self.settings.patience
            return BlockSource(blocks, source, directory=directory, version=version, near=near, patience=patience)
        except BaseException:
            source.close()
            raise

    def _caches(self) -> tuple[BlockCache, CacheDirectory | None]:
        from qcowfs._blocks import BlockCache
        from qcowfs.source.cachedir import CacheDirectory

        with self._making:
            if self._blocks is None:
                if self.settings.cache_directory is not None:
                    self._directory = CacheDirectory(self.settings.cache_directory, self.settings.cache_directory_size)
                self._blocks = BlockCache(limits.DEFAULT_BLOCK_CACHE)
            return self._blocks, self._directory

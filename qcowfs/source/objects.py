"""Objects on web servers and in object stores: one content, held by its entity tag, read by ranges.

Used by remote. Here is what does not depend on the protocol; web and buckets ask the servers. An object is never a
mixture of two contents: every answer says which one it is of, and from the first that is another one on every read is
ESTALE. Any thread.
"""

from __future__ import annotations

import errno
import logging
import threading
from typing import TYPE_CHECKING

from qcowfs import limits
from qcowfs._pysource import PythonSource
from qcowfs.errors import SourceError
from qcowfs.source.answer import Content, Failure, Replaced, Transport
from qcowfs.source.remote import Remote
from qcowfs.source.requester import Requester

if TYPE_CHECKING:
    from qcowfs.source.remote import RemoteSettings
    from qcowfs.source.url import Url

__all__ = ["open_url"]

logger = logging.getLogger("qcowfs.source")


def open_url(url: Url, settings: RemoteSettings) -> Remote:
    """Open the object that `url` names.

    The server is asked for its first byte: a HEAD request tells the same, but the signature of a presigned URL is good
    for one method only, and not every server has HEAD.

    Raises:
        SourceError: it is missing, not allowed, empty, cannot be read in parts, or the server does not answer.
        UnsupportedImage: the library for this protocol is not installed.
    """
    try:
        transport = _transport(url, settings)
        requester = Requester(transport, settings.patience)
        try:
            content = requester.get(0, 1, None, impatient=True).content
        except BaseException:
            requester.close()
            raise
    except Failure as failure:
        error = SourceError(url.shown, "cannot open", failure.why, hint=failure.hint)
        error.errno = failure.errno
        raise error from None  # the library's own words may hold a signature
    if content.version is None:
        logger.warning(
            "%s: the server names no version of it: a change is noticed by its size or not at all", url.shown
        )
    source = _ObjectSource(url.shown, content, requester, transport.place)
    modified_ns = None if content.modified is None else int(content.modified) * 10**9
    return Remote(source=source, version=content.version, modified_ns=modified_ns)


def _transport(url: Url, settings: RemoteSettings) -> Transport:
    if url.scheme in ("http", "https"):
        from qcowfs.source.web import Web

        try:
            return Web(url, settings.patience, confined=settings.confined)
        except ValueError:
            raise Failure("http://HOST[:PORT]/PATH was expected", errno=errno.EINVAL) from None
    from qcowfs.source.buckets import open_bucket

    return open_bucket(url, settings.patience)


class _ObjectSource(PythonSource):
    """The bytes of one content of an object."""

    def __init__(self, shown: str, content: Content, requester: Requester, place: tuple[str, ...]) -> None:
        super().__init__(shown, content.size, _Reader(shown, content, requester).read, place)
        self._requester = requester

    def close(self) -> None:
        super().close()
        self._requester.close()


class _Reader:
    """Reads one content, and says once when that begins to fail and once when it works again."""

    def __init__(self, shown: str, content: Content, requester: Requester) -> None:
        self._shown = shown
        self._content = content
        self._requester = requester
        self._lock = threading.Lock()  # guards the two below; they are read without it, where an old value does no harm
        self._failing = False
        self._replaced = False

    def read(self, offset: int, view: memoryview) -> int:
        """Fill `view` from `offset` on; returns the bytes that were read, at least one.

        Raises:
            OSError: ESTALE: the object is another one now, for ever; EIO: it could not be read this time.
        """
        if self._replaced:
            raise OSError(errno.ESTALE, "replaced")
        try:
            done = self._read(offset, view[: limits.MAX_REQUEST_SIZE])
        except Failure as failure:
            self._note(failure, offset)
            raise OSError(failure.errno, failure.why) from None
        if self._failing:
            self._note_recovery()
        return done

    def _read(self, offset: int, view: memoryview) -> int:
        answer = self._requester.get(offset, len(view), self._content)
        if not self._content.is_same(answer.content):
            raise Replaced
        done = 0
        for piece in answer.pieces:
            view[done : done + len(piece)] = piece
            done += len(piece)
        return done

    def _note(self, failure: Failure, offset: int) -> None:
        with self._lock:
            known = self._replaced or (self._failing and not isinstance(failure, Replaced))
            self._replaced = self._replaced or isinstance(failure, Replaced)
            self._failing = self._failing or failure.errno == errno.EIO
        if known or failure.errno == errno.EBADF:
            return
        if self._replaced:
            logger.warning("%s: %s since it was opened: every read is an error from now on", self._shown, failure.why)
        else:
            logger.warning("%s: cannot read at %#x: %s", self._shown, offset, failure.why)

    def _note_recovery(self) -> None:
        with self._lock:
            first, self._failing = self._failing, False
        if first:
            logger.warning("%s: can be read again", self._shown)

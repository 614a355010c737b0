"""Exports of NBD servers: nbd://, nbd+unix:// and, encrypted, nbds:// and nbds+unix://, by libnbd.

Used by remote. A URL is what libnbd takes for one, but no file that it names is opened by libnbd's own word: what it
says of certificates and keys is taken out of it and looked at first. docs/decisions/0013-nbd.md has the reasons.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Hashable
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import quote, unquote

from qcowfs.errors import SourceError, printable
from qcowfs.source.lanes import in_lanes
from qcowfs.source.news import log_news
from qcowfs.source.remote import Remote, RemoteSettings, lacking_library
from qcowfs.source.url import Url

if TYPE_CHECKING:
    from qcowfs._nbd import NbdSource

__all__ = ["open_url"]

CERTIFICATES, KEYS, SOCKET = "tls-certificates", "tls-psk-file", "socket"
AUTHORITY = "ca-cert.pem"  # in a directory of certificates: who vouches for servers
PORT = 10809
LISTED = 8  # exports of a server that are told; a person reads no more


def open_url(url: Url, settings: RemoteSettings) -> Remote:
    """Open the export that `url` names.

    Raises:
        UnsupportedImage: libnbd is not installed.
        SourceError: the URL, the connection, or the export is not as it should be.
    """
    source = _connected(url, settings)
    log_news(source, _worded)
    if not source.several:
        return Remote(source=source, near=True)
    return Remote(source=in_lanes(source, lambda: _connected(url, settings), lambda other: other.facts), near=True)


def _connected(url: Url, settings: RemoteSettings) -> NbdSource:
    source = _source(url, settings)
    try:
        source.connect()
    except OSError as error:
        failure = _failure(url, source, error)
        source.close()
        raise failure from error
    except BaseException:
        source.close()
        raise
    return source


def _source(url: Url, settings: RemoteSettings) -> NbdSource:
    try:
        from qcowfs._nbd import NbdSource
    except ImportError as error:
        raise lacking_library(url.shown, f"the protocol {url.scheme}", "libnbd", error) from error
    words = url.words
    unknown = words.keys() - {SOCKET, CERTIFICATES, KEYS}
    if unknown:
        raise _wrong(url, f"{printable(min(unknown))} means nothing there")
    unix = url.scheme.endswith("+unix")
    if unix != (SOCKET in words):
        raise _wrong(url, "?socket=PATH was expected" if unix else "a socket goes with nbd+unix://")
    encrypted = url.scheme.startswith("nbds")
    certificates, keys = _credentials(url, words) if encrypted else (None, None)
    return NbdSource(
        url.shown,
        _uri(url, words),
        settings.patience,
        _place(url, words),
        tls=encrypted,
        certificates=certificates,
        keys=keys,
    )


def _wrong(url: Url, why: str) -> SourceError:
    failure = SourceError(url.shown, "not a URL of NBD", why)
    failure.errno = errno.EINVAL
    return failure


def _uri(url: Url, words: dict[str, str]) -> bytes:
    """Return the URL for libnbd, which is told of nothing local but the socket."""
    text = f"{url.scheme}://{url.authority}{url.path or '/'}"
    if SOCKET in words:
        text += f"?{SOCKET}={quote(os.path.abspath(words[SOCKET]))}"
    return os.fsencode(text)


def _place(url: Url, words: dict[str, str]) -> Hashable:
    where = os.path.realpath(words[SOCKET]) if SOCKET in words else _host_and_port(url.server)
    return "nbd", where, unquote(url.path.removeprefix("/"))


def _host_and_port(server: str) -> str:
    host, colon, port = server.lower().rpartition(":")
    return server.lower() if colon and port.isdigit() and host else f"{server.lower()}:{PORT}"


def _credentials(url: Url, words: dict[str, str]) -> tuple[bytes | None, bytes | None]:
    """Return the directory of certificates, or the file of keys, that the server is known by.

    libnbd verifies nobody where it finds neither: it falls back to the authorities of the system and does not ask them
    (CVE-2024-7383). Nor does it look at a certificate that comes through a Unix socket.
    """
    if words.get(KEYS):
        return None, _readable(url, words[KEYS])
    if url.scheme.endswith("+unix"):
        raise _wrong(url, f"over a Unix socket only ?{KEYS}=FILE tells who the server is")
    if words.get(CERTIFICATES):
        directory = os.path.abspath(words[CERTIFICATES])
        _readable(url, os.path.join(directory, AUTHORITY))
        return os.fsencode(directory), None
    for directory in _usual_places():
        if os.access(os.path.join(directory, AUTHORITY), os.R_OK):
            return os.fsencode(directory), None
    why = f"there is no {AUTHORITY} in {' or '.join(_usual_places())}"
    hint = f"?{CERTIFICATES}=DIR says where one is, ?{KEYS}=FILE where pre-shared keys are"
    raise SourceError(url.shown, "cannot tell who the server is", why, hint=hint)


def _usual_places() -> tuple[str, ...]:
    """Return libnbd's own."""
    if os.geteuid() == 0:
        return ("/etc/pki/libnbd",)
    return os.path.expanduser("~/.pki/libnbd"), os.path.expanduser("~/.config/pki/libnbd")


def _readable(url: Url, path: str) -> bytes:
    if not os.access(path, os.R_OK):
        error = OSError(errno.EACCES if os.path.exists(path) else errno.ENOENT, "")
        error.strerror = os.strerror(error.errno or 0)
        raise SourceError.from_oserror(url.shown, f"cannot read {printable(path)}", error)
    return os.fsencode(os.path.abspath(path))


def _failure(url: Url, source: NbdSource, error: OSError) -> SourceError:
    said = printable((error.strerror or "").removeprefix("handshake: ").removeprefix("connect: "))
    failure = SourceError(url.shown, "cannot open", said, hint=_hint(source, said))
    failure.errno = error.errno or errno.EIO
    return failure


def _worded(reason: str) -> str:
    """Return a reason of libnbd in words of a person."""
    library, _, said = reason.partition(": ")
    return f"the encrypted connection broke: {said}" if library.startswith("gnutls_") else reason


def _hint(source: NbdSource, said: str) -> str | None:
    if "no export named" in said:
        with suppress(OSError):
            names = source.exports(LISTED + 1)
            shown = [printable(name) or '""' for name in names[:LISTED]]
            return f"it has: {', '.join([*shown, '...'] if len(names) > LISTED else shown)}" if shown else None
    if "requires TLS" in said:
        return "nbds:// encrypts"
    if "certificate verification" in said:
        return f"{AUTHORITY} is of another authority, or the server's certificate of another name"
    return None

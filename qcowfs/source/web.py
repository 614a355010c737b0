"""Files on web servers, by ranges over HTTP/1.1.

Used by objects. Python's own client, and not the library of buckets: that one tells a signed URL to whoever it is
redirected to (Referer), drops user and password, and cannot be interrupted; docs/decisions/0016-objects.md has the
measurements. Any thread; a connection serves one request at a time.
"""

from __future__ import annotations

import contextlib
import http
import http.client
import re
import socket
import ssl
import threading
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING
from urllib.parse import urljoin

import qcowfs
from qcowfs import limits
from qcowfs.source.answer import Answer, Content, Failure, Replaced, Temporary
from qcowfs.source.webplace import Place, Proxies, parse_place

if TYPE_CHECKING:
    from qcowfs.source.url import Url

__all__ = ["Web"]

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.ASCII)
_REDIRECTIONS = frozenset((301, 302, 303, 307, 308))
_FOR_EVER = frozenset((501, 505))  # of those from 500 on, what asking again does not change
_WHY = {
    401: ("it asks for a user and a password, or those in the URL are wrong", "http://USER:PASSWORD@HOST/..."),
    403: ("access denied", "a signed URL may have expired"),
    404: ("there is no such file", None),
    410: ("there is no such file any more", None),
}
_NO_RANGES = "the server does not serve parts of it (it does not honour Range)"


class Web:
    """One file on a web server.

    Args:
        patience: seconds; a server that is silent for a third of it is asked again.
        confined: no redirection to another host is followed.

    Raises:
        ValueError: `url` is none of a web server.
    """

    def __init__(self, url: Url, patience: float, *, confined: bool = False) -> None:
        self._named = parse_place(url.text)
        self._now = self._named  # where it was last found, behind all redirections
        self._confined = confined
        self._silence = max(patience / 3, 0.1)
        self._proxies = Proxies()
        self._context: ssl.SSLContext | None = None
        self._lock = threading.Lock()  # guards the rest
        self._idle: dict[tuple[str, str, int], list[http.client.HTTPConnection]] = {}
        self._busy: set[http.client.HTTPConnection] = set()
        self._closed = False

    @property
    def place(self) -> tuple[str, ...]:
        return ("http", f"{self._named.host}:{self._named.port}", self._named.target)

    def get(self, start: int, length: int, held: Content | None, deadline: float) -> Answer:
        """Ask once; a redirection that was followed before is forgotten if it leads nowhere now (see Transport)."""
        place = self._now
        try:
            return self._follow(place, start, length, held, deadline)
        except (Replaced, Temporary):
            raise
        except Failure:
            if place == self._named:
                raise
            self._now = self._named
        return self._follow(self._named, start, length, held, deadline)

    def close(self) -> None:
        """Break all connections, also those that somebody waits at."""
        with self._lock:
            self._closed = True
            busy = list(self._busy)
            idle = [connection for connections in self._idle.values() for connection in connections]
            self._idle.clear()
        for connection in busy:  # closing it would give the number of its descriptor away while it is waited at
            if (plain := connection.sock) is not None:
                with contextlib.suppress(OSError):
                    plain.shutdown(socket.SHUT_RDWR)
        for connection in idle:
            connection.close()

    def _follow(self, place: Place, start: int, length: int, held: Content | None, deadline: float) -> Answer:
        for _ in range(limits.MAX_REDIRECTS + 1):
            found = self._ask(place, _headers(start, length, held, place, self._named), start, length, held, deadline)
            if isinstance(found, Answer):
                self._now = place
                return found
            if self._confined and found.host != self._named.host:
                hint = "--allow-backing, with the URL that is named, lets the server do that"
                raise Failure("it is redirected to another host, and no person named it", hint=hint)
            place = found
        raise Failure(f"it is redirected more than {limits.MAX_REDIRECTS} times")

    def _ask(
        self,
        place: Place,
        headers: dict[str, str],
        start: int,
        length: int,
        held: Content | None,
        deadline: float,
    ) -> Answer | Place:
        """Send one request; returns the answer, or where it leads."""
        connection = self._take(place)
        kept = False
        try:
            with self._respond(connection, place, headers, deadline) as response:
                if response.status in _REDIRECTIONS:
                    return _redirected(place, response.headers.get("Location"))
                if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                    raise _refusal(response, held)
                answer = _answer(response, start, length, deadline)
                kept = not response.will_close
                return answer
        except (OSError, http.client.HTTPException) as error:
            raise _translated(error, place) from None
        finally:
            self._give_back(connection, place, kept)

    def _respond(
        self, connection: http.client.HTTPConnection, place: Place, headers: dict[str, str], deadline: float
    ) -> http.client.HTTPResponse:
        """Send the request. A server may close a connection that was idle at any time: then on a new one."""
        target = self._proxies.target(place)
        for used in (connection.sock is not None, False):
            try:
                connection.timeout = max(0.05, min(self._silence, deadline - time.monotonic()))
                if used:
                    connection.sock.settimeout(connection.timeout)
                connection.request("GET", target, headers=headers | self._proxies.headers(place))
                return connection.getresponse()
            except (ConnectionError, http.client.BadStatusLine):
                connection.close()
                if not used or self._closed:
                    raise
        raise AssertionError("unreachable")

    def _take(self, place: Place) -> http.client.HTTPConnection:
        with self._lock:
            if self._closed:
                raise Failure("it was closed")
            idle = self._idle.get(place.origin)
            if idle:
                connection = idle.pop()
            else:
                if place.scheme == "https" and self._context is None:
                    self._context = ssl.create_default_context()
                connection = self._proxies.connection(place, self._context)
            self._busy.add(connection)
        return connection

    def _give_back(self, connection: http.client.HTTPConnection, place: Place, kept: bool) -> None:
        with self._lock:
            self._busy.discard(connection)
            if kept and not self._closed:
                self._idle.setdefault(place.origin, []).append(connection)
                return
        connection.close()


def _headers(start: int, length: int, held: Content | None, place: Place, named: Place) -> dict[str, str]:
    headers = {
        "Range": f"bytes={start}-{start + length - 1}",
        "Accept-Encoding": "identity",
        "User-Agent": f"qcowfs/{qcowfs.__version__}",
    }
    if held is not None and held.condition is not None:
        headers["If-Match"] = held.condition
    if named.authorization is not None and place.origin == named.origin:
        headers["Authorization"] = named.authorization
    return headers


def _redirected(place: Place, location: str | None) -> Place:
    try:
        found = parse_place(urljoin(place.url, location or ""))
    except ValueError:
        raise Failure("it is redirected to what is no URL") from None
    if place.scheme == "https" and found.scheme != "https":
        raise Failure("it is redirected from https to http, which is not followed")
    return found


def _refusal(response: http.client.HTTPResponse, held: Content | None) -> Failure:
    """Return what an answer without the wanted bytes means. Nothing of its body is read."""
    status = response.status
    if status == http.HTTPStatus.OK:
        return Failure(_NO_RANGES, hint="download it and open the copy")
    if status == http.HTTPStatus.PRECONDITION_FAILED and held is not None:
        return Replaced()
    if status == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return Failure("it is empty") if held is None else Replaced("it was cut")
    if status in _WHY:
        why, hint = _WHY[status]
        return Failure(why, hint=hint)
    phrase = http.client.responses.get(status, "")
    why = f"the server answered {status} {phrase}".rstrip()
    if status in (408, 429) or (500 <= status < 600 and status not in _FOR_EVER):
        return Temporary(why, after=_retry_after(response.headers.get("Retry-After")))
    return Failure(why)


def _answer(response: http.client.HTTPResponse, start: int, length: int, deadline: float) -> Answer:
    """Return the bytes of a 206, and refuse every one that is not exactly what was asked for."""
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    if found is None:
        raise _unfit(response, "the server does not say which part of it it sent (Content-Range)")
    first, last, size = (int(number) for number in found.groups())
    expected = min(length, size - start)
    if (first, last) != (start, start + expected - 1) or size > limits.MAX_HOST_OFFSET:
        raise _unfit(response, f"the server sent the bytes {first} to {last} of {size} for those from {start} on")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise Failure("the server sent it compressed, though it was asked not to (Content-Encoding)")
    if response.length not in (None, expected):
        raise _unfit(response, f"the server announced {response.length} bytes for a part of {expected}")
    body = _body(response, expected, deadline)
    modified = _date(response.headers.get("Last-Modified"))
    content = Content(size=size, etag=response.headers.get("ETag"), modified=modified)
    return Answer(content, (body,))


def _unfit(response: http.client.HTTPResponse, why: str) -> Failure:
    """Return what headers mean that do not fit: http.client takes those of an answer that was cut off for all of it."""
    return Failure(why) if response.read(1) else Temporary("the connection ended amid the headers")


def _body(response: http.client.HTTPResponse, expected: int, deadline: float) -> bytearray:
    body = bytearray(expected)
    view = memoryview(body)
    done = 0
    while done < expected:
        got = response.readinto(view[done:])
        if not got:
            raise Temporary(f"the connection ended after {done} of {expected} bytes")
        done += got
        if time.monotonic() > deadline:
            raise Temporary(f"{done} of {expected} bytes came in time")
    if response.read(1):
        raise Failure(f"the server sent more than the {expected} bytes of the part that it announced")
    return body


def _translated(error: Exception, place: Place) -> Failure:
    if isinstance(error, ssl.SSLCertVerificationError):
        return Failure(f"its certificate is not trusted: {error.verify_message}")
    if isinstance(error, ssl.SSLError):
        return Temporary(f"TLS fails: {error.reason or 'the connection broke off'}", unreachable=True)
    if isinstance(error, socket.gaierror):
        return Temporary(f"no address of {place.host} is known: {error.strerror}", unreachable=True)
    if isinstance(error, TimeoutError):
        return Temporary("the server does not answer")
    if isinstance(error, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError):
        return Temporary("the server broke the connection off")
    if isinstance(error, OSError):
        return Temporary(f"cannot connect to {place.host}: {error.strerror or 'the proxy refuses'}", unreachable=True)
    return Temporary("what the server sent is not HTTP")


def _date(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return parsedate_to_datetime(text).timestamp()
    except (ValueError, OverflowError):
        return None


def _retry_after(text: str | None) -> float:
    if text is None:
        return 0.0
    if text.isascii() and text.isdigit():
        return min(float(text), limits.MAX_PATIENCE)
    date = _date(text)
    return 0.0 if date is None else max(0.0, date - time.time())

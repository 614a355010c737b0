"""A web server of our own, for what no real one does: lie, break off, be slow, replace the file under a reader.

In the process of the test, on 127.0.0.1, a thread for each connection. How a request is answered is `server.answers`:
a list of answers, the last of which stays.
"""

from __future__ import annotations

import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["Answer", "BadServer", "Request", "serve"]

_PIECE = 1 << 16  # bytes that are written, and counted, at once
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


@dataclass(frozen=True)
class Request:
    """What a client asked for; header names in lower case."""

    method: str
    target: str
    headers: dict[str, str]


@dataclass
class Answer:
    """How to answer one request.

    Attributes:
        status: None: 206 to a range, 200 otherwise.
        headers: instead of, or besides those that an honest answer has; None takes one away.
        body: instead of the bytes that were asked for, made from them.
        ranges: False: as if the request named none.
        before: called before anything is sent; it may wait.
        reset: bytes of the body after which the connection is reset; None: never.
    """

    status: int | None = None
    headers: dict[str, str | None] = field(default_factory=dict)
    body: Callable[[bytes], bytes] = bytes
    ranges: bool = True
    before: Callable[[], object] = bool
    reset: int | None = None


class BadServer:
    """What is served, and what was asked for.

    Attributes:
        content: the bytes of the one file, whatever its name.
        answers: how the next requests are answered; the last one stays for all that follow.
        requests: what was asked for, in order.
        peak: the most requests that were being answered at once.
        sent: bytes of bodies that were written, of one request at a time.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.etag: str | None = '"first"'
        self.modified: str | None = "Sun, 29 Nov 2026 08:00:00 GMT"
        self.answers = [Answer()]
        self.requests: list[Request] = []
        self.peak = 0
        self.sent = 0
        self.port = 0
        self._busy = 0
        self._lock = threading.Lock()

    def url(self, name: str = "disk.qcow2") -> str:
        return f"http://127.0.0.1:{self.port}/{name}"

    def next_answer(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    @contextmanager
    def busy(self) -> Iterator[None]:
        with self._lock:
            self._busy += 1
            self.peak = max(self.peak, self._busy)
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1


@contextmanager
def serve(content: bytes) -> Iterator[BadServer]:
    """Serve `content` until the end of the block."""
    bad = BadServer(content)

    class Handler(_Handler):
        server_of_bad_answers = bad

    server = _Server(("127.0.0.1", 0), Handler)
    bad.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="bad-server")
    thread.start()
    try:
        yield bad
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of_bad_answers: BadServer

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def _answer(self, with_body: bool) -> None:
        bad = self.server_of_bad_answers
        with bad.busy():
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = bad.next_answer(Request(self.command, self.path, headers))
            answer.before()
            status, sent, part = self._honest(bad, answer, headers)
            body = answer.body(part)
            sent.setdefault("Content-Length", str(len(body)))
            self.send_response(answer.status or status)
            for name, value in {**sent, **answer.headers}.items():
                if value is not None:
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.flush()
            if with_body:
                self._send(body, answer)

    def _honest(self, bad: BadServer, answer: Answer, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        sent = {"Accept-Ranges": "bytes"} if answer.ranges else {}
        sent |= {name: value for name, value in (("ETag", bad.etag), ("Last-Modified", bad.modified)) if value}
        if "if-match" in headers and headers["if-match"] != bad.etag:
            return 412, {}, b""
        content = bad.content
        asked = _RANGE.fullmatch(headers.get("range", "")) if answer.ranges else None
        if asked is None:
            return 200, sent, content
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return 416, {"Content-Range": f"bytes */{len(content)}"}, b""
        return 206, sent | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, content[first : last + 1]

    def _send(self, body: bytes, answer: Answer) -> None:
        whole = memoryview(body if answer.reset is None else body[: answer.reset])
        for start in range(0, len(whole), _PIECE):
            self.wfile.write(whole[start : start + _PIECE])
            self.server_of_bad_answers.sent += len(whole[start : start + _PIECE])
        if answer.reset is not None:
            # Closing with this option set sends a reset, not an end.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True

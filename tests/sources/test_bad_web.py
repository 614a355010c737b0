"""Web servers that lie, break off, are slow, or replace the file: an error in time, and never wrong bytes."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from qcowfs import limits
from qcowfs.errors import SourceError
from qcowfs.source.objects import open_url
from qcowfs.source.remote import RemoteSettings
from qcowfs.source.url import parse_url
from tests.sources.opening import error_of, opened, refusal
from tests.support.badhttp import Answer, BadServer, serve
from tests.support.badnetwork import BadNetwork, Mood

CONTENT = random.Random(25).randbytes(300_001)
SECRET = "hunter2"


@pytest.fixture
def server() -> Iterator[BadServer]:
    with serve(CONTENT) as bad:
        yield bad


def longer(part: bytes) -> bytes:
    return part + b"!"


def shorter(part: bytes) -> bytes:
    return part[:-1]


LIES = {
    "a body that is too long": Answer(body=longer),
    "a body that is too short": Answer(body=shorter),
    "chunks that are too many": Answer(headers={"Content-Length": None, "Connection": "close"}, body=longer),
    "another range": Answer(headers={"Content-Range": "bytes 1-10/300001"}),
    "another size": Answer(headers={"Content-Range": "bytes 0-9/300000"}),
    "a range without a size": Answer(headers={"Content-Range": "bytes 0-9/*"}),
    "a range past all bounds": Answer(headers={"Content-Range": "bytes 0-9/99999999999999999999"}),
    "no range": Answer(headers={"Content-Range": None}),
    "all of it": Answer(ranges=False),
    "a compressed part": Answer(headers={"Content-Encoding": "gzip"}),
    "no file any more": Answer(status=404),
    "nothing with 204": Answer(status=204, body=lambda part: b""),
}


@pytest.mark.expect_warnings
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_a_wrong_answer_is_an_error_and_the_next_right_one_is_read(server: BadServer, lie: Answer) -> None:
    with opened(server.url()) as remote:
        server.answers = [lie, Answer()]
        asked = len(server.requests)

        assert error_of(remote.source) in ("EIO", "ESTALE")
        assert asked + 1 == len(server.requests)
        if lie.headers.get("Content-Range") != "bytes 0-9/300000":
            assert CONTENT[5:500] == remote.source.read_at(5, 495)


PASSING = {
    "a body that breaks off": Answer(reset=4),
    "a reset before the answer": Answer(reset=0, status=206),
    "500": Answer(status=500, body=lambda part: b"\xff\xfe"),
    "503": Answer(status=503),
    "429": Answer(status=429, headers={"Retry-After": "0"}),
    "408": Answer(status=408),
}


@pytest.mark.parametrize("fault", PASSING.values(), ids=PASSING.keys())
def test_what_passes_is_asked_again(server: BadServer, fault: Answer) -> None:
    with opened(server.url()) as remote:
        server.answers = [fault, fault, Answer()]

        assert CONTENT[:1000] == remote.source.read_at(0, 1000)


@pytest.mark.parametrize("reset", [False, True])
def test_an_answer_that_ends_anywhere_is_asked_for_again(server: BadServer, reset: bool) -> None:
    with BadNetwork(server.port) as network, opened(f"http://127.0.0.1:{network.port}/disk") as remote:
        for count in range(0, 400, 29):  # the headers take some 250 bytes
            before = network.ends
            with network.mood(Mood(cut=count, reset=reset, once=True)):
                assert CONTENT[5:505] == remote.source.read_at(5, 500)
            assert before + 1 == network.ends


def test_a_server_that_wants_to_be_left_alone_is(server: BadServer) -> None:
    with opened(server.url()) as remote:
        server.answers = [Answer(status=503, headers={"Retry-After": "1"}), Answer()]
        start = time.monotonic()

        assert CONTENT[:10] == remote.source.read_at(0, 10)
        assert time.monotonic() - start >= 1.0


@pytest.mark.expect_warnings
def test_longer_than_the_patience_nobody_waits(server: BadServer) -> None:
    with opened(server.url(), patience=5) as remote:
        server.answers = [Answer(status=503, headers={"Retry-After": "3600"})]
        asked = len(server.requests)

        assert "EIO" == error_of(remote.source)
        assert asked + 1 == len(server.requests)


@pytest.mark.expect_warnings
def test_a_server_that_does_not_answer_is_one_line_and_another_when_it_is_back(
    server: BadServer, caplog: pytest.LogCaptureFixture
) -> None:
    let_go = threading.Event()
    with opened(server.url(), patience=0.5) as remote:
        server.answers = [Answer(before=let_go.wait)]
        assert ["EIO", "EIO"] == [error_of(remote.source, 4096), error_of(remote.source)]
        let_go.set()
        server.answers = [Answer()]
        assert CONTENT[:10] == remote.source.read_at(0, 10)
        assert [
            f"{server.url()}: cannot read at 0x1000: the server does not answer",
            f"{server.url()}: can be read again",
        ] == [record.getMessage() for record in caplog.records]


def test_closing_lets_reads_that_wait_fail(server: BadServer) -> None:
    let_go, waiting = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        waiting.release()
        let_go.wait()

    with opened(server.url()) as remote, ThreadPoolExecutor(3) as readers:
        server.answers = [Answer(before=wait)]
        errors = [readers.submit(error_of, remote.source, place) for place in range(3)]
        for _ in errors:
            waiting.acquire()
        remote.source.close()

        assert ["EBADF"] * 3 == [error.result(timeout=10) for error in errors]
        let_go.set()


def test_reads_are_in_flight_together(server: BadServer) -> None:
    together = threading.Barrier(8)
    with opened(server.url()) as remote, ThreadPoolExecutor(8) as readers:
        server.answers = [Answer(before=together.wait)]
        parts = list(readers.map(lambda place: remote.source.read_at(place, 100), range(8)))

        assert [CONTENT[place : place + 100] for place in range(8)] == parts


def test_there_is_a_limit_to_what_is_in_flight(server: BadServer) -> None:
    server.answers = [Answer(before=lambda: time.sleep(0.01))]
    with opened(server.url()) as remote, ThreadPoolExecutor(50) as readers:
        list(readers.map(lambda place: remote.source.read_at(place, 100), range(100)))

    assert 8 <= server.peak <= limits.MAX_REQUESTS


def replace_all(server: BadServer) -> None:
    server.content, server.etag = bytes(len(CONTENT)), '"second"'


def replace_untagged(server: BadServer) -> None:
    server.content, server.modified = bytes(len(CONTENT)), "Sun, 29 Nov 2026 08:00:01 GMT"


def grow(server: BadServer) -> None:
    server.content = CONTENT + b"!"


def cut(server: BadServer) -> None:
    server.content = CONTENT[:5]


@pytest.mark.expect_warnings
@pytest.mark.parametrize(
    ("etag", "modified", "change"),
    [
        ('"first"', None, replace_all),
        ('W/"first"', "Sun, 29 Nov 2026 08:00:00 GMT", replace_all),
        ('W/"first"', "Sun, 29 Nov 2026 08:00:00 GMT", replace_untagged),
        (None, "Sun, 29 Nov 2026 08:00:00 GMT", replace_untagged),
        (None, None, grow),
        (None, None, cut),
    ],
)
def test_an_object_that_was_replaced_is_stale_for_ever(
    server: BadServer,
    etag: str | None,
    modified: str | None,
    change: Callable[[BadServer], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server.etag, server.modified = etag, modified
    with opened(server.url()) as remote:
        assert CONTENT[:10] == remote.source.read_at(0, 10)
        before = len(caplog.records)
        change(server)
        assert "ESTALE" == error_of(remote.source, 100)
        server.content, server.etag, server.modified = CONTENT, etag, modified

        assert "ESTALE" == error_of(remote.source, 100)
        logged = [record.getMessage() for record in caplog.records[before:]]
        assert 1 == len(logged)
        assert logged[0].endswith(" since it was opened: every read is an error from now on")


@pytest.mark.expect_warnings
def test_versions_are_what_names_the_bytes_also_later(server: BadServer) -> None:
    found = []
    for etag, modified in (
        ('"first"', None),
        ('W/"first"', "Sun, 29 Nov 2026 08:00:00 GMT"),
        (None, "Sun, 29 Nov 2026 08:00:00 GMT"),
        (None, "yesterday"),
        (None, None),
    ):
        server.etag, server.modified = etag, modified
        with opened(server.url()) as remote:
            found.append((remote.version, remote.modified_ns))

    date = 1795939200
    assert [
        ('"first"', None),
        (None, date * 10**9),
        (f"{date} 300001", date * 10**9),
        (None, None),
        (None, None),
    ] == found


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (Answer(ranges=False), "the server does not serve parts of it (it does not honour Range)"),
        (Answer(status=404), "there is no such file"),
        (Answer(status=403), "access denied"),
        (Answer(status=401), "it asks for a user and a password, or those in the URL are wrong"),
        (Answer(status=400, body=lambda part: b"<p>" + SECRET.encode()), "the server answered 400 Bad Request"),
        (Answer(status=412), "the server answered 412 Precondition Failed"),
        (Answer(status=302, headers={"Location": "/again"}), "it is redirected more than 5 times"),
        (Answer(status=302), "it is redirected more than 5 times"),
        (Answer(status=302, headers={"Location": "file:///etc/passwd"}), "it is redirected to what is no URL"),
        (Answer(status=302, headers={"Location": "http://[bad/"}), "it is redirected to what is no URL"),
    ],
)
def test_what_cannot_be_opened_says_why_without_a_secret(server: BadServer, answer: Answer, why: str) -> None:
    server.answers = [answer]

    message = refusal(server.url(f"disk.qcow2?X-Amz-Signature={SECRET}"))
    assert f"{server.url()}?X-Amz-Signature=...: cannot open: {why}" == message
    assert len(server.requests) <= limits.MAX_REDIRECTS + 1


def test_nothing_is_downloaded_whole_to_find_that_out() -> None:
    with serve(bytes(200 << 20)) as server:
        server.answers = [Answer(ranges=False)]
        refusal(server.url())

    assert server.sent < 20 << 20  # what the kernel took before the client closed the connection


def test_an_empty_file_is_no_image() -> None:
    with serve(b"") as server:
        assert f"{server.url()}: cannot open: it is empty" == refusal(server.url())


def test_only_ranged_requests_with_get_are_sent(server: BadServer) -> None:
    with opened(server.url("a?signature=1")) as remote:
        remote.source.read_at(7, 10)

    assert [("GET", "bytes=0-0"), ("GET", "bytes=7-16")] == [
        (request.method, request.headers["range"]) for request in server.requests
    ]
    assert {"/a?signature=1"} == {request.target for request in server.requests}
    assert ["identity"] * 2 == [request.headers["accept-encoding"] for request in server.requests]
    assert '"first"' == server.requests[1].headers["if-match"]


def test_user_and_password_go_to_the_named_server_and_no_other(server: BadServer) -> None:
    with serve(CONTENT) as other:
        server.answers = [Answer(status=302, headers={"Location": other.url("moved")})]
        url = server.url("disk.qcow2?key=1").replace("//", f"//user:{SECRET}@")
        with opened(url) as remote:
            assert CONTENT[:10] == remote.source.read_at(0, 10)
            assert SECRET not in f"{remote.source.name} {remote.source.place()}"

    assert ["Basic dXNlcjpodW50ZXIy"] == [request.headers.get("authorization") for request in server.requests]
    assert {"/moved"} == {request.target for request in other.requests}
    assert not {"authorization", "referer", "cookie"} & {name for one in other.requests for name in one.headers}


def test_what_an_image_names_leads_to_no_other_host(server: BadServer) -> None:
    """A server may be trusted for its own files, and not for what it makes us ask of others (169.254.169.254)."""
    settings = RemoteSettings(patience=5, confined=True)
    with serve(CONTENT) as other:
        server.answers = [Answer(status=302, headers={"Location": other.url("x").replace("127.0.0.1", "localhost")})]
        with pytest.raises(SourceError, match="it is redirected to another host, and no person named it"):
            open_url(parse_url(server.url()), settings)

        assert [] == other.requests
        server.answers = [Answer(status=302, headers={"Location": other.url("x")})]
        open_url(parse_url(server.url()), settings).source.close()


@pytest.mark.parametrize("url", ["http://", "http://h:99999/x", "http://h:hunter2/x", "https:///x"])
def test_a_url_without_a_server_is_told_in_one_line(url: str) -> None:
    assert refusal(url).endswith("cannot open: http://HOST[:PORT]/PATH was expected")


def test_a_redirection_that_ends_is_asked_for_again(server: BadServer) -> None:
    with serve(CONTENT) as other:
        server.answers = [Answer(status=302, headers={"Location": other.url("signed-for-an-hour")})]
        with opened(server.url()) as remote:
            assert CONTENT[:10] == remote.source.read_at(0, 10)
            asked = len(server.requests)
            other.answers = [Answer(status=403), Answer()]

            assert CONTENT[:10] == remote.source.read_at(0, 10)
            assert asked + 1 == len(server.requests)


def test_a_server_that_nobody_runs_is_told_at_once() -> None:
    with serve(b"x") as server:
        url = server.url()

    assert f"{url}: cannot open: cannot connect to 127.0.0.1: Connection refused" == refusal(url)


def test_names_are_sent_as_they_are_written(server: BadServer) -> None:
    with opened(server.url("a%20b/ü;x?y=%2F%zz&q")):
        pass

    assert "/a%20b/%C3%BC;x?y=%2F%zz&q" == server.requests[0].target


def test_a_proxy_of_the_environment_is_used(server: BadServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:{SECRET}@127.0.0.1:{server.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    with opened("http://images.invalid/disk.qcow2") as remote:
        assert CONTENT[:10] == remote.source.read_at(0, 10)

    assert "http://images.invalid/disk.qcow2" == server.requests[0].target
    assert "Basic bWU6aHVudGVyMg==" == server.requests[0].headers["proxy-authorization"]

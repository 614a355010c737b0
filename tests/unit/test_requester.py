"""Requests to object stores: asked again while that may help, given up in time, never more than there may be."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from qcowfs import limits
from qcowfs.source import requester as requester_module
from qcowfs.source.answer import Answer, Content, Failure, Replaced, Temporary
from qcowfs.source.requester import Requester

CONTENT = Content(size=100, etag='"1"')
ANSWER = Answer(CONTENT, (b"x",))


class FakeTransport:
    """Does with each request what a list says: fails, answers, or calls something."""

    place = ("fake",)

    def __init__(self, *outcomes: Failure | Answer | Callable[[], object]) -> None:
        self.outcomes = list(outcomes)
        self.asked = 0
        self.closed = False

    def get(self, start: int, length: int, held: Content | None, deadline: float) -> Answer:
        self.asked += 1
        outcome = self.outcomes.pop(0) if self.outcomes else ANSWER
        if isinstance(outcome, Failure):
            raise outcome
        if callable(outcome):
            outcome()
        return ANSWER

    def close(self) -> None:
        self.closed = True


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requester_module, "FIRST_PAUSE", 0.001)


@pytest.fixture
def made() -> Iterator[Callable[..., tuple[FakeTransport, Requester]]]:
    requesters: list[Requester] = []

    def make(
        *outcomes: Failure | Answer | Callable[[], object], patience: float = 20.0
    ) -> tuple[FakeTransport, Requester]:
        transport = FakeTransport(*outcomes)
        requesters.append(Requester(transport, patience))
        return transport, requesters[-1]

    yield make
    for requester in requesters:
        requester.close()


Maker = Callable[..., tuple[FakeTransport, Requester]]


def test_what_may_pass_is_asked_again_until_there_is_an_answer(made: Maker) -> None:
    transport, requester = made(*[Temporary("busy")] * 5)

    assert ANSWER is requester.get(0, 1, CONTENT)
    assert 6 == transport.asked


@pytest.mark.parametrize("failure", [Failure("no"), Replaced()])
def test_what_does_not_pass_is_asked_once(made: Maker, failure: Failure) -> None:
    transport, requester = made(failure)
    with pytest.raises(Failure) as caught:
        requester.get(0, 1, CONTENT)

    assert caught.value is failure
    assert 1 == transport.asked


def test_who_opens_does_not_wait_for_a_server_that_nobody_runs(made: Maker) -> None:
    transport, requester = made(Temporary("refused", unreachable=True), Temporary("busy"))
    with pytest.raises(Temporary, match="refused"):
        requester.get(0, 1, None, impatient=True)

    assert 1 == transport.asked
    assert ANSWER is requester.get(0, 1, None, impatient=True)  # a server that is busy is there


def test_who_reads_waits_for_a_server_that_comes_back(made: Maker) -> None:
    _, requester = made(Temporary("refused", unreachable=True))

    assert ANSWER is requester.get(0, 1, CONTENT)


def test_the_reason_for_giving_up_is_the_last_one(made: Maker) -> None:
    transport, requester = made(Temporary("busy", after=100.0), patience=1.0)
    with pytest.raises(Temporary, match="busy"):
        requester.get(0, 1, CONTENT)

    assert 1 == transport.asked


def test_an_answer_that_does_not_come_is_not_waited_for(made: Maker) -> None:
    let_go = threading.Event()
    _, requester = made(let_go.wait, patience=0.1)
    with pytest.raises(Failure, match=r"no answer within 0\.1 seconds"):
        requester.get(0, 1, CONTENT)
    let_go.set()

    assert ANSWER is requester.get(0, 1, CONTENT)


def test_a_mistake_of_ours_reaches_the_reader(made: Maker) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    _, requester = made(fail)
    with pytest.raises(ZeroDivisionError):
        requester.get(0, 1, CONTENT)

    assert ANSWER is requester.get(0, 1, CONTENT)


def test_closing_ends_what_waits_and_what_pauses(made: Maker) -> None:
    let_go, asked = threading.Event(), threading.Semaphore(0)

    def wait() -> None:
        asked.release()
        let_go.wait()

    transport, requester = made(wait, wait)
    with ThreadPoolExecutor(2) as readers:
        waiting = [readers.submit(requester.get, 0, 1, CONTENT) for _ in range(2)]
        for _ in waiting:
            asked.acquire()
        start = time.monotonic()
        threading.Timer(0.1, let_go.set).start()
        requester.close()

        assert [errno.EBADF] * 2 == [one.exception().errno for one in waiting]  # type: ignore[union-attr]
        assert time.monotonic() - start < 10
    assert transport.closed
    with pytest.raises(Failure, match="closed"):
        requester.get(0, 1, CONTENT)


def test_threads_are_as_many_as_are_needed_and_allowed(made: Maker) -> None:
    _, requester = made()
    before = threading.active_count()
    for _ in range(20):
        requester.get(0, 1, CONTENT)
    assert before + 1 == threading.active_count()

    transport, many = made(*[lambda: time.sleep(0.01)] * 200)
    with ThreadPoolExecutor(60) as readers:
        list(readers.map(lambda place: many.get(place, 1, CONTENT), range(200)))
        named = [thread for thread in threading.enumerate() if thread.name == "qcowfs-request"]
    assert 200 == transport.asked
    assert 8 <= len(named) <= limits.MAX_REQUESTS + 1


@pytest.mark.parametrize(
    ("other", "same"),
    [
        ({}, True),
        ({"modified": 2.0}, True),  # mirrors of one file keep its tag, and seldom its date
        ({"etag": '"2"'}, False),
        ({"etag": None}, False),
        ({"size": 101}, False),
        ({"generation": "7"}, False),
    ],
)
def test_a_strong_tag_and_the_size_tell_contents_apart(other: dict[str, object], same: bool) -> None:
    facts: dict[str, object] = {"size": 100, "etag": '"1"', "modified": 1.0, "generation": None}
    held, found = Content(**facts), Content(**(facts | other))  # type: ignore[arg-type]

    assert same is held.is_same(found)


@pytest.mark.parametrize("etag", [None, 'W/"1"'])
def test_without_a_strong_tag_the_date_counts_too(etag: str | None) -> None:
    held = Content(size=100, etag=etag, modified=1.0)

    assert held.is_same(Content(size=100, etag=etag, modified=1.0))
    assert not held.is_same(Content(size=100, etag=etag, modified=2.0))
    assert not held.is_same(Content(size=100, etag=etag))
    assert held.condition is None

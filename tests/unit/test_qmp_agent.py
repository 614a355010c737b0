"""The guest agent: finding it among what others left, and thawing whatever happens.

The agent here is a stand-in that speaks the protocol: the real one freezes file systems (tests/e2e/test_quiesce.py).
"""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from qcowfs import limits
from qcowfs.errors import MonitorError
from qcowfs.qmp import agent as agent_module
from qcowfs.qmp.address import Address
from qcowfs.qmp.agent import Agent, frozen
from tests.support.monitors import server

FREEZE, THAW, STATUS = "guest-fsfreeze-freeze", "guest-fsfreeze-thaw", "guest-fsfreeze-status"


class StandIn:
    """An agent of a guest with two file systems; its answers can be set.

    Attributes:
        is_frozen: whether they are frozen.
        asked: the commands that came, but for those that synchronize.
        answers: commands that are not answered as usual: an answer, or None for none at all.
        leftovers: bytes that an earlier client has not read.
    """

    def __init__(self) -> None:
        self.is_frozen = False
        self.asked: list[str] = []
        self.answers: dict[str, Any] = {}
        self.leftovers = b""

    def __call__(self, connection: socket.socket) -> None:
        connection.sendall(self.leftovers)
        for line in connection.makefile("rb"):
            command = json.loads(line.lstrip(b"\xff"))
            if command["execute"] == "guest-sync-delimited":
                self._say(connection, {"return": command["arguments"]["id"]}, b"\xff")
                continue
            self.asked.append(command["execute"])
            answer = self._usual(command["execute"])
            if self.answers.get(command["execute"], answer) is not None:
                self._say(connection, self.answers.get(command["execute"], answer))

    def _usual(self, command: str) -> dict[str, Any]:
        if command in (FREEZE, THAW):
            self.is_frozen = command == FREEZE
            return {"return": 2}
        return {"return": "frozen" if self.is_frozen else "thawed"}

    @staticmethod
    def _say(connection: socket.socket, answer: Any, before: bytes = b"") -> None:
        connection.sendall(before + json.dumps(answer).encode() + b"\n")


@pytest.fixture
def guest() -> StandIn:
    return StandIn()


@pytest.fixture
def address(
    guest: StandIn, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Address]:
    """Return where `guest` listens; nobody waits long for it."""
    monkeypatch.setattr(limits, "FREEZE_SECONDS", 0.3)
    place = tmp_path_factory.mktemp("v") / "s"
    with server(place, *[guest] * (1 + agent_module.THAW_ATTEMPTS)):
        yield Address(path=str(place))


@pytest.fixture(autouse=True)
def _handlers_stay() -> Iterator[None]:
    before = [signal.getsignal(number) for number in agent_module.SIGNALS]
    yield
    assert before == [signal.getsignal(number) for number in agent_module.SIGNALS]


def test_the_guest_is_frozen_meanwhile_and_thawed_afterwards(guest: StandIn, address: Address) -> None:
    with frozen(address) as count:
        meanwhile = guest.is_frozen

    assert (2, True, False) == (count, meanwhile, guest.is_frozen)
    assert [STATUS, FREEZE, THAW, STATUS] == guest.asked


@pytest.mark.parametrize(
    "leftovers",
    [
        b'{"return": 7}\n',
        b'"thawed"}\n{"return": {}}\n',
        b'{"return": "half of an',
        b'\xff{"return": 4711}\n',
        b"not JSON at all\n\xff\xff\n",
        b"[" * 10_000 + b"\n",
    ],
)
def test_what_was_left_for_an_earlier_client_is_skipped(guest: StandIn, address: Address, leftovers: bytes) -> None:
    guest.leftovers = leftovers

    with Agent(address) as agent:
        assert "thawed" == agent.execute(STATUS, 5)


@pytest.mark.parametrize("number", agent_module.SIGNALS)
def test_a_signal_ends_it_and_the_guest_is_thawed(guest: StandIn, address: Address, number: signal.Signals) -> None:
    with pytest.raises(KeyboardInterrupt), frozen(address):
        os.kill(os.getpid(), number)
        signal.sigtimedwait([], 5)

    assert not guest.is_frozen


def test_an_error_meanwhile_is_the_error_and_the_guest_is_thawed(guest: StandIn, address: Address) -> None:
    with pytest.raises(ZeroDivisionError), frozen(address):
        raise ZeroDivisionError

    assert not guest.is_frozen


def test_a_freeze_that_takes_too_long_is_thawed_by_a_new_connection(guest: StandIn, address: Address) -> None:
    """The answer that comes too late would be taken for the answer of the next command."""
    guest.answers = {FREEZE: None}

    with pytest.raises(MonitorError, match="no guest agent answers"), frozen(address):
        pytest.fail("not reached")

    assert not guest.is_frozen


def test_a_guest_that_cannot_be_thawed_is_told_loudly(guest: StandIn, address: Address) -> None:
    guest.answers = {THAW: {"error": {"desc": "no"}}}

    with pytest.raises(MonitorError, match="MAY STILL BE FROZEN") as caught, frozen(address):
        pass

    assert "guest-fsfreeze-thaw" in (caught.value.hint or "")
    assert agent_module.THAW_ATTEMPTS == guest.asked.count(THAW)


def test_a_guest_that_somebody_else_has_frozen_is_left_alone(guest: StandIn, address: Address) -> None:
    guest.is_frozen = True

    with pytest.raises(MonitorError, match="somebody else has frozen"), frozen(address):
        pytest.fail("not reached")

    assert [STATUS] == guest.asked


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            {"error": {"class": "GenericError", "desc": "disabled\nhere"}},
            "refuses guest-fsfreeze-freeze: disabled here",
        ),
        ({"error": 7}, "refuses guest-fsfreeze-freeze: None"),
        ({"return": 0}, "the guest agent has frozen no file system"),
        ({"return": "2"}, "the guest agent has frozen no file system"),
        ([], "the guest agent's answer is no object"),
    ],
)
def test_an_agent_that_does_not_freeze_is_told_in_one_line(
    guest: StandIn, address: Address, answer: Any, told: str
) -> None:
    guest.answers = {FREEZE: answer}

    with pytest.raises(MonitorError) as caught, frozen(address):
        pytest.fail("not reached")

    assert str(caught.value).endswith(told)
    assert not guest.is_frozen


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        (None, "no guest agent answers"),
        (b"", "the connection to the guest agent was closed"),
        (b"x" * (1 << 16), "the guest agent's answer does not end"),
    ],
)
def test_a_server_that_is_no_agent_is_told_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, sent: bytes | None, told: str
) -> None:
    monkeypatch.setattr(limits, "MAX_AGENT_MESSAGE", 1 << 10)
    place = tmp_path_factory.mktemp("v") / "s"

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        if sent is None:
            connection.recv(1)
        else:
            connection.sendall(sent)

    with server(place, serve), pytest.raises(MonitorError) as caught:
        Agent(Address(path=str(place)), seconds=0.3)

    assert f"{place}: {told}" == str(caught.value)

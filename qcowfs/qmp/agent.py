"""The guest agent: asking a guest to write out its file systems and hold still while a snapshot is taken.

Used by `qcowfs snapshot`. The words are those of QEMU's guest agent reference. Not by way of qemu.qmp: what a client
before us left half sent or unread can only be skipped with guest-sync-delimited, whose mark is no JSON. The main
thread only, for its signals.
"""

from __future__ import annotations

import json
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

from qcowfs import limits
from qcowfs.errors import MonitorError, printable
from qcowfs.qmp.address import Address, connect

__all__ = ["Agent", "frozen"]

MARK = b"\xff"  # guest-sync-delimited: cannot be in UTF-8, so it ends whatever was there before
THAWED = "thawed"
THAW_ATTEMPTS = 3
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MAX_WORDS = 300  # characters of what an agent says that reach a person


class Agent:
    """A connection to a guest agent that has answered; use it in a `with`.

    Args:
        address: of its socket on the host.
        seconds: that it may take to answer that it is there.

    Raises:
        MonitorError: nobody listens, or no agent answers: it does not run, or the guest hangs.
    """

    def __init__(self, address: Address, *, seconds: float = limits.AGENT_SECONDS) -> None:
        self.address = address
        self._pending = b""
        self._connection = connect(address, seconds)
        try:
            self._synchronize(seconds)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Agent:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()

    def execute(self, command: str, seconds: float) -> Any:
        """Run a command and return what it returns.

        Raises:
            MonitorError: the agent refuses, and in which words; or it does not answer, or is gone.
        """
        deadline = time.monotonic() + seconds
        self._send({"execute": command}, deadline)
        answer = self._parsed(self._line(deadline))
        if "return" not in answer:
            raise self._failed(f"the guest agent refuses {command}: {_words(answer)}")
        return answer["return"]

    def _synchronize(self, seconds: float) -> None:
        """Skip all that the agent still had to say to somebody else."""
        deadline = time.monotonic() + seconds
        number = secrets.randbelow(1 << 31)
        self._send({"execute": "guest-sync-delimited", "arguments": {"id": number}}, deadline, before=MARK)
        answered = False
        while not answered:
            line = self._line(deadline)
            with suppress(MonitorError):  # what another one's answer was cut to
                answered = MARK in line and self._parsed(line.rpartition(MARK)[2]).get("return") == number

    def _send(self, command: dict[str, Any], deadline: float, before: bytes = b"") -> None:
        self._connection.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            self._connection.sendall(before + json.dumps(command).encode() + b"\n")
        except OSError as error:
            raise self._failed(f"the guest agent cannot be asked: {error.strerror or error}") from error

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._pending:
            self._pending += self._some_bytes(deadline)
            if len(self._pending) > limits.MAX_AGENT_MESSAGE:
                raise self._failed("the guest agent's answer does not end")
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _some_bytes(self, deadline: float) -> bytes:
        left = deadline - time.monotonic()
        if left <= 0:  # it talks, and all the time of something else
            raise self._failed("no guest agent answers")
        self._connection.settimeout(left)
        try:
            data = self._connection.recv(65536)
        except TimeoutError as error:
            raise self._failed("no guest agent answers") from error
        except OSError as error:
            raise self._failed(f"the connection to the guest agent broke: {error.strerror or error}") from error
        if not data:
            raise self._failed("the connection to the guest agent was closed")
        return data

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._failed("the guest agent's answer is no JSON") from error
        if not isinstance(answer, dict):
            raise self._failed("the guest agent's answer is no object")
        return answer

    def _failed(self, what: str) -> MonitorError:
        return MonitorError(self.address.shown, what)


def _words(answer: dict[str, Any]) -> str:
    """Return what the agent says of a failure, in one line."""
    error = answer.get("error")
    said = error.get("desc") if isinstance(error, dict) else None
    return printable(" ".join(str(said).split())[:MAX_WORDS])


@contextmanager
def frozen(address: Address) -> Iterator[int]:
    """Freeze the guest's file systems for the `with`, and thaw them at its end, whatever happens in it.

    Yields how many were frozen. A signal that asks this process to end raises KeyboardInterrupt, once; further ones
    wait until the guest is thawed.

    Raises:
        MonitorError: no agent answers or it refuses, somebody else has frozen the guest, or thawing fails.
    """
    with _one_interrupt(), Agent(address) as agent:
        if agent.execute("guest-fsfreeze-status", limits.AGENT_SECONDS) != THAWED:
            raise MonitorError(address.shown, "somebody else has frozen the guest's file systems already")
        try:
            try:
                count = agent.execute("guest-fsfreeze-freeze", limits.FREEZE_SECONDS)
                if type(count) is not int or count < 1:
                    raise MonitorError(address.shown, "the guest agent has frozen no file system")
                yield count
            finally:
                _ignore_signals()  # the one interrupt may come here, and thawing is done all the same
        finally:
            _thaw(agent)


def _thaw(agent: Agent) -> None:
    """Thaw, and see that it is done; by a new connection where the old one is out of step."""
    failure: MonitorError | None = None
    for attempt in range(THAW_ATTEMPTS):
        try:
            with agent if attempt == 0 else Agent(agent.address, seconds=limits.FREEZE_SECONDS) as current:
                current.execute("guest-fsfreeze-thaw", limits.FREEZE_SECONDS)
                if current.execute("guest-fsfreeze-status", limits.AGENT_SECONDS) == THAWED:
                    return
        except MonitorError as error:
            failure = error
    hint = "guest-fsfreeze-thaw of the agent thaws them, or 'virsh domfsthaw'; a reset of the machine does, too"
    raise MonitorError(agent.address.shown, "THE GUEST'S FILE SYSTEMS MAY STILL BE FROZEN", hint=hint) from failure


@contextmanager
def _one_interrupt() -> Iterator[None]:
    """Let the first signal raise KeyboardInterrupt, so that what was begun is ended, and no second one break that."""
    before = [(number, signal.getsignal(number)) for number in SIGNALS]
    try:
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, _interrupted)
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _interrupted(number: int, frame: FrameType | None) -> NoReturn:
    _ignore_signals()
    raise KeyboardInterrupt


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

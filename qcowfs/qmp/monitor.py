"""A connection to the monitor of a running QEMU: its commands and events, without the event loop of the library.

Used by the other files of this room and by the command line. The protocol is the business of qemu.qmp, QEMU's own
library; docs/decisions/0015-qmp.md says why it is used, and how. A Monitor belongs to the thread that made it.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import socket
from collections.abc import Coroutine
from contextlib import suppress
from types import ModuleType, TracebackType
from typing import Any, TypeVar

from qcowfs import limits
from qcowfs.errors import MonitorError, printable
from qcowfs.qmp.address import Address, connect, process_behind

__all__ = ["Monitor"]

Answer = TypeVar("Answer")

# Jobs and what ends them change chains. None tells of a snapshot: QEMU has no event for it.
CHAIN_EVENTS = ("BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED", "JOB_STATUS_CHANGE", "SHUTDOWN")
LIBRARY = "qemu.qmp"
MISSING = "pip install 'qcowfs[qmp]' brings it"
HELD = "another program (libvirt?) holds this monitor, or it is none: no greeting comes"
HELD_HINT = "QEMU's option -qmp can be given a second time, with a socket of its own: two programs cannot share one"
MAX_WORDS = 300  # characters of what QEMU says that reach a person


class Monitor:
    """One connection, greeted and ready for commands; use it in a `with`.

    Args:
        address: where QEMU listens.
        seconds: that connecting, and each command, may take.

    Attributes:
        address: as given.
        process: the id of the process at the other end, None where nobody can tell.

    Raises:
        MonitorError: the library is missing, nobody listens, or what is there is no monitor that is free.
    """

    def __init__(self, address: Address, *, seconds: float = limits.MONITOR_SECONDS) -> None:
        self.address = address
        self._seconds = seconds
        self._library = _library()
        connection = connect(address, seconds)
        self.process = process_behind(connection)
        self._runner = asyncio.Runner()
        self._client: Any = None
        self._listener: Any = None
        try:
            self._run(self._start(connection))
        except BaseException as error:
            connection.close()
            self.close()
            if isinstance(error, TimeoutError):
                raise MonitorError(address.shown, HELD, hint=HELD_HINT) from error
            raise

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect, so that the next who wants this monitor gets it."""
        if self._client is not None:
            with suppress(TimeoutError, MonitorError):  # whoever used the connection has heard
                self._run(asyncio.wait_for(self._client.disconnect(), self._seconds))
        self._runner.close()

    def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and return what it returns. A "_" in an argument's name stands for QMP's "-".

        Raises:
            MonitorError: QEMU refuses, and in which words; or it does not answer, or is gone.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return self._run(self._execute(command, named))
        except TimeoutError as error:
            told = f"QEMU does not answer {command} within {self._seconds:g} seconds"
            raise MonitorError(self.address.shown, told) from error

    def wait(self, seconds: float) -> bool:
        """Wait for an event of those that may tell of another chain; False if none comes within `seconds`.

        Several that came since the last time are one: a job tells of many states, and one look at the chain is enough.
        That the connection is gone is told by the next command.
        """
        try:
            self._run(asyncio.wait_for(self._listener.get(), seconds))
        except TimeoutError:
            return False
        return True

    async def _start(self, connection: socket.socket) -> None:
        # The client has locks of its event loop, so it is made in it.
        self._client = self._library.QMPClient("qcowfs", readbuflen=limits.MAX_MONITOR_MESSAGE)
        self._listener = self._client.events  # as it is, it keeps all events until they are taken
        self._listener.names = set(CHAIN_EVENTS)
        self._listener.event_filter = lambda event: self._listener.empty()
        await asyncio.wait_for(self._client.connect(connection), self._seconds)

    async def _execute(self, command: str, arguments: dict[str, object]) -> Any:
        return await asyncio.wait_for(self._client.execute(command, arguments), self._seconds)

    def _run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """Run `work`; TimeoutError passes, everything else that the library raises becomes one line."""
        try:
            return self._runner.run(work)
        except TimeoutError:
            raise
        except self._library.ExecuteError as error:
            raise MonitorError(self.address.shown, f"QEMU refuses: {_words(error)}") from error
        except self._library.ConnectError as error:
            told = f"what is there does not speak as a monitor does: {_words(error.exc)}"
            raise MonitorError(self.address.shown, told) from error
        except Exception as error:  # who sends an id that is a list makes the library raise what no QEMU makes it raise
            raise MonitorError(self.address.shown, f"the connection is gone: {_words(error)}") from error


def _library() -> ModuleType:
    """Return qemu.qmp, which takes 0.1 s to import: nothing but a monitor has to wait for it.

    It logs each error that it also raises, and where nobody has configured its logger that reaches the terminal.
    """
    try:
        library = importlib.import_module(LIBRARY)
    except ImportError as error:
        raise MonitorError("--qmp", f"the library {LIBRARY} cannot be imported: {error}", hint=MISSING) from error
    logging.getLogger(LIBRARY).setLevel(logging.CRITICAL + 1)
    return library


def _words(error: BaseException) -> str:
    """Return what `error` says in one line."""
    said = " ".join(str(error).split()) or type(error).__name__
    return printable(said[:MAX_WORDS])

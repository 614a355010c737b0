"""Starts and ends workers for the mount process, through a small process that forks them.

Used by client.py. The mount process has threads, and a fork of it would be a gamble: `Launcher()` has to be made before
there are any, in the main thread of the process that stays, since the kernel ends the launcher process with the thread
that forked it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from typing import NamedTuple

from qcowfs.inside.forker import END, ENDED, LONGEST, NUMBER, PID, SPAWN, be_launcher
from qcowfs.inside.places import Places

__all__ = ["Launcher", "Worker"]

PATIENCE = 5.0  # seconds until a launcher that does not answer is given up: it never does anything slow
GONE = "the process that starts readers is gone; only a new mount has another"


class Worker(NamedTuple):
    """A worker process: `number` is never another's, as `pid` may be once it has ended."""

    channel: socket.socket
    number: int
    pid: int


class Launcher:
    """The mount process's side. Any number of threads.

    Attributes:
        places: which trees have a worker; a tree takes a place before `spawn`, and leaves it after `end`.
    """

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent = os.getpid()
        # A Ctrl-C that came before the child ignores it would end the child alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._pid = os.fork()
            if self._pid == 0:
                be_launcher(theirs, parent)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        ours.settimeout(PATIENCE)
        self.places = Places()
        self._channel = ours
        self._lock = threading.Lock()
        self._number = 0

    def spawn(self, kind: str) -> Worker:
        """Start a worker for a file system of this kind.

        Raises:
            OSError: the launcher process is gone, or cannot fork.
        """
        with self._lock:
            number, answer, descriptors = self._exchange(SPAWN, kind.encode())
        if not descriptors:
            raise OSError("no process for it could be started")
        return Worker(socket.socket(fileno=descriptors[0]), number, PID.unpack(answer)[0])

    def end(self, worker: Worker) -> str:
        """Kill a worker, unless it has ended already; return how it ended, "" if only by this."""
        with self._lock:
            try:
                _number, answer, _descriptors = self._exchange(END, NUMBER.pack(worker.number))
            except OSError:
                return GONE
        by_itself, status = ENDED.unpack(answer)
        return _how(status) if by_itself else ""

    def _exchange(self, letter: bytes, body: bytes) -> tuple[int, bytes, list[int]]:
        """Send a request; return its number, the answer to it, and what was passed with that.

        An earlier request may have been given up before its answer came, which must not be taken for this one's. The
        worker that it may bring ends by itself as soon as its socket is closed.
        """
        self._number = (self._number + 1) & 0xFFFFFFFF
        number = NUMBER.pack(self._number)
        try:
            self._channel.send(letter + number + body)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise OSError(GONE) from error
        while True:
            answer, descriptors, _flags, _address = socket.recv_fds(self._channel, LONGEST, 1, socket.MSG_CMSG_CLOEXEC)
            if not answer:
                raise OSError(GONE)
            if answer[: NUMBER.size] == number:
                return self._number, answer[NUMBER.size :], descriptors
            for descriptor in descriptors:
                os.close(descriptor)

    def idle(self, seconds: float) -> None:
        """End the workers that nobody asked anything for so long."""
        self.places.idle(seconds)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called: what ends from now on is no crash."""
        return self._channel.fileno() < 0

    def close(self) -> None:
        """End all workers and the launcher process, and wait for them."""
        self.places.close()
        with self._lock:
            if self.is_closed:
                return
            self._channel.close()  # this is what ends them, without a question for each that might not be answered
            self._collect()
        self.places.idle(0)

    def _collect(self) -> None:
        """Wait for the launcher process; one that cannot even end is killed, and its workers with it."""
        deadline = time.monotonic() + PATIENCE
        with contextlib.suppress(ChildProcessError):  # somebody has set SIGCHLD to be ignored
            while os.waitpid(self._pid, os.WNOHANG)[0] == 0:
                if time.monotonic() > deadline:
                    os.kill(self._pid, signal.SIGKILL)
                    os.waitpid(self._pid, 0)
                    return
                time.sleep(0.001)


def _how(status: int) -> str:
    if status < 0:
        return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"exit code {status}"

"""A small process that forks the workers: the mount process has threads, and a fork of it would be a gamble.

Used by client.py; `Launcher()` has to be made before the caller has threads. The launcher keeps no descriptor but its
socket (and /dev/null, so that nothing ever prints into a socket), and ends, with all workers, when that socket closes:
also when the mount process was killed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import sys
import threading
import time
from collections import OrderedDict
from typing import NoReturn, Protocol

from qcowfs import _sandbox, limits

__all__ = ["Launcher", "Tenant"]

SOCKET = 3  # the launcher's and a worker's only descriptor beside /dev/null
NUMBER = struct.Struct("<I")  # of a request; its answer begins with it
PID = struct.Struct("<i")
STATUS = struct.Struct("<i")
LONGEST = 64  # bytes of a request: a letter, its number, and a kind of file system or a process id
ENDED_BY_LAUNCHER = -signal.SIGKILL
PATIENCE = 5.0  # seconds until a launcher that does not answer is given up: it never does anything slow


class Tenant(Protocol):
    """Who has a worker: a Tree."""

    def retire(self) -> bool:
        """Give the worker up if it is idle; return whether it was."""


class Launcher:
    """The mount process's side. Any number of threads."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._pid = os.fork()
        if self._pid == 0:
            _run(theirs)
        theirs.close()
        ours.settimeout(PATIENCE)
        self._channel = ours
        self._lock = threading.Lock()
        self._number = 0
        self._tenants: OrderedDict[Tenant, float] = OrderedDict()
        self._tenants_lock = threading.Lock()

    def spawn(self, kind: str) -> tuple[socket.socket, int]:
        """Start a worker for a file system of this kind; return its socket and process id.

        Raises:
            OSError: the launcher is gone, or cannot fork.
        """
        with self._lock:
            answer, descriptors = self._exchange(b"s", kind.encode())
        if not descriptors:
            raise OSError("no process for it could be started")
        os.set_inheritable(descriptors[0], False)
        return socket.socket(fileno=descriptors[0]), PID.unpack(answer)[0]

    def end(self, pid: int) -> str:
        """Kill a worker, unless it has ended already; return how it ended, "" if only by this."""
        with self._lock:
            try:
                answer, _descriptors = self._exchange(b"k", PID.pack(pid))
            except OSError:
                return "the launcher is gone"
        return _how(STATUS.unpack(answer)[0]) if len(answer) == STATUS.size else "the launcher is gone"

    def _exchange(self, letter: bytes, body: bytes) -> tuple[bytes, list[int]]:
        """Return the answer to one request, and what was passed with it.

        An earlier request may have been given up before its answer came, which must not be taken for this one's. The
        worker that it may bring ends by itself as soon as its socket is closed.
        """
        self._number = (self._number + 1) & 0xFFFFFFFF
        number = NUMBER.pack(self._number)
        self._channel.send(letter + number + body)
        while True:
            answer, descriptors, _flags, _address = socket.recv_fds(self._channel, LONGEST, 1)
            if not answer:
                raise OSError("the launcher is gone")
            if answer[: NUMBER.size] == number:
                return answer[NUMBER.size :], descriptors
            for descriptor in descriptors:
                os.close(descriptor)

    def touch(self, tenant: Tenant) -> None:
        """Note that `tenant` uses its worker now; the longest idle one gives its own up if there are too many."""
        with self._tenants_lock:
            self._tenants[tenant] = time.monotonic()
            self._tenants.move_to_end(tenant)
            excess = len(self._tenants) - limits.INSIDE_WORKERS
            candidates = [other for other in self._tenants if other is not tenant] if excess > 0 else []
        for other in candidates:
            if excess > 0 and other.retire():
                excess -= 1

    def forget(self, tenant: Tenant) -> None:
        """Note that `tenant` has no worker any more."""
        with self._tenants_lock:
            self._tenants.pop(tenant, None)

    def idle(self, seconds: float) -> None:
        """End the workers that nobody asked anything for so long."""
        before = time.monotonic() - seconds
        with self._tenants_lock:
            candidates = [tenant for tenant, used in self._tenants.items() if used <= before]
        for tenant in candidates:
            tenant.retire()

    def close(self) -> None:
        """End all workers and the launcher, and wait for them."""
        self.idle(0)
        with self._lock:
            if self._channel.fileno() < 0:
                return
            self._channel.close()
            os.waitpid(self._pid, 0)


def _how(status: int) -> str:
    if status == ENDED_BY_LAUNCHER:
        return ""
    if status < 0:
        return signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"exit code {status}"


def _run(channel: socket.socket) -> NoReturn:
    """Be the launcher; never return into the caller's code, whatever happens."""
    try:
        parent = os.getppid()
        _become_small(channel)
        _sandbox.die_with_parent(b"qcowfs-inside")
        if os.getppid() == parent:
            _serve(socket.socket(fileno=SOCKET))
    finally:
        os._exit(0)


def _become_small(channel: socket.socket) -> None:
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals():
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # a terminal sends them to the whole group
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _keep_only(channel)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write("500")


def _keep_only(channel: socket.socket) -> None:
    """Close all descriptors but this one, which becomes SOCKET, and put /dev/null on the first three."""
    os.dup2(channel.detach(), SOCKET)
    os.closerange(0, SOCKET)
    os.open(os.devnull, os.O_RDWR)
    os.dup2(0, 1)
    os.dup2(0, 2)
    os.closerange(SOCKET + 1, _highest() + 1)
    sys.stdin = sys.stdout = sys.stderr = os.fdopen(0, "w", closefd=False)  # not the caller's, with what they hold


def _highest() -> int:
    """Return the highest descriptor: the limit may have been lowered beneath some that were open already."""
    try:
        return max(int(name) for name in os.listdir("/proc/self/fd"))
    except OSError:
        return os.sysconf("SC_OPEN_MAX")


def _serve(channel: socket.socket) -> None:
    children: set[int] = set()
    while request := channel.recv(LONGEST):
        number, body = request[1 : 1 + NUMBER.size], request[1 + NUMBER.size :]
        if request[:1] == b"s":
            _spawn(channel, number, body.decode(), children)
        else:
            channel.send(number + STATUS.pack(_end(PID.unpack(body)[0], children)))
    for pid in tuple(children):
        _end(pid, children)


def _spawn(channel: socket.socket, number: bytes, kind: str, children: set[int]) -> None:
    _import_for(kind)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        try:
            pid = os.fork()
        except OSError:
            channel.send(number)
            return
        if pid == 0:
            _be_worker(theirs, kind)
        children.add(pid)
        socket.send_fds(channel, [number, PID.pack(pid)], [ours.fileno()])


def _import_for(kind: str) -> None:
    """Import once, for all workers, what each would import: 20 ms, where all else of a worker's start takes 3."""
    from qcowfs.inside import readers, worker  # noqa: F401

    with contextlib.suppress(Exception):  # the worker meets it again, and tells
        readers.import_reader(kind)


def _be_worker(channel: socket.socket, kind: str) -> NoReturn:
    code = 1
    try:
        _keep_only(channel)
        from qcowfs.inside.worker import work

        work(socket.socket(fileno=SOCKET), kind)
        code = 0
    finally:
        os._exit(code)


def _end(pid: int, children: set[int]) -> int:
    """Return -signal or the exit code of a child. Its id cannot be another's: nobody else waits for it."""
    if pid not in children:
        return ENDED_BY_LAUNCHER
    os.kill(pid, signal.SIGKILL)
    children.discard(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

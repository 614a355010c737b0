"""The launcher process: forks workers, ends them, and collects them when they end by themselves.

Called by launcher.py in a fresh child of the mount process; never returns. It keeps no descriptor but its socket (and
/dev/null, so that nothing ever prints into a socket), and ends, with all workers, when that socket closes: also when
the mount process was killed. A worker is known by the number of the request that started it: its process id may soon
be another's.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import NoReturn

from qcowfs import _sandbox, limits

__all__ = ["END", "ENDED", "LONGEST", "NUMBER", "PID", "SPAWN", "be_launcher"]

SPAWN, END = b"s", b"e"
NUMBER = struct.Struct("<I")  # of a request; its answer begins with it
PID = struct.Struct("<i")
ENDED = struct.Struct("<?i")  # whether by itself, and -signal or the exit code
LONGEST = 64  # bytes of a request: a letter, its number, and a kind of file system or a worker's number

SOCKET = 3  # the launcher's and a worker's only descriptor beside /dev/null
KEPT = 4 * limits.INSIDE_WORKERS  # ends that nobody has asked for yet
# A terminal sends some of them to all processes of its group, a service manager to all of its service. The end of the
# mount process is what counts, and until then its open files are to be read.
NOT_FOR_US = (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTERM, signal.SIGTSTP)


def be_launcher(channel: socket.socket, parent: int) -> NoReturn:
    """Serve `channel` until it is closed; never return into the caller's code, whatever happens.

    Args:
        channel: SOCK_SEQPACKET, to the mount process.
        parent: process id of the mount process.
    """
    try:
        gc.freeze()  # what was garbage in the caller may hold descriptors, whose numbers are soon those of others
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
            signal.signal(number, signal.SIG_IGN if number in NOT_FOR_US else signal.SIG_DFL)
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
    workers = _Workers()
    bell, ringer = socket.socketpair()
    bell.setblocking(False)
    ringer.setblocking(False)
    # Collected in this loop and not in a handler, which could do so between a look at a process id and its use.
    signal.set_wakeup_fd(ringer.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    wait = select.poll()
    wait.register(channel, select.POLLIN)
    wait.register(bell, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _events in wait.poll()}
        if bell.fileno() in ready:
            bell.recv(4096)
            workers.collect()
        if channel.fileno() in ready:
            request = channel.recv(LONGEST)
            if not request:
                break
            _answer(channel, request, workers)
    workers.end_all()


def _answer(channel: socket.socket, request: bytes, workers: _Workers) -> None:
    number, body = request[1 : 1 + NUMBER.size], request[1 + NUMBER.size :]
    if request[:1] == SPAWN:
        _spawn(channel, number, body.decode(), workers)
    else:
        channel.send(number + ENDED.pack(*workers.end(NUMBER.unpack(body)[0])))


def _spawn(channel: socket.socket, number: bytes, kind: str, workers: _Workers) -> None:
    work = _imported(kind)
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError:
        channel.send(number)
        return
    with ours, theirs:
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:
            channel.send(number)
            return
        if pid == 0:
            _be_worker(theirs, lambda own: work(own, kind), parent)
        workers.add(NUMBER.unpack(number)[0], pid)
        socket.send_fds(channel, [number, PID.pack(pid)], [ours.fileno()])


def _imported(kind: str) -> Callable[[socket.socket, str], None]:
    """Import what a worker needs for this kind, once for all of them: it takes longer than all else in a start."""
    from qcowfs.inside import readers, worker

    with contextlib.suppress(Exception):  # the worker tries again, and says what is wrong
        readers.import_reader(kind)
    return worker.work


def _be_worker(channel: socket.socket, work: Callable[[socket.socket], None], parent: int) -> NoReturn:
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _keep_only(channel)
        _sandbox.die_with_parent(b"qcowfs-reader")
        if os.getppid() == parent:
            work(socket.socket(fileno=SOCKET))
        code = 0
    finally:
        os._exit(code)


class _Workers:
    """The launcher's children. The id of one that was not collected yet cannot be another process's."""

    def __init__(self) -> None:
        self._running: dict[int, int] = {}  # number -> process id
        self._ended: OrderedDict[int, int] = OrderedDict()  # number -> -signal or the exit code

    def add(self, number: int, pid: int) -> None:
        self._running[number] = pid

    def collect(self) -> None:
        """Collect those that have ended by themselves."""
        for number, pid in tuple(self._running.items()):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                del self._running[number]
                self._ended[number] = os.waitstatus_to_exitcode(status)
        while len(self._ended) > KEPT:
            self._ended.popitem(last=False)

    def end(self, number: int) -> tuple[bool, int]:
        """Kill a worker unless it has ended already; return whether it had, and how."""
        self.collect()
        if number in self._ended:
            return True, self._ended.pop(number)
        pid = self._running.pop(number, 0)
        if pid == 0:
            return True, 0
        os.kill(pid, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return status != -signal.SIGKILL, status  # it may have been dying already

    def end_all(self) -> None:
        for number in tuple(self._running):
            self.end(number)

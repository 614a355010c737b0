"""A tree of files inside a volume, as the mount process asks for it; a worker process answers.

Used by the vfs and the commands. Any number of threads; one request of a tree at a time, and the thread that asks
serves the worker's questions for bytes meanwhile. The worker starts with the first request, may be ended (or killed by
anybody) whenever it is idle, and starts again by itself. It is not trusted: see answer.py.
"""

from __future__ import annotations

import errno
import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TypeVar

from qcowfs import limits
from qcowfs.errors import QcowfsError, TreeFault, printable
from qcowfs.inside import answer
from qcowfs.inside.allowance import Allowance, Overdrawn
from qcowfs.inside.launcher import Launcher, Worker
from qcowfs.inside.reader import Extents, Layout, Unproven
from qcowfs.inside.wire import ERROR, OPEN, RANGE, WANT, Kind, receive, send

__all__ = ["Tree"]

logger = logging.getLogger("qcowfs.inside")
T = TypeVar("T")
MAX_FACTS = 16  # a reader tells two or three
REASONS = {
    "SIGPROF": f"it took longer than {limits.INSIDE_REQUEST_SECONDS} s",
    "SIGSYS": "SIGSYS, a system call that no reader needs",
    "SIGKILL": "SIGKILL, from somebody else or for want of memory",
}


class Tree:
    """Has the methods of a reader.Reader and of a reader.Provable; they raise TreeFault."""

    def __init__(
        self,
        launcher: Launcher,
        volume_name: str,
        kind: str,
        size: int,
        read: Callable[[int, int], bytes],
        recover: bool,
    ) -> None:
        """Name the tree; nothing is read yet.

        Args:
            launcher: of this mount.
            volume_name: for messages.
            kind: of file system, a key of readers.READERS.
            size: bytes of the volume.
            read: returns exactly so many bytes of the volume at an offset, or raises QcowfsError or OSError.
            recover: replay the journal in memory.
        """
        self._launcher = launcher
        self._name = volume_name
        self._kind = kind
        self._size = size
        self._read = read
        self._recover = recover
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._number = 0  # of the last request
        self._crashes: deque[float] = deque(maxlen=limits.INSIDE_RESTARTS + 1)
        self._refusal = ""
        self._closed = False
        self._root = 0
        self._facts: dict[str, str] = {}
        self._suspects: bytes | None = None  # what every worker is told

    @property
    def name(self) -> str:
        """What messages call it."""
        return self._name

    @property
    def root(self) -> int:
        """The root's inode number."""
        with self._lock:
            if not self._root:
                self._start()
            return self._root

    def facts(self) -> dict[str, str]:
        """Return what `list -v` shows beyond kind, label and UUID, and under "sandbox" how the worker is confined."""
        with self._lock:
            if not self._root:
                self._start()
            return dict(self._facts)

    def stat(self, ino: int) -> bytes:
        """Return the bytes of record.INODE."""
        return self._ask(Kind.STAT, RANGE.pack(ino, 0, 0), lambda body: answer.inode(body, ino))

    def lookup(self, ino: int, name: bytes) -> int:
        """Return the inode number of `name` in the directory `ino`."""
        return self._ask(Kind.LOOKUP, RANGE.pack(ino, 0, 0) + name, answer.number)

    def entries(self, ino: int, cookie: int, room: int) -> bytes:
        """Return checked entries of a directory, about `room` bytes of them; b"" after the last."""
        request = RANGE.pack(ino, cookie, min(room, limits.INSIDE_WANT))
        return self._ask(Kind.ENTRIES, request, lambda body: answer.entries(body, cookie, self._size))

    def readlink(self, ino: int) -> bytes:
        """Return the target of a symbolic link."""
        return self._ask(Kind.READLINK, RANGE.pack(ino, 0, 0), answer.link)

    def xattrs(self, ino: int) -> dict[bytes, bytes]:
        """Return all extended attributes."""
        return self._ask(Kind.XATTRS, RANGE.pack(ino, 0, 0), answer.pairs)

    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        """Return where the bytes of a file are from `offset` on; None: `read` makes them."""
        request = RANGE.pack(ino, offset, limit)
        return self._ask(Kind.EXTENTS, request, lambda body: answer.extents(body, limit, self._size))

    def read(self, ino: int, offset: int, length: int) -> bytes:
        """Return `length` bytes of a file that has no extents, INSIDE_WANT at most, fewer only at its end."""
        length = min(length, limits.INSIDE_WANT)

        def check(body: bytes) -> bytes:
            if len(body) > length:
                raise ValueError("more bytes than were asked for")
            return body

        return self._ask(Kind.READ, RANGE.pack(ino, offset, length), check)

    def layout(self) -> Layout:
        """Return what the tree has to have in common with another to be compared by blocks.

        Raises:
            TreeFault: that cannot be told; of most kinds of file systems, never.
        """
        return self._ask(Kind.LAYOUT, RANGE.pack(0, 0, 0), lambda body: answer.layout(body, self._size))

    def suspect(self, ranges: bytes) -> None:
        """Tell what `unproven` is about: reader.Provable, which says what `ranges` are; INSIDE_RANGES at most."""
        self._ask(Kind.SUSPECT, RANGE.pack(0, 0, 0) + ranges, answer.nothing)
        self._suspects = ranges

    def unproven(self, ino: int) -> Unproven | None:
        """Return what of a directory may differ; None: anything."""
        return self._ask(Kind.UNPROVEN, RANGE.pack(ino, 0, 0), lambda body: answer.unproven(body, self._size))

    def retire(self) -> bool:
        """End the worker if no request is under way; return whether it was ended. The next request starts another."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            self._end()
        finally:
            self._lock.release()
        return True

    def close(self) -> None:
        """End the worker for good."""
        with self._lock:
            self._closed = True
            self._end()

    def _ask(self, kind: Kind, request: bytes, check: Callable[[bytes], T]) -> T:
        with self._lock:
            if self._worker is not None and _has_ended(self._worker.channel):
                logger.info("%s: its reader ended while it was idle: %s", printable(self._name), self._end())
            if self._worker is None:
                self._start()
            try:
                return self._exchange(kind, request, check)
            finally:
                if self._worker is not None and self._launcher.places.used(self):
                    self._end()

    def _start(self) -> None:
        """Start a worker and open the tree."""
        if self._refusal:
            raise self._fault(errno.ENOTSUP, self._refusal)
        if self._closed:
            raise self._fault(errno.EIO, "it was closed")
        if len(self._crashes) > limits.INSIDE_RESTARTS and not self._forgiven():
            raise self._fault(errno.EIO, "its reader crashes again and again")
        self._worker = self._new_worker()
        try:
            request = OPEN.pack(self._size, self._recover)
            self._root, facts = self._exchange(Kind.OPEN, request, _opened)
            if self._suspects is not None:
                self._exchange(Kind.SUSPECT, RANGE.pack(0, 0, 0) + self._suspects, answer.nothing)
        except TreeFault:
            self._end()
            raise
        self._facts = {_shown(name): _shown(value) for name, value in islice(facts.items(), MAX_FACTS)}
        sandbox = self._facts.get("sandbox", "")
        logger.debug("%s: process %d reads it: %s", printable(self._name), self._worker.pid, sandbox)

    def _new_worker(self) -> Worker:
        try:
            self._launcher.places.take(self)
        except OSError as error:
            number = errno.EAGAIN if error.errno == errno.EAGAIN else errno.EIO
            raise self._fault(number, f"its reader cannot be started: {error.strerror}") from error
        try:
            return self._launcher.spawn(self._kind)
        except BaseException as error:
            self._launcher.places.leave(self)
            if isinstance(error, OSError):
                raise self._fault(errno.EIO, f"its reader cannot be started: {error}") from error
            raise

    def _forgiven(self) -> bool:
        return time.monotonic() - self._crashes[0] > limits.INSIDE_RESTART_SECONDS

    def _exchange(self, kind: Kind, request: bytes, check: Callable[[bytes], T]) -> T:
        try:
            body = self._answer(kind, request)
            return check(body)
        except EOFError as error:
            raise self._crashed("it broke off") from error
        except TimeoutError as error:
            raise self._crashed(f"no answer within {limits.INSIDE_ANSWER_SECONDS} s") from error
        except Overdrawn as error:
            raise self._crashed(str(error)) from error
        except (OSError, ValueError) as error:
            raise self._crashed(f"it answered nonsense ({error})") from error
        except TreeFault:
            raise
        except BaseException:  # of this side, in the middle of an exchange: what is on its way fits no later request
            self._end()
            raise

    def _answer(self, request: Kind, body: bytes) -> bytes:
        """Send a request, serve what the worker wants to read meanwhile, and return its answer."""
        assert self._worker is not None
        channel = self._worker.channel
        self._number = number = (self._number + 1) & 0xFFFF
        allowance = Allowance()
        self._send(channel, request, body, allowance)
        while True:
            kind, answered, found = receive(channel, limits.INSIDE_ANSWER, allowance.deadline)
            if answered != number:
                raise ValueError("to another request")
            if kind == Kind.ANSWER:
                return found
            if kind != Kind.WANT:
                raise self._told(kind, found, request)
            with allowance.paused():
                reply = self._wanted(found)
            allowance.charge(len(reply[1]))
            self._send(channel, *reply, allowance)

    def _send(self, channel: socket.socket, kind: Kind, body: bytes, allowance: Allowance) -> None:
        try:
            send(channel, kind, self._number, body, allowance.deadline)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error

    def _told(self, kind: int, body: bytes, request: Kind) -> TreeFault:
        """Return the fault that the worker tells."""
        if kind == Kind.UNREADABLE and request == Kind.OPEN:
            self._refusal = _shown(body)
            return self._fault(errno.ENOTSUP, self._refusal)
        if kind != Kind.ERROR or len(body) < ERROR.size:
            raise ValueError(f"message {kind}")
        (number,) = ERROR.unpack_from(body)
        return self._fault(number if number in errno.errorcode else errno.EIO, _shown(body[ERROR.size :]))

    def _wanted(self, body: bytes) -> tuple[Kind, bytes]:
        """Return the message with the bytes of the volume that the worker wants."""
        if len(body) != WANT.size:
            raise ValueError("what it wants to read")
        offset, length = WANT.unpack(body)
        if length > limits.INSIDE_WANT or offset + length > self._size:
            raise ValueError(f"wants {length} bytes at {offset}")
        try:
            found = self._read(offset, length)
        except (QcowfsError, OSError) as error:
            return Kind.NO_BYTES, ERROR.pack(error.errno or errno.EIO)
        return (Kind.BYTES, found) if len(found) == length else (Kind.NO_BYTES, ERROR.pack(errno.EIO))

    def _crashed(self, what: str) -> TreeFault:
        how = self._end()
        if self._launcher.is_closed:
            return self._fault(errno.EIO, "the mount ends")
        self._crashes.append(time.monotonic())
        what = f"its reader crashed: {REASONS.get(how, how) or what}"
        logger.warning("%s: %s", printable(self._name), printable(what))
        return self._fault(errno.EIO, printable(what))

    def _end(self) -> str:
        """End the worker, if there is one; return how it had ended by itself.

        Its socket stays open so long: a worker that finds it closed ends by itself, and that would be the answer.
        """
        worker, self._worker = self._worker, None
        if worker is None:
            return ""
        try:
            return self._launcher.end(worker)
        finally:
            worker.channel.close()
            self._launcher.places.leave(self)

    def _fault(self, number: int, what: str) -> TreeFault:
        return TreeFault(self._name, what, number)


def _has_ended(channel: socket.socket) -> bool:
    """Tell whether the worker at the other end is gone, before it is asked anything."""
    channel.setblocking(False)
    try:
        return not channel.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _opened(body: bytes) -> tuple[int, dict[bytes, bytes]]:
    return answer.number(body[:8]), answer.pairs(body[8:])


def _shown(text: bytes) -> str:
    """Return what a worker says in a form, and of a length, that can be shown."""
    return printable(text[: limits.INSIDE_ERROR].decode("utf-8", "replace"))

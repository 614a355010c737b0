"""What a worker process does: confine itself, open one tree, answer one request after the other. Called by launcher.py.

It has no descriptor but its socket, and asks through it for every byte of the volume. Whatever a reader raises is an
answer; what kills the worker (a crash, its timer, the memory) is told by the launcher. Answers are checked here as the
other side will check them again: what a reader takes from a damaged volume is then one error, and not a crash.
"""

from __future__ import annotations

import encodings.idna
import errno
import os
import signal
import socket

from qcowfs import _sandbox, limits
from qcowfs.inside import answer, readers
from qcowfs.inside.blocks import Blocks
from qcowfs.inside.reader import DIGEST, Provable, Reader, Unreadable
from qcowfs.inside.record import EXTENT
from qcowfs.inside.wire import ERROR, EXTENTS, OPEN, RANGE, SPAN, WANT, Kind, cut, pack_pairs, receive, send

__all__ = ["work"]

# Codecs and the like that Python imports when they are first used, which it cannot any more once confined.
_IMPORTED_EARLY = (encodings.idna, "".encode("utf-16-le"), "".encode("latin-1"), "".encode("cp437"), "".encode("ascii"))


def work(channel: socket.socket, kind: str) -> None:
    """Serve a volume with the file system `kind` until the other side closes `channel`."""
    trouble = ""
    try:
        readers.import_reader(kind)
    except Unreadable as error:
        trouble = str(error)
    done = _sandbox.confine(_mapped() + limits.INSIDE_MEMORY, limits.INSIDE_CPU_SECONDS)
    worker = _Worker(channel, kind, trouble, " ".join(done))
    while True:
        try:
            request, number, body = receive(channel, limits.INSIDE_WANT)
        except (EOFError, OSError):
            return
        worker.serve(request, number, body)


def _mapped() -> int:
    """Return the address space of this process: what Python and the launcher's caller have mapped is no leak."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 256 << 20  # no /proc: more than Python and its libraries ever map


class _Worker:
    def __init__(self, channel: socket.socket, kind: str, trouble: str, sandbox: str) -> None:
        self._channel = channel
        self._kind = kind
        self._trouble = trouble
        self._sandbox = sandbox
        self._number = 0
        self._reader: Reader | None = None
        self._size = 0  # of the volume
        self._unread = 0  # the errno with which a read of the volume failed, for this request

    def serve(self, request: int, number: int, body: bytes) -> None:
        self._number, self._unread = number, 0
        signal.setitimer(signal.ITIMER_PROF, limits.INSIDE_REQUEST_SECONDS)
        outcome, told = self._outcome(request, body)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(self._channel, outcome, number, told)

    def _outcome(self, request: int, body: bytes) -> tuple[Kind, bytes]:
        try:
            return Kind.ANSWER, self._answer(request, body)
        except Unreadable as error:
            if self._unread:  # perhaps only now; what a reader refuses for what it has read, it refuses for ever
                return _error(self._unread, str(error))
            return Kind.UNREADABLE, cut(str(error))
        except MemoryError:
            return _error(errno.ENOMEM, "its reader ran out of memory")
        except OSError as error:
            return _error(error.errno or errno.EIO, error.strerror or str(error))
        except Exception as error:  # a reader's slip on damaged metadata ends one request, not the tree
            return _error(errno.EIO, f"{type(error).__name__}: {error}")

    def _answer(self, request: int, body: bytes) -> bytes:
        if request == Kind.OPEN:
            return self._open(*OPEN.unpack(body))
        reader = self._reader
        if reader is None:
            raise OSError(errno.EIO, "the tree is not open")
        ino, first, second = RANGE.unpack_from(body)
        match request:
            case Kind.STAT:
                return answer.inode(reader.stat(ino), ino)
            case Kind.LOOKUP:
                return reader.lookup(ino, body[RANGE.size :]).to_bytes(8, "little")
            case Kind.ENTRIES:
                return answer.entries(reader.entries(ino, first, second), first, self._size)
            case Kind.READLINK:
                return answer.link(reader.readlink(ino))
            case Kind.XATTRS:
                return _xattrs(reader, ino)
            case Kind.EXTENTS:
                return self._extents(reader, ino, first, second)
            case Kind.READ:
                return reader.read(ino, first, second)
            case Kind.LAYOUT | Kind.SUSPECT | Kind.UNPROVEN if isinstance(reader, Provable):
                return self._prove(reader, request, ino, body[RANGE.size :])
        raise OSError(errno.ENOSYS, f"request {request}")

    def _prove(self, reader: Provable, request: int, ino: int, ranges: bytes) -> bytes:
        if request == Kind.LAYOUT:
            layout = reader.layout()
            body = layout.digest + b"".join([SPAN.pack(*span) for span in layout.moved])
            answer.layout(body, self._size)
            return body
        if request == Kind.SUSPECT:
            reader.suspect(ranges)
            return b""
        found = reader.unproven(ino)
        body = bytes([found.same]) + found.map.ljust(DIGEST, b"\0") + found.entries if found else b""
        answer.unproven(body, self._size)
        return body

    def _open(self, size: int, recover: int) -> bytes:
        if self._trouble:
            raise Unreadable(self._trouble)
        reader = readers.open_reader(self._kind, Blocks(size, self._ask), recover=bool(recover))
        self._reader, self._size = reader, size
        facts = {**reader.facts(), "sandbox": self._sandbox}
        return reader.root.to_bytes(8, "little") + pack_pairs({k.encode(): v.encode() for k, v in facts.items()})

    def _extents(self, reader: Reader, ino: int, offset: int, limit: int) -> bytes:
        found = reader.extents(ino, offset, limit)
        if found is None:
            return EXTENTS.pack(0, 0, 0)
        packed = b"".join([EXTENT.pack(*extent) for extent in found.extents])
        body = EXTENTS.pack(1, found.end, len(found.extents)) + packed + found.inline
        answer.extents(body, limit, self._size)
        return body

    def _ask(self, offset: int, length: int) -> bytes:
        try:
            send(self._channel, Kind.WANT, self._number, WANT.pack(offset, length))
            kind, _number, body = receive(self._channel, limits.INSIDE_WANT)
        except (EOFError, OSError):
            os._exit(0)  # nobody is left who could want the answer
        if kind != Kind.BYTES:
            (self._unread,) = ERROR.unpack_from(body)
            raise OSError(self._unread, f"{length} bytes at {offset} cannot be read")
        return body


def _error(number: int, text: str) -> tuple[Kind, bytes]:
    return Kind.ERROR, ERROR.pack(number) + cut(text)


def _xattrs(reader: Reader, ino: int) -> bytes:
    body = pack_pairs(reader.xattrs(ino))
    answer.pairs(body)
    if len(body) > limits.INSIDE_ANSWER:
        raise OSError(errno.EIO, f"inode {ino}: {len(body)} bytes of extended attributes")
    return body

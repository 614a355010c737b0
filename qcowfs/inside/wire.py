"""The messages between the mount process and a worker: a head of fixed size, then `length` bytes.

Used by client.py on one side, worker.py and blocks.py on the other. Little-endian. Every message of one request has its
number, so that an answer to another question is noticed. A stream and not packets: an answer may be longer than what
the kernel lets a packet be.
"""

from __future__ import annotations

import enum
import errno
import socket
import struct
import time
from collections.abc import Mapping

from qcowfs import limits

__all__ = [
    "ERROR",
    "EXTENTS",
    "HEAD",
    "OPEN",
    "PAIR",
    "RANGE",
    "SPAN",
    "WANT",
    "Kind",
    "cut",
    "pack_pairs",
    "receive",
    "send",
]

HEAD = struct.Struct("<BxHI")  # Kind, number of the request, length of what follows
OPEN = struct.Struct("<QB")  # size of the volume, whether to recover
RANGE = struct.Struct("<QQQ")  # inode, and two numbers: offset and length, offset and limit, cookie and room
WANT = struct.Struct("<QI")  # offset and length in the volume
ERROR = struct.Struct("<I")  # errno; a text follows
EXTENTS = struct.Struct("<BQI")  # whether there are any, end, count; the extents and the inline bytes follow
SPAN = struct.Struct("<QQ")  # start and end in the volume
PAIR = struct.Struct("<HI")  # lengths of a name and a value, which follow


class Kind(enum.IntEnum):
    """What a message is: a request, what the worker sends, or what it gets when it wants bytes of the volume."""

    OPEN = 1
    STAT = 2
    LOOKUP = 3
    ENTRIES = 4
    READLINK = 5
    XATTRS = 6
    EXTENTS = 7
    READ = 8
    LAYOUT = 9
    SUSPECT = 10
    UNPROVEN = 11
    ANSWER = 16
    ERROR = 17
    UNREADABLE = 18
    WANT = 19
    BYTES = 24
    NO_BYTES = 25


def send(channel: socket.socket, kind: int, number: int, body: bytes, deadline: float | None = None) -> None:
    """Send one message.

    Args:
        deadline: of time.monotonic(); None waits for ever.

    Raises:
        TimeoutError: the deadline has passed, and the other side has not taken all.
        OSError: the other side is gone.
    """
    _wait_until(channel, deadline)
    channel.sendall(HEAD.pack(kind, number, len(body)) + body)


def receive(channel: socket.socket, cap: int, deadline: float | None = None) -> tuple[int, int, bytes]:
    """Return kind, number and body of the next message.

    Args:
        cap: longest body that is taken.
        deadline: of time.monotonic(); None waits for ever.

    Raises:
        EOFError: the other side is gone.
        TimeoutError: the deadline has passed.
        OSError: EPROTO, the body is longer than `cap`.
    """
    kind, number, length = HEAD.unpack(_exactly(channel, HEAD.size, deadline))
    if length > cap:
        raise OSError(errno.EPROTO, f"a message of {length} bytes")
    return kind, number, _exactly(channel, length, deadline)


def _exactly(channel: socket.socket, length: int, deadline: float | None) -> bytes:
    """Return so many bytes. Into one buffer: a body that came as millions of pieces would take much more memory."""
    body = bytearray(length)
    rest = memoryview(body)
    while rest:
        _wait_until(channel, deadline)
        count = channel.recv_into(rest)
        if count == 0:
            raise EOFError
        rest = rest[count:]
    return bytes(body)


def _wait_until(channel: socket.socket, deadline: float | None) -> None:
    """Have the next call on `channel` end at the deadline."""
    if deadline is None:
        return
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    channel.settimeout(remaining)


def pack_pairs(pairs: Mapping[bytes, bytes]) -> bytes:
    """Return the bytes of names and values, each pair with a PAIR before it."""
    return b"".join(_pair(name, value) for name, value in pairs.items())


def _pair(name: bytes, value: bytes) -> bytes:
    return PAIR.pack(len(name), len(value)) + name + value


def cut(text: str) -> bytes:
    """Return the text of an error, no longer than a log line should be."""
    return text.encode("utf-8", "backslashreplace")[: limits.INSIDE_ERROR]

"""Where a monitor or a guest agent listens, as a person writes it: SOCKET or SOCKET:DEVICE.

Used by the command line and by the other files of this room. Any thread.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from qcowfs.errors import MonitorError, UsageError, printable

__all__ = ["Address", "absolute", "connect", "parse_address", "process_behind"]

_TCP = re.compile(r"(?P<host>[^:/\[\]]+|\[[0-9A-Fa-f:.%\w]+\]):(?P<port>\d{1,5})(?::(?P<rest>.*))?", re.DOTALL)
_LAST_PORT = 65535
BACKLOG_SECONDS = 0.02  # between two attempts to get into a queue that is full
_LONGEST = 107  # bytes of a Unix socket's name: sun_path without the NUL, unix(7)
_UCRED = struct.Struct("@iII")  # pid, uid, gid of struct ucred, unix(7)


@dataclass(frozen=True, slots=True)
class Address:
    """Where somebody listens.

    Attributes:
        path: of a Unix socket, absolute; "" for TCP.
        host, port: of TCP.
    """

    path: str = ""
    host: str = ""
    port: int = 0

    @property
    def shown(self) -> str:
        """The address for messages."""
        if self.path:
            return printable(self.path)
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{printable(self.host)}:{self.port}"


def parse_address(text: str, *, device: bool = False) -> tuple[Address, str | None]:
    """Return the address that `text` says, and the device behind it, None if there is none.

    A name that exists is a Unix socket, colons and all; with `device`, what follows the longest such name is one.
    HOST:PORT is TCP. Anything else is taken for a Unix socket that is not there, which connecting tells.

    Raises:
        UsageError: it is empty, or the port is none.
    """
    if not text:
        raise UsageError("the name of the monitor's socket is empty")
    for path, rest in _cuts(text, device=device):
        if os.path.lexists(path):
            return Address(path=absolute(path)), rest or None
    match = _TCP.fullmatch(text)
    if match is not None and (device or match["rest"] is None):
        if int(match["port"]) > _LAST_PORT:
            raise UsageError(f"{printable(text)}: there is no port {match['port']}")
        return Address(host=match["host"].strip("[]"), port=int(match["port"])), match["rest"] or None
    path, _, rest = text.partition(":") if device else (text, "", "")
    return Address(path=absolute(path)), rest or None


def absolute(path: str) -> str:
    """Return `path` as another process finds it.

    Raises:
        UsageError: it begins in a directory that is gone.
    """
    try:
        return os.path.join(os.getcwd(), path)
    except FileNotFoundError as error:
        if path.startswith("/"):
            return path
        raise UsageError(f"{printable(path)}: the current directory, where it begins, is gone") from error


def _cuts(text: str, *, device: bool) -> Iterator[tuple[str, str]]:
    """Yield the ways to cut `text` into a path and a device, the longest path first."""
    yield text, ""
    places = [number for number, character in enumerate(text) if character == ":"] if device else []
    for place in reversed(places):
        if place:
            yield text[:place], text[place + 1 :]


def connect(address: Address, seconds: float) -> socket.socket:
    """Return a connection; each of its operations ends after `seconds`.

    Raises:
        MonitorError: nobody listens there, or may not be talked to.
    """
    deadline = time.monotonic() + seconds
    try:
        while True:
            # connect(2) of a Unix socket whose backlog is full: QEMU has one for one, and each mount waits in it.
            with suppress(BlockingIOError):
                return _connected(address, seconds)
            if time.monotonic() > deadline:
                raise MonitorError(address.shown, "too many others wait for it already")
            time.sleep(BACKLOG_SECONDS)
    except TimeoutError as error:
        raise MonitorError(address.shown, "it does not answer") from error
    except OSError as error:
        raise MonitorError(address.shown, f"cannot be connected to: {error.strerror or error}") from error


def _connected(address: Address, seconds: float) -> socket.socket:
    if not address.path:
        return socket.create_connection((address.host, address.port), seconds)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.settimeout(seconds)
        with _short(address.path) as path:
            connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _short(path: str) -> Iterator[str]:
    """Yield a name of the socket `path` that is short enough for an address."""
    if len(os.fsencode(path)) <= _LONGEST:
        yield path
        return
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{os.path.basename(path)}"
    finally:
        os.close(directory)


def process_behind(connection: socket.socket) -> int | None:
    """Return the process that listens at the other end; None where the kernel does not tell, as for TCP."""
    if connection.family != socket.AF_UNIX:
        return None
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid = int(_UCRED.unpack(credentials)[0])
    return pid if pid > 0 else None  # 0: it lives in another pid namespace

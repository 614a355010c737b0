"""An NBD server in threads of the test's own process: a test says when and how each read is answered."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.nbd import newstyle

__all__ = ["Command", "ScriptedServer", "scripted_server"]

REQUEST = struct.Struct(">IHHQQI")
READ = 0


class Command:
    """A read that a client waits for. Any thread may answer it, at any time, or nobody.

    Attributes:
        connection: the number of its connection, from 1 on.
        offset, length: bytes.
    """

    def __init__(self, client: _Client, handle: int, offset: int, length: int) -> None:
        self.connection = client.number
        self.offset = offset
        self.length = length
        self._client = client
        self._handle = handle

    def answer(self, error: int = 0) -> None:
        data = b"" if error else self._client.content[self.offset : self.offset + self.length]
        with self._client.sending, suppress(OSError):  # the client may have gone
            self._client.socket.sendall(struct.pack(">IIQ", 0x67446698, error, self._handle) + data)

    def hang_up(self) -> None:
        """Close the connection, with all that waits on it."""
        with suppress(OSError):
            self._client.socket.shutdown(socket.SHUT_RDWR)


class ScriptedServer:
    """A server of one export, without structured replies, that does not let clients have several connections.

    Attributes:
        url: of the export.
        connections: how many there were.
    """

    def __init__(self, path: Path, content: bytes, script: Callable[[Command], None]) -> None:
        self.url = f"nbd+unix:///?socket={path}"
        self.connections = 0
        self._content = content
        self._script = script
        self._clients: list[_Client] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        os.unlink(self._listener.getsockname())
        self._listener.shutdown(socket.SHUT_RDWR)  # accept() ends
        self._threads[0].join()
        for client in self._clients:
            with suppress(OSError):
                client.socket.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                accepted, _ = self._listener.accept()
                self.connections += 1
                self._clients.append(_Client(accepted, self.connections, self._content))
                self._threads.append(threading.Thread(target=self._clients[-1].serve, args=(self._script,)))
                self._threads[-1].start()


class _Client:
    def __init__(self, accepted: socket.socket, number: int, content: bytes) -> None:
        self.socket = accepted
        self.number = number
        self.content = content
        self.sending = threading.Lock()

    def serve(self, script: Callable[[Command], None]) -> None:
        with self.socket, suppress(OSError, struct.error):  # struct.error: it went in the middle of something
            newstyle(self.socket, len(self.content))
            while True:
                request = REQUEST.unpack(self.socket.recv(REQUEST.size, socket.MSG_WAITALL))
                if request[2] != READ:
                    return
                script(Command(self, *request[3:]))


@contextmanager
def scripted_server(path: Path, content: bytes, script: Callable[[Command], None]) -> Iterator[ScriptedServer]:
    """Listen at `path`; `script` is called with each read, in a thread of its connection."""
    server = ScriptedServer(path, content, script)
    try:
        yield server
    finally:
        server.close()

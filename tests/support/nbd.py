"""Servers of NBD: nbdkit and qemu-nbd, which can be killed and started again, and one that says what a test wants."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["Server", "certificates", "free_port", "hostile_server", "nbdkit", "newstyle", "qemu_nbd"]

START = 20.0  # seconds that a server may take until it listens, on a busy machine


class Server:
    """A server's process.

    Attributes:
        url: of its default export.
    """

    def __init__(self, command: list[str], address: str | int, query: str = "") -> None:
        """`address`: the path of a Unix socket, or a TCP port of 127.0.0.1."""
        self._command = command
        self._address = address
        tls = "s" if "--tls=require" in command else ""
        if isinstance(address, int):
            self.url = f"nbd{tls}://localhost:{address}/" + (f"?{query}" if query else "")
        else:
            self.url = f"nbd{tls}+unix:///?socket={address}" + (f"&{query}" if query else "")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if isinstance(self._address, str):
            Path(self._address).unlink(missing_ok=True)  # what a killed one left
        self.process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
        end = time.monotonic() + START
        while not listens(self._address):
            assert self.process.poll() is None, f"it ended: {' '.join(self._command)}"
            assert time.monotonic() < end
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill it, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def listens(address: str | int) -> bool:
    """Tell whether somebody takes connections at the path of a Unix socket, or at a TCP port of 127.0.0.1."""
    with socket.socket(socket.AF_INET if isinstance(address, int) else socket.AF_UNIX) as client, suppress(OSError):
        client.connect(("127.0.0.1", address) if isinstance(address, int) else address)
        return True
    return False


@contextmanager
def _running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def nbdkit(address: Path | int, *words: str | Path, query: str = "") -> Iterator[Server]:
    """Run nbdkit, read-only, with these filters, plugin and parameters, on a socket or a port of 127.0.0.1."""
    place = address if isinstance(address, int) else str(address)
    where = ["-i", "127.0.0.1", "-p", str(place)] if isinstance(place, int) else ["-U", place]
    with _running(Server(["nbdkit", "-f", "-r", *where, *map(str, words)], place, query)) as server:
        yield server


@contextmanager
def qemu_nbd(address: Path, image: Path, *words: str, writable: bool = False) -> Iterator[Server]:
    """Run qemu-nbd for up to 8 clients at a time."""
    command = ["qemu-nbd", *([] if writable else ["-r"]), "-t", "-e", "8", "-k", str(address), *words, str(image)]
    with _running(Server(command, str(address))) as server:
        yield server


def free_port() -> int:
    """Return a TCP port that nobody has at this moment."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def certificates(directory: Path) -> None:
    """Make a server's certificate for localhost in `directory`/server, and two authorities: `right`, which made it, and
    `wrong`."""
    for name in ("right", "wrong", "server"):
        (directory / name).mkdir()
    for name in ("right", "wrong"):
        key = directory / f"{name}.key"
        _certtool("--generate-privkey", "--key-type", "ecdsa", "--outfile", key)
        template = _template(directory, f"cn = {name}\nca\ncert_signing_key\nexpiration_days = 2\n")
        authority = directory / name / "ca-cert.pem"
        _certtool("--generate-self-signed", "--load-privkey", key, "--template", template, "--outfile", authority)
    server = directory / "server"
    (server / "ca-cert.pem").write_bytes((directory / "right/ca-cert.pem").read_bytes())
    _certtool("--generate-privkey", "--key-type", "ecdsa", "--outfile", server / "server-key.pem")
    template = _template(
        directory, "cn = localhost\ndns_name = localhost\ntls_www_server\nsigning_key\nexpiration_days = 2\n"
    )
    signer = ["--load-ca-certificate", server / "ca-cert.pem", "--load-ca-privkey", directory / "right.key"]
    subject = ["--load-privkey", server / "server-key.pem", "--template", template]
    _certtool("--generate-certificate", *signer, *subject, "--outfile", server / "server-cert.pem")


def _template(directory: Path, text: str) -> Path:
    path = directory / "template"
    path.write_text(text)
    return path


def _certtool(*words: str | Path) -> None:
    subprocess.run(["certtool", *map(str, words)], check=True, capture_output=True, timeout=60)


@contextmanager
def hostile_server(path: Path, talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """Listen at `path` and let `talk` answer one client after the other; yields the URL."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=_talk_to_all, args=(listener, talk))
        thread.start()
        try:
            yield f"nbd+unix:///?socket={path}"
        finally:
            os.unlink(path)
            listener.shutdown(socket.SHUT_RDWR)  # accept() ends
            thread.join()


def _talk_to_all(listener: socket.socket, talk: Callable[[socket.socket], None]) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        with client, suppress(OSError):
            talk(client)


def newstyle(client: socket.socket, size: int, blocks: tuple[int, int, int] | None = None) -> None:
    """Greet `client` and negotiate an export of `size` bytes, without structured replies, up to its first command.

    Args:
        blocks: the minimum, preferred and maximum block size that it is told, whatever it asks for.
    """
    client.sendall(b"NBDMAGIC" + b"IHAVEOPT" + struct.pack(">H", 3))
    client.recv(4, socket.MSG_WAITALL)
    while True:
        _, option, length = struct.unpack(">8sII", client.recv(16, socket.MSG_WAITALL))
        client.recv(length, socket.MSG_WAITALL)
        if option != 7:  # NBD_OPT_GO
            client.sendall(_option_reply(option, 0x80000001))  # NBD_REP_ERR_UNSUP
            continue
        client.sendall(_option_reply(option, 3, struct.pack(">HQH", 0, size, 3)))  # NBD_REP_INFO: NBD_INFO_EXPORT
        if blocks is not None:
            client.sendall(_option_reply(option, 3, struct.pack(">HIII", 3, *blocks)))  # NBD_INFO_BLOCK_SIZE
        client.sendall(_option_reply(option, 1))  # NBD_REP_ACK
        return


def _option_reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", 0x3E889045565A9, option, kind, len(data)) + data

"""Monitors for tests: a QEMU whose machine never starts, so that it is there in no time, and servers that misbehave."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.support.vm import QEMU

START_SECONDS = 60.0
GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\r\n'
)


@contextmanager
def stopped_machine(directory: Path, *words: str, cwd: Path | None = None) -> Iterator[Path]:
    """Run a QEMU with `words` on its command line, whose machine does not start; yield the socket of its monitor.

    `directory` has a short name: that of a Unix socket may have 107 bytes.
    """
    path, log = directory / "qmp", directory / "qemu.log"
    command = [QEMU, "-S", "-accel", "tcg", "-display", "none", "-nodefaults", "-no-user-config", *words]
    with log.open("wb") as said:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command, "-qmp", f"unix:{path},server=on,wait=off"],
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd=cwd,
        )
    try:
        _wait_for(path, process, log)
        yield path
    finally:
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)


def _wait_for(path: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not _listens(path):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, "QEMU does not start"
        time.sleep(0.02)


def _listens(path: Path) -> bool:
    """Tell whether somebody accepts connections; the socket is there a moment before."""
    with socket.socket(socket.AF_UNIX) as tried:
        return tried.connect_ex(str(path)) == 0


@contextmanager
def server(path: Path, *serve: Callable[[socket.socket], object]) -> Iterator[Path]:
    """Listen at `path`, and give the first connection to the first of `serve`, the next one to the next, and so on."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    thread = threading.Thread(target=_serve, args=(listener, serve), daemon=True)
    thread.start()
    try:
        yield path
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        path.unlink()


def _serve(listener: socket.socket, serve: Sequence[Callable[[socket.socket], object]]) -> None:
    for one in serve:
        with suppress(OSError):
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(10)
                one(connection)

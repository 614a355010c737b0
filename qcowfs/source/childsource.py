"""An NBD server of our own, in a child process, as a source: the child ends with it, whatever happens.

Used by foreign. Nobody else can talk to the child: its socket has no name any more by the time it starts. One thread
starts it and waits for its end; the kernel kills it when that thread is gone, and so when this process is. A child that
reads from a server, and has lost it, is replaced by another one: QEMU's drivers do not connect again by themselves.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import IO

from qcowfs import limits
from qcowfs._nbd import NbdSource
from qcowfs._source import Source
from qcowfs.errors import printable

__all__ = ["ChildSource"]

SAYS = b"qemu-nbd: "
logger = logging.getLogger("qcowfs.source")


class ChildSource(NbdSource):
    """What `command` serves, once `connect` returned.

    Args:
        name: for messages.
        command: an absolute path and arguments of a program that takes a listening socket as systemd passes one; see
            launch for what stands for the image in them.
        image: a descriptor for it, which is used until `connect` returned; None: it gets none.
        patience: seconds that one read may take, and opening.
        where: what `place` answers.
    """

    def __init__(self, name: str, command: Sequence[str], image: int | None, patience: float, where: Hashable) -> None:
        self._listener, self._socket = _listen()
        self._wanted = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # readable: the end of the child
        uri = f"nbd+unix:///?socket=/proc/self/fd/{self._socket}".encode()
        super().__init__(name, uri, patience, where, tls=False, certificates=None, keys=None)
        self.expect_qemu(self._wanted if image is None else -1)
        self._command, self._image = command, image
        self._connected = self._closing = False
        self._base: Source | None = None
        self._words = ""
        self._thread = threading.Thread(target=self._serve, name="qcowfs-qemu", daemon=True)

    def connect(self) -> None:
        """Start the program and connect to it.

        Raises:
            OSError: it does not start, or ends; with its own last words.
        """
        self._thread.start()
        try:
            super().connect()
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            self._thread.join()  # it failed because the child ended
            raise OSError(errno.EIO, self._words or "it ended", self.name) from error
        self._connected = True

    def owns(self, base: Source | None) -> None:
        """Close `base`, too, when this is closed: the file that the child reads, whose locks are held until then."""
        self._base = base

    def close(self) -> None:
        """End the child, and give everything back."""
        if self._socket < 0:
            return
        self._closing = True
        super().close()
        if self._thread.ident is not None:
            os.eventfd_write(self._wanted, 1)
            self._thread.join()
        self._listener.close()
        for descriptor in (self._socket, self._wanted):
            os.close(descriptor)
        self._socket = -1
        if self._base is not None:
            self._base.close()

    def _serve(self) -> None:
        """Run children, one after the other if it is a server that they read from."""
        self._run()
        while self._image is None and self._connected and not self._closing:
            self._hang_up()
            _readable(self._listener.fileno(), self._wanted)  # once somebody wants to read
            self._run()
        self.fail(errno.EIO)
        if self._connected and not self._closing:
            logger.warning("%s: nothing more is read: qemu-nbd ended: %s", self.name, self._words or "killed")

    def _run(self) -> None:
        """Start the child, and wait for its end."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._wanted)
        if self._closing:  # set before `_wanted` is: it is seen here, or that is seen below
            return
        try:
            process = self._start()
        except OSError as error:
            self._words = str(error)
            return
        assert process.stderr is not None
        with process.stderr as said:
            self._listen_to(said, process)
        process.wait()

    def _listen_to(self, said: IO[bytes], process: subprocess.Popen[bytes]) -> None:
        """Keep what the child says of its end, and end it once that is wanted."""
        self._words, rest = "", b""
        while True:
            if self._wanted in _readable(said.fileno(), self._wanted):
                os.eventfd_read(self._wanted)
                process.kill()
                return
            piece = os.read(said.fileno(), limits.MAX_CHILD_LINE)
            *lines, rest = (rest[: limits.MAX_CHILD_LINE] + piece).split(b"\n")
            for line in lines if piece else [rest]:
                if line.startswith(SAYS) or not self._words:  # what follows is a hint, or a library's chatter
                    self._words = printable(line.removeprefix(SAYS))
            if not piece:
                return

    def _hang_up(self) -> None:
        """End connections that no child took, so that who waits there does what is to be done when a server is gone."""
        while _readable(self._listener.fileno(), milliseconds=0):
            self._listener.accept()[0].close()

    def _start(self) -> subprocess.Popen[bytes]:
        numbers = [self._listener.fileno(), *([] if self._image is None else [self._image])]
        image = "-1" if self._image is None else str(self._image)
        words = [str(os.getpid()), str(numbers[0]), image, *self._command]
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "qcowfs.source.launch", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=numbers,
            start_new_session=True,
            cwd="/",
        )


def _readable(*descriptors: int, milliseconds: int | None = None) -> set[int]:
    """Wait until some of them are readable, or that long, and return those."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return {descriptor for descriptor, _ in poll.poll(milliseconds)}


def _listen() -> tuple[socket.socket, int]:
    """Return a listening socket that has no name, and a descriptor that stands for where it was: /proc leads there."""
    directory = tempfile.mkdtemp(prefix="qcowfs-")  # 0700, and for a moment
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        name = f"/proc/self/fd/{handle}/s"  # short, however long the directory's is
        listener.bind(name)
        place = os.open("s", os.O_PATH | os.O_CLOEXEC, dir_fd=handle)
        os.unlink("s", dir_fd=handle)
        listener.listen()
    except BaseException:
        listener.close()
        raise
    finally:
        os.close(handle)
        os.rmdir(directory)
    return listener, place

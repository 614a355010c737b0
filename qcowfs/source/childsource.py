"""An NBD server of our own, in a child process, as a source: the child ends with it, whatever happens.

Used by foreign. Nobody else can talk to the child: its socket has no name any more by the time it starts. One thread
starts it and waits for its end; the kernel kills it when that thread is gone, and so when this process is.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Hashable, Sequence

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
        uri = f"nbd+unix:///?socket=/proc/self/fd/{self._socket}".encode()
        super().__init__(name, uri, patience, where, tls=False, certificates=None, keys=None)
        self._command, self._image = command, image
        self._process: subprocess.Popen[bytes] | None = None
        self._started = threading.Event()
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
        self._closing = True
        super().close()
        if self._thread.ident is not None:
            self._started.wait()
            if self._process is not None:
                self._process.kill()
            self._thread.join()
        self._listener.close()
        if self._socket >= 0:
            os.close(self._socket)
            self._socket = -1
        if self._base is not None:
            self._base.close()

    def _serve(self) -> None:
        try:
            self._process = self._start()
        except OSError as error:
            self._words = str(error)
            self.fail(errno.EIO)
            return
        finally:
            self._started.set()
        assert self._process.stderr is not None
        with self._process.stderr as said:
            for line in iter(lambda: said.readline(limits.MAX_CHILD_LINE), b""):
                if line.startswith(SAYS) or not self._words:  # what follows is a hint, or a library's chatter
                    self._words = printable(line.rstrip().removeprefix(SAYS))
        self._process.wait()
        self.fail(errno.EIO)
        if self._connected and not self._closing:
            logger.warning("%s: nothing more is read: qemu-nbd ended: %s", self.name, self._words or "killed")

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

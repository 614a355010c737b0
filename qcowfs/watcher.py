"""`-o auto_unmount`: a process that outlives the daemon and takes a mount away whose daemon died.

Used by mount.py, before the first thread. libfuse has an option of the same name, but up to version 3.14 it does
nothing for an ordinary user without allow_other, and it does not look whether the mount is still the same one.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from typing import NoReturn

from qcowfs import mountpoint
from qcowfs.errors import QcowfsError

__all__ = ["Watcher"]

DONE = b"."  # what a daemon says that ends as it should


class Watcher:
    """The daemon's side: while this process lives, the watcher waits.

    Args:
        path: real path of the mount point.
        device: "major:minor" of the mount.
    """

    def __init__(self, path: str, device: str) -> None:
        reader, self._writer = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            _watch(reader, path, device)
        os.close(reader)

    def dismiss(self) -> None:
        """Let the watcher end without doing anything."""
        with suppress(BrokenPipeError):  # somebody killed it
            os.write(self._writer, DONE)
        os.close(self._writer)
        os.waitpid(self._pid, 0)


def _watch(reader: int, path: str, device: str) -> NoReturn:
    """Wait for the daemon's end; never returns into the daemon's code."""
    try:
        _let_go_of_everything_but(reader)
        os.setsid()
        if os.read(0, 1) != DONE and _is_dead(path, device):
            mountpoint.unmount(path, lazy=True)
    except (OSError, QcowfsError):
        pass  # nobody is left who could be told
    finally:
        os._exit(0)


def _let_go_of_everything_but(reader: int) -> None:
    """Close FUSE's descriptor above all: the kernel takes the daemon for dead only when nobody has it any more."""
    os.dup2(reader, 0)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _is_dead(path: str, device: str) -> bool:
    """Tell whether our mount is still there, without a daemon. A new one may have taken its place, and its number."""
    mount = mountpoint.uppermost(path)
    if mount is None or mount.type != mountpoint.TYPE or mount.device != device:
        return False
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno in mountpoint.DEAD
    return False

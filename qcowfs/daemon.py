"""Going into the background: the fork, the pipe on which the child says how it went, the log of a daemon.

Used by cli/mount.py. The fork comes before the first thread and before trio, whose file descriptors must not be shared.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

from qcowfs import _sandbox
from qcowfs.errors import QcowfsError, printable

__all__ = ["inherited_descriptors", "log_to_file", "run"]

SYSLOG_SOCKET = "/dev/log"
MAX_MESSAGE = 4096  # characters; names come from images
MAX_REPORT = 65536  # bytes: a pipe holds as much before anybody reads

logger = logging.getLogger("qcowfs.daemon")


def inherited_descriptors() -> list[int]:
    """Return the descriptors above 2 that this process was started with; call it before anything is opened.

    A daemon that keeps them would hold locks and pipes of the shell that started it. Those of 0 to 2 that are closed
    are opened here, so that no image ever gets one of these numbers.
    """
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            break
    listed = [int(name) for name in os.listdir("/proc/self/fd")]
    return [descriptor for descriptor in listed if descriptor > 2 and _is_open(descriptor)]


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False  # the one that listed the others
    return True


def log_to_file(path: str) -> logging.Handler:
    """Open `path` as the log. It may be moved away at any time, as logrotate does.

    Raises:
        QcowfsError: it cannot be written.
    """
    try:
        path = os.path.abspath(path)  # a daemon's working directory is "/"
        handler = logging.handlers.WatchedFileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise QcowfsError(f"{printable(path)}: cannot open the log file: {error.strerror}") from error
    handler.setFormatter(logging.Formatter("%(asctime)s qcowfs[%(process)d] %(levelname)s: %(message)s"))
    return handler


def run(serve: Callable[[Callable[[], None]], int], *, close: Sequence[int], log: logging.Handler | None) -> None:
    """Fork, run `serve` in the child, and return in the parent when the child called what `serve` was given.

    Args:
        serve: does the work; its argument is to be called when it is ready.
        close: descriptors that the child shall not keep.
        log: where the child logs once it is ready; syslog if None.

    Raises:
        QcowfsError: the child failed before it was ready, and is gone. Message, hint and exit code are the child's.
    """
    reader, writer = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_child(partial(_serve_for, parent, serve), writer, close, log)
    os.close(writer)
    try:
        report = _read_all(reader)
    except BaseException:  # Ctrl-C while waiting: the child, in its own session, did not hear it
        os.kill(child, signal.SIGTERM)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(reader)
    if report != b"ready":
        raise _failure(report, child)


def _serve_for(parent: int, serve: Callable[[Callable[[], None]], int], ready: Callable[[], None]) -> int:
    """Serve, but for nobody if `parent` is killed before all is ready."""
    _sandbox.hear_of_parents_end(signal.SIGTERM)
    if os.getppid() != parent:
        return 128 + signal.SIGTERM
    return serve(ready)


def _read_all(reader: int) -> bytes:
    """Return what the child says before it closes its end."""
    report = b""
    while len(report) < MAX_REPORT and (part := os.read(reader, MAX_REPORT)):
        report += part
    return report


def _failure(report: bytes, child: int) -> QcowfsError:
    _, status = os.waitpid(child, 0)
    if not report:
        return QcowfsError(f"the daemon ended without a word (exit code {os.waitstatus_to_exitcode(status)})")
    told: dict[str, Any] = json.loads(report)
    error = QcowfsError(told["what"], hint=told["hint"])
    error.exit_code = told["exit_code"]
    return error


def _run_child(
    serve: Callable[[Callable[[], None]], int], writer: int, close: Sequence[int], log: logging.Handler | None
) -> NoReturn:
    """Live and die in the child; never returns into the parent's code."""
    code = 1
    child = _Child(writer, close, log)
    try:
        os.setsid()
        code = serve(child.ready)
    except BaseException as error:
        child.failed(error)
    finally:
        logging.shutdown()
        os._exit(code)


class _Child:
    """The child's side of the pipe."""

    def __init__(self, writer: int, close: Sequence[int], log: logging.Handler | None) -> None:
        self._writer = writer
        self._close = close
        self._log = log
        self._is_ready = False

    def ready(self) -> None:
        """Let go of everything that is the parent's, then tell it."""
        _log_only_to(self._log or _syslog())
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        for descriptor in (null, *self._close):
            with suppress(OSError):
                os.close(descriptor)
        _sandbox.hear_of_parents_end(0)
        self._say(b"ready")
        self._is_ready = True

    def failed(self, error: BaseException) -> None:
        """Tell why there is no mount; later than that, only the log can know."""
        if self._is_ready:
            logger.critical("the mount is dead", exc_info=error)
            return
        expected = error if isinstance(error, QcowfsError) else None
        if expected is None:
            logger.debug("internal error", exc_info=error)
        told = {
            "what": (str(expected) if expected else f"internal error: {error!r}")[:MAX_MESSAGE],
            "hint": expected.hint if expected else "--debug shows more",
            "exit_code": expected.exit_code if expected else 1,
        }
        self._say(json.dumps(told).encode())

    def _say(self, report: bytes) -> None:
        os.write(self._writer, report)
        os.close(self._writer)


def _log_only_to(handler: logging.Handler) -> None:
    """Send every logger's lines, pyfuse3's and trio's too, to `handler` and nowhere else."""
    ours = logging.getLogger("qcowfs")
    for other in list(ours.handlers):
        ours.removeHandler(other)
    ours.propagate = True
    logging.getLogger().handlers[:] = [handler]
    sys.excepthook = lambda kind, error, trace: logger.critical("internal error", exc_info=(kind, error, trace))


def _syslog() -> logging.Handler:
    """Return a handler for syslog or the journal; one that drops everything where neither listens."""
    try:
        handler = logging.handlers.SysLogHandler(SYSLOG_SOCKET, logging.handlers.SysLogHandler.LOG_DAEMON)
    except OSError:
        return logging.NullHandler()
    handler.ident = f"qcowfs[{os.getpid()}]: "
    return handler

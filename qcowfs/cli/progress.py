"""A line on a terminal that tells how far a long work has come: bytes, rate, time to go.

Used by the verbs that copy. Nothing is shown where standard error is no terminal.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from qcowfs.cli.output import human_size

__all__ = ["Progress", "on_terminal"]

INTERVAL = 0.2  # seconds between two lines
BAR = 24  # characters
CLEAR_LINE = "\r\x1b[K"


def on_terminal() -> bool:
    """Tell whether somebody would see it."""
    return sys.stderr is not None and sys.stderr.isatty()


class Progress:
    """Shows and, at the end of the `with` block, takes away the line.

    Args:
        label: what is being done, to be shown as it is.
        total: bytes.
    """

    def __init__(self, label: str, total: int) -> None:
        self._label = label
        self._total = total
        self._started = time.monotonic()
        self._shown = 0.0

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown:
            print(CLEAR_LINE, end="", file=sys.stderr, flush=True)

    def report(self, done: int) -> None:
        """Show that `done` bytes are done, if the last line is not just as new."""
        now = time.monotonic()
        if now - self._shown >= INTERVAL:
            self._shown = now
            print(
                CLEAR_LINE + line(self._label, done, self._total, now - self._started),
                end="",
                file=sys.stderr,
                flush=True,
            )


def line(label: str, done: int, total: int, seconds: float) -> str:
    """Return what is shown after `seconds`."""
    share = min(1.0, done / total) if total else 1.0
    filled = int(share * BAR)
    rate = done / seconds if seconds > 0 else 0.0
    to_go = f"{_clock((total - done) / rate)} to go" if rate > 0 else "--:-- to go"
    bar = "#" * filled + "." * (BAR - filled)
    return (
        f"{label} [{bar}] {share:4.0%}  {human_size(done)} of {human_size(total)}  {human_size(int(rate))}/s  {to_go}"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

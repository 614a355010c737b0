"""What a program prints on a terminal of its own."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
from collections.abc import Sequence

__all__ = ["on_a_terminal"]


def on_a_terminal(words: Sequence[str], stream: str) -> tuple[int, bytes]:
    """Run a program to its end; return its exit code, and what it wrote to the terminal that is its `stream`.

    Args:
        stream: "stdout" or "stderr"; the other one goes nowhere.
    """
    terminal, ours = pty.openpty()
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | {stream: ours}
    try:
        with subprocess.Popen(words, **streams) as process:  # type: ignore[call-overload]
            os.close(ours)
            said = b""
            with contextlib.suppress(OSError):  # EIO: nobody has the other side
                while data := os.read(terminal, 1 << 16):
                    said += data
    finally:
        os.close(terminal)
    return process.returncode, said

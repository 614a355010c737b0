"""How long a program takes, and how much memory it has at most. Used by exports.

Linux counts what the process that starts a program has as the program's own peak (ru_maxrss survives execve), so a
small one is put in between.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["Measured", "measured"]

STARTER = """
import json, os, sys, time
start = time.monotonic()
_, status, used = os.wait4(os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ), 0)
told = [time.monotonic() - start, used.ru_maxrss * 1024, os.waitstatus_to_exitcode(status)]
os.write(int(sys.argv[1]), json.dumps(told).encode())
"""


class Measured(NamedTuple):
    """What a program took.

    Attributes:
        seconds: from its start to its end.
        peak: bytes that it had in memory at most; 10 MiB where it had less.
        code: its exit code.
    """

    seconds: float
    peak: int
    code: int


def measured(command: Sequence[str | Path], cwd: Path | None = None) -> Measured:
    """Run `command` to its end."""
    reading, writing = os.pipe()
    try:
        words = [sys.executable, "-I", "-S", "-c", STARTER, str(writing), *map(str, command)]
        subprocess.run(words, cwd=cwd, pass_fds=(writing,), check=True)
    finally:
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            told = pipe.read()
    return Measured(*json.loads(told))

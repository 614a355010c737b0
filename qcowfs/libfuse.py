"""How libfuse is spoken to: options as it parses them, and reasons that it gives on standard error only.

Used by mount.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from qcowfs.errors import FuseUnavailable, MountpointError, QcowfsError

__all__ = ["LibfuseOption", "escaped", "refusal", "standard_error_captured"]


class LibfuseOption(str):
    """An option that is not ASCII: pyfuse3 encodes options as ASCII, libfuse takes any bytes."""

    __slots__ = ()

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return os.fsencode(str(self))


def escaped(value: str) -> str:
    """Return `value` so that libfuse's option parser gives it back: a comma ends an option, a backslash escapes."""
    return value.replace("\\", "\\\\").replace(",", "\\,")


@contextmanager
def standard_error_captured() -> Iterator[Callable[[], str]]:
    """Catch what C code writes to standard error; libfuse and fusermount3 tell their reasons only there."""
    memory = os.memfd_create("qcowfs-stderr")
    saved = os.dup(2)
    os.dup2(memory, 2)
    try:
        yield lambda: os.fsdecode(os.pread(memory, 4096, 0))
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(memory)


def refusal(directory: str, said: str) -> QcowfsError:
    """Return the error for what libfuse and fusermount3 `said`, in one line."""
    reasons = [line.removeprefix("fusermount3: ").removeprefix("fuse: ") for line in said.splitlines() if line.strip()]
    what = f"FUSE refused: {'; '.join(reasons) or 'no reason given'}"
    if "mountpoint" in said or "mounting over" in said:
        return MountpointError(directory, what)
    return FuseUnavailable(f"{directory}: {what}")

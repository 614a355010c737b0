"""What the log hears of reads that failed: each fault once, and not too many in a row.

Used by vfs/node.py; any thread. A damaged image under a loop mount can fail a million reads a minute, and every
one of them answers EIO to its reader anyway.
"""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable

from qcowfs.errors import QcowfsError, TreeFault

__all__ = ["FaultLog"]

MAX_REMEMBERED = 4096  # faults that are known not to be new; beyond it only the rate below holds
BURST = 20  # lines at once
LINES_PER_SECOND = 0.2  # after a burst

logger = logging.getLogger("qcowfs.mount")


class FaultLog:
    """Logs faults; `clock` gives seconds and is a parameter for the tests.

    Attributes:
        stale: is called, by any thread, when a file was found to be gone by who read it; None: nobody wants to know.
    """

    stale: Callable[[], None] | None = None

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards all of the following
        self._known: set[str] = set()  # the lines that were logged, or would have been
        self._allowance = float(BURST)  # lines that may be logged now
        self._refilled = clock()  # when the allowance was last counted
        self._dropped = 0  # lines since the last one that was logged

    def report(self, name: str, fault: QcowfsError) -> None:
        """Log `fault` of the file `name`, unless it is known or the log has had enough for now."""
        self._report(f"{name}: {fault}")
        if fault.errno == errno.ESTALE and self.stale is not None:
            self.stale()

    def report_tree(self, fault: TreeFault) -> None:
        """Log a fault that names the tree it is in, in the same way."""
        self._report(str(fault))

    def _report(self, line: str) -> None:
        with self._lock:
            if line in self._known:
                return
            if len(self._known) < MAX_REMEMBERED:
                self._known.add(line)
            if not self._allowed():
                self._dropped += 1
                return
            dropped, self._dropped = self._dropped, 0
        logger.error("%s%s", line, f" (and {dropped} more faults before it)" if dropped else "")

    def _allowed(self) -> bool:
        now = self._clock()
        self._allowance = min(BURST, self._allowance + (now - self._refilled) * LINES_PER_SECOND)
        self._refilled = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True

"""Following a device: a thread that notices when the chain of a machine's disk becomes another one.

Used by the command line, for a mount. It looks once a second, and at once when a job ends: QEMU has events for jobs,
but none for snapshots. A monitor serves one client at a time, so the thread holds it for a second only, and then
lets go of it for a moment: whoever waits for it, `qcowfs snapshot` say, gets it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from qcowfs.errors import QcowfsError
from qcowfs.qmp.devices import find_device
from qcowfs.qmp.files import DeviceFiles, locate
from qcowfs.qmp.monitor import Monitor

__all__ = ["DeviceFollower"]

HOLD_SECONDS = 1.0  # that the monitor is held, waiting for events; others wait for it as long
EVENT_SECONDS = 0.05  # from an event to the look: a job tells of several states in a row, and a look costs QEMU time
RELEASE_SECONDS = 0.2  # that it is left to others, who are at its socket by then
RETRY_SECONDS = 3.0  # after a look that failed: the machine may be off

logger = logging.getLogger("qcowfs.qmp")


class DeviceFollower:
    """Looks at one device from `start` to `stop`.

    Args:
        files: the chain as it is known.

    Attributes:
        files: the chain as it was seen last. Any thread.
        ended: nobody has answered since then. Any thread.
    """

    def __init__(self, files: DeviceFiles) -> None:
        self.files = files
        self._changed: Callable[[DeviceFiles], None] | None = None
        self.ended = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="qcowfs-qmp", daemon=True)

    def start(self, changed: Callable[[DeviceFiles], None]) -> None:
        """Start looking; call it after the last fork.

        Args:
            changed: is called, in the follower's thread, with each chain that is another one than the last; also with
                the last one when the machine has ended, since nobody writes its image then.
        """
        self._changed = changed
        self._thread.start()

    def stop(self, seconds: float = 0.0) -> None:
        """Look no more, and wait up to `seconds` for the look that is under way."""
        self._stop.set()
        if self._changed is not None:
            self._thread.join(seconds)

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self._look_for_a_while()
            except QcowfsError as error:
                self._lost(error)
                self._stop.wait(RETRY_SECONDS)
            except Exception:  # the mount lives without it
                logger.exception("internal error")
                self._stop.wait(RETRY_SECONDS)
            else:
                self._stop.wait(RELEASE_SECONDS)

    def _look_for_a_while(self) -> None:
        with Monitor(self.files.address) as monitor:
            until = time.monotonic() + HOLD_SECONDS
            self._look(monitor)
            while not self._stop.is_set() and monitor.wait(max(0.0, until - time.monotonic())):
                self._stop.wait(EVENT_SECONDS)
                self._look(monitor)

    def _look(self, monitor: Monitor) -> None:
        device, known = find_device(monitor, self.files.device.word), self.files
        same = (device.images, device.read_only, monitor.process)
        if same == (known.device.images, known.device.read_only, known.process) and not self.ended:
            return
        self.files = locate(self.files.address, device, monitor.process)
        self.ended = False
        self._tell()

    def _lost(self, error: QcowfsError) -> None:
        """The machine has ended, or its monitor is somebody else's for long."""
        logger.debug("%s", error)
        if not self.ended:
            self.ended = True
            self._tell()

    def _tell(self) -> None:
        if self._stop.is_set() or self._changed is None:
            return
        try:
            self._changed(self.files)
        except QcowfsError as error:
            logger.warning("%s", error)

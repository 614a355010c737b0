"""Following a device: a thread that notices when the chain of a machine's disk becomes another one.

Used by the command line, for a mount. It looks once a second, and at once when a job ends: QEMU has events for jobs,
but none for snapshots. A monitor serves one client at a time, so the thread holds it for some seconds only,
and then lets go of it for a moment: whoever waits for it, `qcowfs snapshot` say, gets it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from qcowfs.errors import QcowfsError
from qcowfs.qmp.address import Address
from qcowfs.qmp.devices import Device, find_device
from qcowfs.qmp.files import DeviceFiles, locate
from qcowfs.qmp.monitor import Monitor

__all__ = ["Follower"]

LOOK_SECONDS = 1.0  # between two looks, if no event comes
HOLD_SECONDS = 3.0  # that the monitor is held; others wait for it 10 seconds and more
RELEASE_SECONDS = 0.2  # that it is left to others, who wait at its socket already
RETRY_SECONDS = 3.0  # after a look that failed: the machine may be off

logger = logging.getLogger("qcowfs.qmp")


class Follower:
    """Looks at one device from `start` to `stop`.

    Args:
        files: the chain as it is known.
        word: that means the device: its name, id or node.
        changed: is called, in the follower's thread, with each chain that is another one than the last; also with the
            last one when the machine has ended, since nobody writes its image then.
    """

    def __init__(self, files: DeviceFiles, word: str, changed: Callable[[DeviceFiles], None]) -> None:
        self._address: Address = files.address
        self._word = word
        self._changed = changed
        self._known = files
        self._ended = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="qcowfs-qmp", daemon=True)

    def start(self) -> None:
        """Start looking; call it after the last fork."""
        self._thread.start()

    def stop(self, seconds: float = 0.0) -> None:
        """Look no more, and wait up to `seconds` for the look that is under way."""
        self._stop.set()
        self._thread.join(seconds)

    def _follow(self) -> None:
        while not self._stop.is_set():
            try:
                self._look_for_a_while()
            except QcowfsError as error:
                self._lost(error)
                self._stop.wait(RETRY_SECONDS)
            else:
                self._stop.wait(RELEASE_SECONDS)

    def _look_for_a_while(self) -> None:
        with Monitor(self._address) as monitor:
            until = time.monotonic() + HOLD_SECONDS
            while not self._stop.is_set():
                self._look(monitor)
                if time.monotonic() >= until:
                    return
                monitor.wait(LOOK_SECONDS)

    def _look(self, monitor: Monitor) -> None:
        device = find_device(monitor, self._word)
        if _same(device, self._known.device) and not self._ended:
            return
        files = locate(self._address, device, monitor.process)
        self._ended = False
        self._known = files
        self._tell(files)

    def _lost(self, error: QcowfsError) -> None:
        """The machine has ended, or its monitor is somebody else's for long."""
        logger.debug("%s", error)
        if not self._ended:
            self._ended = True
            self._tell(self._known)

    def _tell(self, files: DeviceFiles) -> None:
        if self._stop.is_set():
            return
        try:
            self._changed(files)
        except QcowfsError as error:
            logger.warning("%s", error)


def _same(one: Device, other: Device) -> bool:
    return one.images == other.images

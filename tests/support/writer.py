"""QEMU with a disk and no machine: it has the image open for writing, makes and deletes snapshots, and writes at once.

Its block layer is that of a running virtual machine, and so are its locks, but it starts in a tenth of a second. One
thread at a time.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["DISK", "Writer"]

DISK = "disk0"  # the device's name for QMP
PATIENCE = 60


class Writer:
    """Use it in a `with`."""

    def __init__(self, image: Path) -> None:
        self._image = image
        self._process: subprocess.Popen[str] | None = None
        self._events: list[str] = []  # that came since the last command was sent

    def __enter__(self) -> Self:
        drive = f"file={self._image},format=qcow2,if=none,id={DISK},node-name=node0"
        words = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]
        self._process = subprocess.Popen(
            [*words, "-drive", drive],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            stderr=subprocess.STDOUT,
        )
        self._line()
        self.qmp("qmp_capabilities")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.stdin.close()  # type: ignore[union-attr]
        self._process.terminate()
        self._process.stdout.read()  # type: ignore[union-attr]
        self._process.wait(PATIENCE)
        self._process.stdout.close()  # type: ignore[union-attr]

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Return what a command of QMP returns; "_" stands for "-" in the names of arguments."""
        words = {name.replace("_", "-"): value for name, value in arguments.items()}
        assert self._process is not None and self._process.stdin is not None
        self._events.clear()
        print(json.dumps({"execute": command, "arguments": words}), file=self._process.stdin, flush=True)
        while True:
            said = self._line()
            assert "error" not in said, (command, said)
            if "return" in said:
                return said["return"]
            self._events.append(said.get("event", ""))  # a job may be quicker than the answer

    def write(self, pattern: int, offset: int, length: int) -> None:
        """Fill a range of the disk with a byte, down to the image."""
        for command in (f"write -P {pattern} {offset} {length}", "flush"):
            self.qmp("human-monitor-command", command_line=f'qemu-io {DISK} "{command}"')

    def snapshot(self, name: str) -> None:
        """Make an internal snapshot."""
        self.qmp("blockdev-snapshot-internal-sync", device=DISK, name=name)

    def delete(self, name: str) -> None:
        """Delete an internal snapshot."""
        self.qmp("blockdev-snapshot-delete-internal-sync", device=DISK, name=name)

    def wait_event(self, name: str) -> None:
        """Wait for an event of QMP's, which the last command leads to."""
        while name not in self._events:
            self._events.append(self._line().get("event", ""))

    def _line(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
            assert "error" not in line and "failed" not in line, line  # what qemu-io prints
        raise AssertionError("QEMU ended")

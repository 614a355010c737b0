"""A real virtual machine for tests and the demo: QEMU boots Debian's kernel and runs commands for us.

Without KVM on purpose (TCG): it works everywhere and always the same. Commands go over the second serial port and QMP
over another, each a socket pair, so nothing here has a path that could be too long or stay behind. Every wait has a
limit, and the kernel kills QEMU when the thread that started it ends. One thread at a time.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support import bootimage

QEMU = "qemu-system-x86_64"
BOOT_SECONDS = 90.0  # about 3 on an idle machine
COMMAND_SECONDS = 60.0
QMP_SECONDS = 30.0
STOP_SECONDS = 30.0


class MachineError(Exception):
    """QEMU or the guest did not do what it was told; holds what they said."""


class CommandFailed(MachineError):
    """A command in the guest ended with another status than 0."""

    def __init__(self, command: str, status: int, output: str) -> None:
        super().__init__(f"guest: {command}: exit status {status}\n{output}")
        self.status = status
        self.output = output


class QmpError(MachineError):
    """QMP answered a command with an error."""


class Machine:
    """One virtual machine; use it in a `with`.

    Attributes:
        disks: the images, in order /dev/vda, /dev/vdb, ...; QMP knows them as `disk0`, `disk1`, ... They are qcow2, or
            raw where their names end so.
        events: the QMP events that came so far, oldest first.
    """

    def __init__(
        self, disks: Sequence[Path | str], *, directory: Path, memory: int = 256, more: Sequence[str] = ()
    ) -> None:
        """`directory`: where QEMU runs, with relative names beginning there, and leaves its logs. `memory` in MiB.

        `more`: words for QEMU's command line.
        """
        self.disks = tuple(disks)
        self.events: list[dict[str, Any]] = []
        self._directory = directory
        self._kernel_log = directory / "guest-kernel.log"
        self._qemu_log = directory / "qemu.log"
        self._memory = memory
        self._more = tuple(more)
        self._process: subprocess.Popen[bytes] | None = None
        self._console: Lines | None = None
        self._monitor: Lines | None = None
        self._commands = 0

    def __enter__(self) -> Machine:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    @property
    def shown_command(self) -> str:
        """The command line of QEMU, for a person to read."""
        return shlex.join(self._qemu_words(bootimage.prepare(), "3", "4"))

    def start(self) -> None:
        """Boot, and return when the guest takes commands."""
        boot = bootimage.prepare()
        our_console, its_console = socket.socketpair()
        our_monitor, its_monitor = socket.socketpair()
        self._console = Lines("the guest", our_console)
        self._monitor = Lines("QMP", our_monitor)
        with its_console, its_monitor:
            self._process = self._launch(boot, its_console.fileno(), its_monitor.fileno())
        try:
            self._wait_until_ready()
        except BaseException:
            self.kill()
            raise

    def run(self, command: str, timeout: float = COMMAND_SECONDS) -> str:
        """Run a shell command (one line) in the guest and return its output. Raises CommandFailed."""
        status, output = self.try_run(command, timeout)
        if status != 0:
            raise CommandFailed(command, status, output)
        return output

    def try_run(self, command: str, timeout: float = COMMAND_SECONDS) -> tuple[int, str]:
        """Run a shell command (one line) in the guest; return its exit status and output."""
        if "\n" in command:
            raise ValueError("one line is one command")
        self._commands += 1
        marker = f"=={os.getpid()}.{self._commands}=="
        self._type(f"{marker} {command}\n")
        lines = self._lines_until(marker, time.monotonic() + timeout)
        return int(lines.pop().removeprefix(marker)), "".join(f"{line}\n" for line in lines)

    def qmp(self, command: str, timeout: float = QMP_SECONDS, **arguments: Any) -> Any:
        """Run a QMP command and return what it returns. A `_` in a name stands for QMP's `-`. Raises QmpError."""
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        self._send_qmp({"execute": command, "arguments": named})
        answer = self._next_qmp(time.monotonic() + timeout)
        if "error" in answer:
            raise QmpError(f"{command}: {answer['error']['desc']}")
        return answer["return"]

    def poweroff(self) -> None:
        """Unmount everything in the guest, switch it off, and wait for QEMU to end."""
        self._type("off sync; umount -a -r; poweroff -f\n")
        self._wait_for_end()

    def quit(self) -> None:
        """End QEMU at once, through QMP: for the guest, the mains fails; for the images, all is written."""
        self._send_qmp({"execute": "quit"})
        self._wait_for_end()

    def kill(self) -> None:
        """End QEMU the hard way, if it still runs. Never fails, always collects the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
        for lines in (self._console, self._monitor):
            if lines is not None:
                lines.close()

    def _launch(self, boot: bootimage.BootImage, console: int, monitor: int) -> subprocess.Popen[bytes]:
        command = self._qemu_words(boot, str(console), str(monitor))
        with self._qemu_log.open("wb") as log:
            return subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
                pass_fds=[console, monitor],
                start_new_session=True,  # Ctrl-C is ours to handle, not the guest's
            )

    def _qemu_words(self, boot: bootimage.BootImage, console: str, monitor: str) -> list[str]:
        command = [QEMU, "-accel", "tcg", "-cpu", "max", "-m", str(self._memory)]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-kernel", str(boot.kernel), "-initrd", str(boot.initramfs)]
        # The CPU "max" has RDRAND; trusted, it makes the random numbers that mkfs waits for ready at once.
        # no_timer_check: on a busy machine the timer comes too late for the kernel to believe that it works.
        # panic=-1: a dead kernel ends QEMU.
        command += ["-append", "console=ttyS0 quiet panic=-1 no_timer_check random.trust_cpu=on"]
        command += ["-chardev", f"socket,id=console,fd={console}", "-chardev", f"socket,id=monitor,fd={monitor}"]
        command += ["-serial", f"file:{self._kernel_log.name}", "-serial", "chardev:console"]
        command += ["-mon", "chardev=monitor,mode=control"]
        for number, disk in enumerate(self.disks):
            path = str(disk).replace(",", ",,")
            disk_format = "raw" if path.endswith(".raw") else "qcow2"
            command += ["-drive", f"id=disk{number},if=virtio,format={disk_format},file={path}"]
        return [*command, *self._more]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        greeting = self._next_qmp(deadline)
        if "QMP" not in greeting:
            raise MachineError(f"QMP greets with {greeting}")
        self.qmp("qmp_capabilities")
        self._lines_until("READY", deadline)

    def _lines_until(self, marker: str, deadline: float) -> list[str]:
        """Return the guest's lines up to the one that begins with `marker`.

        Output that does not end in a line break has the marker behind it: then the line is cut in two.
        """
        lines: list[str] = []
        while True:
            before, found, after = self._console_line(deadline).partition(marker)
            if before or not found:
                lines.append(before)
            if found:
                return [*lines, found + after]

    def _console_line(self, deadline: float) -> str:
        if self._console is None:
            raise MachineError("the machine was not started")
        return self._read(self._console, deadline)

    def _type(self, text: str) -> None:
        if self._console is None:
            raise MachineError("the machine was not started")
        self._console.write(text.encode())

    def _send_qmp(self, message: dict[str, Any]) -> None:
        if self._monitor is None:
            raise MachineError("the machine was not started")
        self._monitor.write(json.dumps(message).encode() + b"\n")

    def _next_qmp(self, deadline: float) -> dict[str, Any]:
        """Return the next message that is not an event."""
        if self._monitor is None:
            raise MachineError("the machine was not started")
        while True:
            message: dict[str, Any] = json.loads(self._read(self._monitor, deadline))
            if "event" not in message:
                return message
            self.events.append(message)

    def _read(self, lines: Lines, deadline: float) -> str:
        try:
            return lines.next(deadline)
        except MachineError as error:
            raise MachineError(f"{error}\n{self._post_mortem()}") from None

    def _post_mortem(self) -> str:
        logs = (self._qemu_log, self._kernel_log)
        return "\n".join(f"{log.name}: {_tail(log)}" for log in logs)

    def _wait_for_end(self) -> None:
        if self._process is None:
            raise MachineError("the machine does not run")
        try:
            status = self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            raise MachineError(f"QEMU still runs after {STOP_SECONDS:.0f} s\n{self._post_mortem()}") from None
        finally:
            self.kill()
        if status != 0:
            raise MachineError(f"QEMU ended with status {status}\n{self._post_mortem()}")


class Lines:
    """Whole lines from a socket, each waited for until a deadline."""

    def __init__(self, who: str, stream: socket.socket) -> None:
        self._who = who
        self._stream = stream
        self._pending = b""

    def next(self, deadline: float) -> str:
        """Return the next line without its end. Raises MachineError at the deadline or at the end of the stream."""
        while b"\n" not in self._pending:
            self._pending += self._some_bytes(deadline)
        line, _, self._pending = self._pending.partition(b"\n")
        return line.rstrip(b"\r").decode(errors="replace")

    def write(self, data: bytes) -> None:
        try:
            self._stream.sendall(data)
        except OSError as error:
            raise MachineError(f"{self._who} went away: {error.strerror}") from None

    def close(self) -> None:
        self._stream.close()

    def _some_bytes(self, deadline: float) -> bytes:
        self._stream.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            data = self._stream.recv(65536)
        except TimeoutError:
            raise MachineError(f"{self._who} said nothing in time; last: {self._pending[-200:]!r}") from None
        except OSError as error:
            raise MachineError(f"{self._who} went away: {error.strerror}") from None
        if not data:
            raise MachineError(f"{self._who} went away")
        return data


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace") if log.exists() else ""
    return text[-1000:].strip() or "(empty)"

"""An iSCSI target: tgtd, in user space, on a port of its own, with files as LUNs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.support import need

__all__ = ["Target"]

START = 10  # seconds within which tgtd answers
IQN = "iqn.2024-01.example:disks"


class Target:
    """One tgtd with one target. LUN 0 is tgtd's own, of another type than a disk.

    Args:
        directory: for its sockets; a short path.
    """

    def __init__(self, directory: Path) -> None:
        need("tgtd", "tgtadm")
        self.port = _free_port()
        self.iqn = IQN
        self._environment = os.environ | {"TGT_IPC_SOCKET": str(directory / "s")}
        self._log = directory / "tgtd.log"
        self._set_up: list[list[str]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self.start()
        self.admin("--op", "new", "--mode", "target", "--tid", "1", "-T", self.iqn)
        self.admin("--op", "bind", "--mode", "target", "--tid", "1", "-I", "ALL")

    def url(self, lun: int, *, secret: str = "") -> str:
        return f"iscsi://{secret}127.0.0.1:{self.port}/{self.iqn}/{lun}"

    def add(self, lun: int, file: Path, *words: str, **parameters: str) -> str:
        """Make `file` a LUN; return its URL. `parameters` are those of `tgtadm --params`."""
        unit = ("--mode", "logicalunit", "--tid", "1", "--lun", str(lun))
        self.admin("--op", "new", *unit, "-b", str(file), *words)
        if parameters:
            joined = ",".join(f"{name}={value}" for name, value in parameters.items())
            self.admin("--op", "update", *unit, "--params", joined)
        return self.url(lun)

    def remove(self, lun: int) -> None:
        self.admin("--op", "delete", "--mode", "logicalunit", "--tid", "1", "--lun", str(lun))

    def ask_for_password(self, user: str, password: str, *, outgoing: tuple[str, str] | None = None) -> None:
        """Let in only who knows the password; with `outgoing` the target shows user and password of its own, too."""
        self.admin("--op", "new", "--mode", "account", "--user", user, "--password", password)
        self.admin("--op", "bind", "--mode", "account", "--tid", "1", "--user", user)
        if outgoing:
            self.admin("--op", "new", "--mode", "account", "--user", outgoing[0], "--password", outgoing[1])
            self.admin("--op", "bind", "--mode", "account", "--tid", "1", "--user", outgoing[0], "--outgoing")

    def admin(self, *words: str) -> None:
        """Run tgtadm; what it sets up is set up again after `restart`."""
        self._set_up.append(list(words))
        self._run(words)

    def _run(self, words: tuple[str, ...] | list[str]) -> None:
        command = ["tgtadm", "-C", "1", "--lld", "iscsi", *words]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=START)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}{self._log.read_text()}"

    def start(self) -> None:
        """Start tgtd, with what was set up in the one before it."""
        command = ["tgtd", "-f", "-C", "1", "--iscsi", f"portal=127.0.0.1:{self.port}"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log)
        end = time.monotonic() + START
        while True:
            try:
                self._run(["--op", "show", "--mode", "sys"])
                break
            except AssertionError:
                if time.monotonic() > end or self._process.poll() is not None:
                    raise
                time.sleep(0.02)
        # Who may log in comes last: who did before would see units that are not what they will be.
        for words in sorted(self._set_up, key=lambda words: "ALL" in words):
            self._run(words)

    def kill(self) -> None:
        """End tgtd without a word to anybody."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """Let it neither answer nor close its connections."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        self.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

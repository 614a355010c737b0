"""An SSH server on a port of 127.0.0.1, and an agent with the key that opens it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import need
from tests.support.mounts import wait_until
from tests.support.nbd import free_port, listens

__all__ = ["ssh_server"]


@contextmanager
def ssh_server(directory: Path) -> Iterator[tuple[int, str]]:
    """Run the server with files of its own in `directory`; yields its port, and SSH_AUTH_SOCK for clients."""
    need("sshd", "ssh-keygen", "ssh-agent", "ssh-add")
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / key], check=True)
    port = free_port()
    options = {
        "ListenAddress": f"127.0.0.1:{port}",
        "HostKey": directory / "host",
        "AuthorizedKeysFile": directory / "user.pub",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
        "Subsystem": "sftp internal-sftp",
    }
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # for the privileges that it drops
    words = [word for option, value in options.items() for word in ("-o", f"{option}={value}")]
    server = subprocess.Popen(
        [str(shutil.which("sshd")), "-D", "-e", "-f", "/dev/null", *words], stderr=subprocess.DEVNULL
    )
    said = subprocess.check_output(["ssh-agent", "-s", "-a", str(directory / "agent")], text=True)
    agent = re.findall(r"SSH_AGENT_PID=(\d+)", said)[0]
    try:
        environment = {**os.environ, "SSH_AUTH_SOCK": str(directory / "agent"), "SSH_AGENT_PID": agent}
        subprocess.run(["ssh-add", "-q", directory / "user"], check=True, env=environment)
        wait_until(lambda: listens(port), "sshd does not listen")
        yield port, str(directory / "agent")
        subprocess.run(["ssh-agent", "-k"], check=True, env=environment, capture_output=True)
    finally:
        server.kill()
        server.wait()

"""nginx, serving a directory on 127.0.0.1."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.mounts import wait_until

__all__ = ["Nginx", "free_port", "nginx"]

_CONFIGURATION = """
daemon off;
{user}
pid {work}/pid;
error_log {work}/error.log;
worker_processes 1;
events {{ worker_connections 512; }}
http {{
    log_format connection $connection;
    access_log {work}/connections.log connection;
    client_body_temp_path {work}/body;
    proxy_temp_path {work}/proxy;
    fastcgi_temp_path {work}/fastcgi;
    uwsgi_temp_path {work}/uwsgi;
    scgi_temp_path {work}/scgi;
    server {{ listen 127.0.0.1:{port}{tls}; root {root}; {server} }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """A server that runs.

    Attributes:
        root: what it serves.
        work: where it writes.
        base: the URL of `root`, without a slash at its end.
    """

    root: Path
    work: Path
    base: str

    def connections(self) -> int:
        """Return how many connections have carried requests so far."""
        return len(set((self.work / "connections.log").read_text().split()))


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Tell whether somebody listens on `port`."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def nginx(
    directory: Path, *, port: int = 0, server: str = "", certificate: tuple[Path, Path] | None = None
) -> Iterator[Nginx]:
    """Serve directory/root until the end of the block.

    Args:
        port: 0: one that is free.
        server: more lines of the server's configuration.
        certificate: files of a certificate and its key: it speaks TLS.
    """
    root, work = directory / "root", directory / "work"
    root.mkdir(exist_ok=True)
    work.mkdir(exist_ok=True)
    port = port or free_port()
    if certificate is not None:
        server += f"ssl_certificate {certificate[0]}; ssl_certificate_key {certificate[1]};"
    text = _CONFIGURATION.format(
        user="user root;" if Path("/proc/self").stat().st_uid == 0 else "",
        work=work,
        port=port,
        root=root,
        server=server,
        tls=" ssl" if certificate else "",
    )
    (work / "nginx.conf").write_text(text)
    words = ["nginx", "-c", str(work / "nginx.conf"), "-p", str(work), "-e", str(work / "error.log")]
    with subprocess.Popen(words) as process:
        try:
            wait_until(lambda: answers(port), "nginx listens")
            yield Nginx(root, work, f"{'https' if certificate else 'http'}://127.0.0.1:{port}")
        finally:
            process.terminate()

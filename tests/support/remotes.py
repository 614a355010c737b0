"""One image on a server of each protocol, behind a network that a test can make bad.

Real servers: tgtd, nbdkit, sshd; and nginx, which speaks as much of the stores' protocols as is read here.
"""

from __future__ import annotations

import getpass
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.support import need
from tests.support.badnetwork import BadNetwork
from tests.support.iscsi import Target
from tests.support.nbd import certificates, free_port, nbdkit
from tests.support.nginx import Nginx, nginx
from tests.support.ssh import ssh_server

__all__ = ["ENVIRONMENTS", "REMOTES", "Served"]

AWS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
}
AZURE = {"AZURE_STORAGE_ACCOUNT_NAME": "account", "AZURE_SKIP_SIGNATURE": "true"}
# Where the stores are that a URL does not name.
ENVIRONMENTS: dict[str, Callable[[str], dict[str, str]]] = {
    "s3": lambda server: {**AWS, "AWS_ENDPOINT_URL": f"http://{server}"},
    "gs": lambda server: {"STORAGE_EMULATOR_HOST": server},
    "az": lambda server: {**AZURE, "AZURE_STORAGE_ENDPOINT": f"http://{server}"},
}
# What Google's store sends besides, and a way to make the server say that it cannot.
STORE = "add_header x-goog-generation 1; if (-f {work}/down) {{ return 503; }} access_log {work}/requests.log;"


@dataclass(frozen=True)
class Served:
    """An image on a server.

    Attributes:
        url: of the image, through `network`.
        environment: variables that whoever opens it needs.
        web: the web server that has it; None: one of another kind.
    """

    network: BadNetwork
    url: str
    environment: dict[str, str] = field(default_factory=dict)
    web: Nginx | None = None


@contextmanager
def _iscsi(image: Path, directory: Path) -> Iterator[Served]:
    target = Target(directory)
    try:
        target.add(1, image)
        with BadNetwork(target.port) as network:
            yield Served(network, target.url(1).replace(str(target.port), str(network.port)))
    finally:
        target.close()


@contextmanager
def _nbd(image: Path, directory: Path) -> Iterator[Served]:
    need("nbdkit")
    port = free_port()
    with nbdkit(port, "file", image), BadNetwork(port) as network:
        yield Served(network, f"nbd://127.0.0.1:{network.port}/")


@contextmanager
def _nbds(image: Path, directory: Path) -> Iterator[Served]:
    need("nbdkit", "certtool")
    certificates(directory)
    port = free_port()
    words = ["--tls=require", f"--tls-certificates={directory}/server", "file", image]
    with nbdkit(port, *words), BadNetwork(port) as network:
        yield Served(network, f"nbds://localhost:{network.port}/?tls-certificates={directory}/right")


@contextmanager
def _web(image: Path, directory: Path, scheme: str = "http") -> Iterator[Served]:
    need("nginx")
    with nginx(directory, server=STORE.format(work=directory / "work")) as web:
        (web.root / "images").mkdir()
        shutil.copy(image, web.root / "images/disk")
        with BadNetwork(int(web.base.rpartition(":")[2])) as network:
            server = f"127.0.0.1:{network.port}"
            if scheme == "http":
                yield Served(network, f"http://{server}/images/disk", web=web)
            else:
                yield Served(network, f"{scheme}://images/disk", ENVIRONMENTS[scheme](server), web)


@contextmanager
def _https(image: Path, directory: Path) -> Iterator[Served]:
    need("nginx", "certtool")
    certificates(directory)
    papers = directory / "server/server-cert.pem", directory / "server/server-key.pem"
    with nginx(directory, server=STORE.format(work=directory / "work"), certificate=papers) as web:
        shutil.copy(image, web.root / "disk")
        with BadNetwork(int(web.base.rpartition(":")[2])) as network:
            trust = {"SSL_CERT_FILE": str(directory / "right/ca-cert.pem")}
            yield Served(network, f"https://localhost:{network.port}/disk", trust, web)


def _store(scheme: str) -> Callable[[Path, Path], AbstractContextManager[Served]]:
    return lambda image, directory: _web(image, directory, scheme)


@contextmanager
def _ssh(image: Path, directory: Path) -> Iterator[Served]:
    need("sshd", "ssh-agent", "qemu-nbd")
    with ssh_server(directory) as (port, agent), BadNetwork(port) as network:
        url = f"ssh://{getpass.getuser()}@127.0.0.1:{network.port}{image}?host_key_check=no"
        yield Served(network, url, {"SSH_AUTH_SOCK": agent})


# Each takes the image, a qcow2 file, and an empty directory whose path is short.
REMOTES: dict[str, Callable[[Path, Path], AbstractContextManager[Served]]] = {
    "iscsi": _iscsi,
    "nbd": _nbd,
    "nbds": _nbds,
    "http": _web,
    "https": _https,
    "s3": _store("s3"),
    "gs": _store("gs"),
    "az": _store("az"),
    "ssh": _ssh,
}

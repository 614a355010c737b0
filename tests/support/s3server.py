"""Ceph's object gateway with the cluster behind it: a real S3 server, in memory, on 127.0.0.1.

One monitor, one OSD that keeps objects in memory, and radosgw: Debian's packages. The strictest that starts here: it
checks signatures, conditions and ranges as Amazon's does, which the servers made for tests do not.
"""

from __future__ import annotations

import json
import subprocess
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.support.mounts import wait_until
from tests.support.nginx import free_port

__all__ = ["KEY", "SECRET", "S3Server", "s3_server"]

KEY, SECRET = "testkey", "testsecret+/="

# What is not obvious: radosgw insists on an encrypted way to the monitor, which a cluster without keys does not have;
# and by default the monitor takes a second for each change, of which there are a dozen until the gateway is ready.
_CONFIGURATION = """
[global]
fsid = {fsid}
mon host = v2:127.0.0.1:{mon}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
ms mon client mode = crc
auth cluster required = none
auth service required = none
auth client required = none
run dir = {directory}
admin socket =
log file = {directory}/$name.log
pid file =
crash dir = {directory}
mon data = {directory}/mon
osd data = {directory}/osd
osd objectstore = memstore
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 1
osd pool default pgp num = 1
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
osd class load list = *
osd class default list = *
mon allow pool size one = true
mon data avail crit = 0
paxos propose interval = 0.02
paxos min wait = 0.01
[client.rgw.x]
ms mon client mode = crc
rgw frontends = beast endpoint=127.0.0.1:{port}
rgw data = {directory}/rgw
rgw thread pool size = 64
rgw dynamic resharding = false
rgw enable quota threads = false
rgw enable lc threads = false
rgw enable gc threads = false
rgw run sync thread = false
rgw override bucket index max shards = 1
"""


class S3Server:
    """A gateway that runs, with one user, KEY and SECRET.

    Attributes:
        endpoint: its URL.
    """

    def __init__(self, port: int) -> None:
        import botocore.session
        from botocore.config import Config

        self.endpoint = f"http://127.0.0.1:{port}"
        session = botocore.session.Session()
        self.client: Any = session.create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(request_checksum_calculation="when_required", response_checksum_validation="when_required"),
        )

    def put(self, bucket: str, key: str, content: bytes) -> None:
        """Store an object."""
        self.client.put_object(Bucket=bucket, Key=key, Body=content)


@contextmanager
def s3_server(directory: Path) -> Iterator[S3Server]:
    """Run a cluster with a gateway until the end of the block."""
    port = free_port()
    configuration = directory / "ceph.conf"
    facts: Mapping[str, object] = {"fsid": uuid.uuid4(), "mon": free_port(), "port": port, "directory": directory}
    configuration.write_text(_CONFIGURATION.format(**facts))
    with ExitStack() as stack:
        _start_cluster(stack, directory, configuration, facts)
        admin = ["radosgw-admin", "-c", str(configuration), "-n", "client.rgw.x"]
        names = ["--uid=tester", "--display-name=tester", f"--access-key={KEY}", f"--secret={SECRET}"]
        made = subprocess.run([*admin, "user", "create", *names], check=True, capture_output=True, timeout=100)
        assert json.loads(made.stdout)["user_id"] == "tester"
        _start(stack, ["radosgw", "-f", "-c", str(configuration), "-n", "client.rgw.x"])
        wait_until(lambda: _answers(port), "radosgw answers", 90)
        yield S3Server(port)


def _start_cluster(stack: ExitStack, directory: Path, configuration: Path, facts: Mapping[str, object]) -> None:
    for name in ("mon", "osd", "rgw"):
        (directory / name).mkdir()
    named = ["-c", str(configuration)]
    monitors = str(directory / "monmap")
    address = f"[v2:127.0.0.1:{facts['mon']}]"
    _run(["monmaptool", "--create", "--fsid", str(facts["fsid"]), "--addv", "a", address, monitors])
    _run(["ceph-mon", *named, "--mkfs", "-i", "a", "--monmap", monitors])
    _start(stack, ["ceph-mon", "-f", *named, "-i", "a"])
    osd = str(uuid.uuid4())
    _run(["ceph", *named, "osd", "new", osd])
    _run(["ceph-osd", *named, "-i", "0", "--mkfs", "--osd-uuid", osd])
    _start(stack, ["ceph-osd", "-f", *named, "-i", "0"])


def _run(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def _start(stack: ExitStack, words: list[str]) -> None:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop() -> None:
        process.kill()  # nothing of it is kept, and its farewell takes seconds
        process.wait()

    stack.callback(stop)


def _answers(port: int) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2) as answer:
        return bool(answer.status == 200)
    return False

"""What an image in an object store costs: requests and bytes, as the proxy before the gateway of Ceph logs them.

Each turn mounts anew: without a directory of blocks, and with one that an earlier mount has filled.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.images import Image
from bench.rivals import our_command, qcowfs
from tests.support.nginx import Nginx, nginx
from tests.support.s3server import KEY, SECRET, s3_server

BUCKET, NAME = "images", "image.qcow2"
URL = f"s3://{BUCKET}/{NAME}"
STEPS = ("list", "mount", "ls", "one small file")
SMALL = "0006/needle-6"  # contents.write_file_system
KEPT = ", blocks kept"  # behind a step: with a directory that has them
LOGGED = re.compile(r'" \d{3} (\d+) "')


def turns(image: Image, stack: ExitStack, directory: Path, in_bytes: bool) -> dict[str, Callable[[int], float]]:
    """Return what measures each step: its requests, or its bytes if `in_bytes`."""
    server = stored(image, directory, stack)
    kept = directory / "kept"
    costs: dict[tuple[int, str], tuple[int, int]] = {}

    def turn(step: str, options: tuple[str, ...], suffix: str) -> Callable[[int], float]:
        def measure(number: int) -> float:
            if step == STEPS[0]:
                with TemporaryDirectory(dir=directory) as name:
                    for done, cost in zip(STEPS, steps(server, Path(name), options), strict=True):
                        costs[number, done + suffix] = cost
            return float(costs[number, step + suffix][in_bytes])

        return measure

    ways = {"": (), KEPT: ("--cache-dir", str(kept))}
    with TemporaryDirectory(dir=directory) as name:
        steps(server, Path(name), ways[KEPT])
    return {step + suffix: turn(step, options, suffix) for suffix, options in ways.items() for step in STEPS}


def stored(image: Image, directory: Path, stack: ExitStack) -> Nginx:
    """Put the image into a store; return the proxy that everybody asks."""
    (directory / "s").mkdir()
    (directory / "p").mkdir()
    store = stack.enter_context(s3_server(directory / "s"))
    store.client.create_bucket(Bucket=BUCKET)
    with image.path.open("rb") as file:
        store.client.put_object(Bucket=BUCKET, Key=NAME, Body=file)
    passed = f"proxy_pass {store.endpoint}; proxy_set_header Host $http_host; proxy_buffering off;"
    log = f"access_log {directory}/p/work/requests.log combined;"
    server = stack.enter_context(nginx(directory / "p", server=f"{log} location / {{ {passed} }}"))
    known = {"AWS_ENDPOINT_URL": server.base, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET}
    os.environ.update(known, AWS_EC2_METADATA_DISABLED="true")
    return server


def steps(server: Nginx, directory: Path, options: tuple[str, ...]) -> list[tuple[int, int]]:
    """Return the requests and bytes of each of STEPS; each is done after the one before it."""
    log = server.work / "requests.log"
    found = []

    def count(do: Callable[[], object]) -> None:
        log.write_bytes(b"")
        do()
        sizes = LOGGED.findall(log.read_text())
        found.append((len(sizes), sum(map(int, sizes))))

    count(lambda: subprocess.run(our_command("list", *options, URL), check=True, stdout=subprocess.DEVNULL))
    try:
        count(lambda: qcowfs("mount", *options, URL, directory))
        inside = directory / "current"
        count(lambda: os.listdir(inside))
        count(inside.joinpath(SMALL).read_bytes)
    finally:
        qcowfs("umount", directory)
    return found

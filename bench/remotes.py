"""Reading an image on a server of this machine: qcowfs and QEMU's driver of the same protocol, which each turn mounts.

Cold is the first pass over the list of offsets; warm is the second, so that the list must not be longer than what a
cache of remote blocks holds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import reader
from bench.images import Image
from bench.reader import OffsetList
from bench.rivals import OURS, QEMU, exported, shown
from bench.works import REMOTE_SEQUENTIAL, Work
from tests.support.iscsi import Target
from tests.support.nbd import free_port, nbdkit
from tests.support.nginx import nginx

LUN = 1
WARM = 32 << 20  # bytes of the disk that are read twice: half of our cache
LONG = 86_400.0  # seconds: a pass ends by itself


@dataclass(frozen=True)
class Place:
    """An image on a server.

    Attributes:
        url: as qcowfs is given it.
        snapshot: the internal snapshot that is read, or "".
        driver: the same for QEMU, the words of a --blockdev.
    """

    url: str
    snapshot: str
    driver: str


def turns(
    work: Work, image: Image, offsets: OffsetList, stack: ExitStack, directory: Path, seconds: float
) -> dict[str, Callable[[int], float]]:
    """Return what measures a turn of each rival, in reads a second."""
    below = directory / "t"
    below.mkdir()
    place = SERVERS[work.server](image, below, stack)

    def turn(show: Callable[[Place, Path], AbstractContextManager[Path]]) -> Callable[[int], float]:
        def measure(number: int) -> float:
            with TemporaryDirectory(dir=directory) as name, show(place, Path(name)) as file:
                if not work.cold:
                    reader.measure(file, offsets, work.jobs, LONG, 0, passes=1)
                passes = 1 if work.kind == REMOTE_SEQUENTIAL else 0
                return reader.measure(file, offsets, work.jobs, seconds, 0 if passes else number, passes)

        return measure

    return {name: turn(SHOWN[name]) for name in work.rivals}


def iscsi(image: Image, directory: Path, stack: ExitStack) -> Place:
    """A logical unit of tgtd."""
    target = Target(directory)
    stack.callback(target.close)
    url = target.add(LUN, image.path)
    where = f"transport=tcp,portal=127.0.0.1:{target.port},target={target.iqn},lun={LUN}"
    return Place(url, image.snapshot, f"driver=iscsi,{where}")


def nbd(image: Image, directory: Path, stack: ExitStack) -> Place:
    """An export of nbdkit, over TCP as the others."""
    port = free_port()
    server = stack.enter_context(nbdkit(port, "file", image.path))
    return Place(server.url, image.snapshot, f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={port}")


def http(image: Image, directory: Path, stack: ExitStack) -> Place:
    """A file that nginx serves."""
    (directory / "root").mkdir()
    (directory / "root" / "image.qcow2").symlink_to(image.path.resolve())
    url = f"{stack.enter_context(nginx(directory)).base}/image.qcow2"
    return Place(url, image.snapshot, f"driver=http,url={url}")


SERVERS: dict[str, Callable[[Image, Path, ExitStack], Place]] = {"iSCSI": iscsi, "NBD": nbd, "HTTP": http}
SHOWN: dict[str, Callable[[Place, Path], AbstractContextManager[Path]]] = {
    OURS: lambda place, directory: shown(place.url, place.snapshot, directory),
    QEMU: lambda place, directory: exported(place.driver, directory),
}

"""Reading an image on a LUN of an iSCSI target: qcowfs and QEMU's driver; each turn mounts anew, so it is cold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bench import reader
from bench.images import Image
from bench.reader import OffsetList
from bench.rivals import OURS, QEMU, qcowfs, running, wait_until
from bench.works import LUN_SEQUENTIAL, Work
from tests.support.iscsi import Target

LUN = 1


def turns(
    work: Work, image: Image, offsets: OffsetList, stack: ExitStack, directory: Path, seconds: float
) -> dict[str, Callable[[int], float]]:
    """Return what measures a turn of each rival, in reads a second."""
    place = directory / "t"
    place.mkdir()
    target = Target(place)
    stack.callback(target.close)
    target.add(LUN, image.path)

    def turn(show: Callable[[Target, Path], AbstractContextManager[Path]]) -> Callable[[int], float]:
        def measure(number: int) -> float:
            with TemporaryDirectory(dir=directory) as name, show(target, Path(name)) as file:
                passes = 1 if work.kind == LUN_SEQUENTIAL else 0
                return reader.measure(file, offsets, work.jobs, seconds, number, passes)

        return measure

    return {OURS: turn(our_mount), QEMU: turn(qemu_export)}


@contextmanager
def our_mount(target: Target, directory: Path) -> Iterator[Path]:
    qcowfs("mount", target.url(LUN), directory)
    try:
        yield directory / "current.raw"
    finally:
        qcowfs("umount", directory)


@contextmanager
def qemu_export(target: Target, directory: Path) -> Iterator[Path]:
    file = directory / "export.raw"
    file.touch()
    where = f"transport=tcp,portal=127.0.0.1:{target.port},target={target.iqn},lun={LUN}"
    command = [
        QEMU,
        *("--blockdev", f"driver=iscsi,node-name=lun,read-only=on,{where}"),
        *("--blockdev", "driver=qcow2,node-name=disk,read-only=on,file=lun"),
        *("--export", f"type=fuse,id=export,node-name=disk,writable=off,mountpoint={file}"),
    ]
    with running(command) as daemon:
        wait_until(daemon, lambda: file.stat().st_size > 0)
        yield file

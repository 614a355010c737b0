"""Programs that show an image as one file, each mounted while a `with` lasts, and the references beside them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bench.images import Image
from bench.programs import BUILT, HERE, compiled, run

PATIENCE = 20.0  # seconds until a file must be there
STEP = 0.001  # seconds between two looks; what a first byte may be late by
OURS, PLAIN_PATH = "qcowfs", "qcowfs --no-data-plane"
QEMU, NBD, QCOWMOUNT = "qemu-storage-daemon", "qemu-nbd + nbdfuse", "qcowmount"
LIMIT, RAW, OWN_PLAIN, EMPTY = "C limit", "raw file", "qcowfs, plain image", "empty pyfuse3"
PEERS = (QEMU, NBD, QCOWMOUNT)


class CannotShowError(Exception):
    """A rival that cannot show an image, with the reason; it is left out with a note."""


@dataclass(frozen=True)
class Rival:
    """How one rival is put up.

    Attributes:
        name: as the tables say it.
        show: called with the image and an empty directory for mount points; yields the file.
        needs: the programs without which it is left out.
    """

    name: str
    show: Callable[[Image, Path], AbstractContextManager[Path]]
    needs: tuple[str, ...] = ()

    def lacking(self) -> str:
        """Return why it cannot run on this machine, or ""."""
        missing = [name for name in self.needs if shutil.which(name) is None]
        return f"{', '.join(missing)} not installed" if missing else ""


def qcowfs(*words: str | Path) -> None:
    """Run the command line of this checkout."""
    subprocess.run(our_command(*words), check=True, cwd=HERE.parent)


def our_command(*words: str | Path) -> list[str]:
    """Return the command line of this checkout."""
    return [interpreter(), "-m", "qcowfs", *map(str, words)]


@cache
def interpreter() -> str:
    """Return a Python that has this checkout as an installed package is had.

    The import hook of an editable installation takes 30 ms of each start, and compiling the modules again, as where
    PYTHONDONTWRITEBYTECODE is set, 40 ms: nobody who installs qcowfs has either.
    """
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = str(BUILT / "bytecode")
    directory = BUILT / "python"
    run(sys.executable, "-m", "venv", "--without-pip", "--clear", directory)
    (site,) = directory.glob("lib/python*/site-packages")
    site.joinpath("qcowfs.pth").write_text("\n".join([str(HERE.parent), sysconfig.get_path("purelib"), ""]))
    return str(directory / "bin" / "python")


@cache
def our_options() -> str:
    """Return the help of `qcowfs mount`, to see what this checkout knows."""
    return subprocess.run(our_command("mount", "--help"), check=True, capture_output=True, text=True).stdout


@contextmanager
def our_mount(image: Image, directory: Path, *options: str) -> Iterator[Path]:
    """qcowfs as its users start it: the command returns when the mount is ready."""
    with shown(image.path, image.snapshot, directory, *options) as file:
        yield file


@contextmanager
def shown(image: Path | str, snapshot: str | None, directory: Path, *options: str) -> Iterator[Path]:
    """Mount `image`, a path or a URL, and yield the file of its snapshot, or of its active state."""
    qcowfs("mount", *options, image, directory)
    try:
        yield directory / f"{snapshot or 'current'}.raw"
    finally:
        qcowfs("umount", directory)


@contextmanager
def plain_path(image: Image, directory: Path) -> Iterator[Path]:
    """qcowfs without its data plane: pyfuse3 answers every read."""
    if PLAIN_PATH.split()[1] not in our_options():
        raise CannotShowError("this checkout has no such option")
    with our_mount(image, directory, "--no-data-plane") as file:
        yield file


@contextmanager
def qemu_export(image: Image, directory: Path) -> Iterator[Path]:
    """qemu-storage-daemon's FUSE export, over an empty file."""
    if image.snapshot:
        raise CannotShowError("it cannot show an internal snapshot")
    with exported(f"driver=file,filename={image.path}", directory) as file:
        yield file


@contextmanager
def exported(driver: str, directory: Path) -> Iterator[Path]:
    """Export the active state of the qcow2 image that `driver`, options of a block driver of QEMU's, leads to."""
    file = directory / "export.raw"
    file.touch()
    command = [
        QEMU,
        *("--blockdev", f"node-name=file,read-only=on,{driver}"),
        *("--blockdev", "driver=qcow2,node-name=disk,read-only=on,file=file"),
        *("--export", f"type=fuse,id=export,node-name=disk,writable=off,mountpoint={file}"),
    ]
    with running(command) as daemon:
        wait_until(daemon, lambda: file.stat().st_size > 0)
        yield file


@contextmanager
def nbd_mount(image: Image, directory: Path) -> Iterator[Path]:
    """qemu-nbd on a socket with nbdfuse's four connections before it; qemu-nbd's default cache mode."""
    socket, mountpoint = directory / "socket", directory / "mnt"
    mountpoint.mkdir()
    state = ("-l", f"snapshot.name={image.snapshot}") if image.snapshot else ()
    server = ["qemu-nbd", "-r", "-f", "qcow2", "-t", "-e", "8", "-k", str(socket), *state, str(image.path)]
    client = ["nbdfuse", "-r", "-C", "4", f"{mountpoint}/disk.raw", f"nbd+unix:///?socket={socket}"]
    with running(server) as daemon:
        wait_until(daemon, socket.exists)
        with running(client, mountpoint) as mounted:
            file = mountpoint / "disk.raw"
            wait_until(mounted, file.exists)
            yield file


@contextmanager
def qcowmount(image: Image, directory: Path) -> Iterator[Path]:
    """libqcow's mount; it knows no backing files, no zstd and no extended L2 entries."""
    if image.snapshot:
        raise CannotShowError("it cannot show an internal snapshot")
    done = subprocess.run(
        [QCOWMOUNT, str(image.path), str(directory)], capture_output=True, text=True, timeout=PATIENCE
    )
    if done.returncode != 0:
        raise CannotShowError("it does not mount this image")
    try:
        yield directory / "qcow1"
    finally:
        unmount(directory)


@contextmanager
def null_server(image: Image, directory: Path) -> Iterator[Path]:
    """The limit: bench/null_server.c over the raw file."""
    with running([str(compiled("null_server", "fuse3")), str(image.raw), str(directory)], directory) as server:
        file = directory / "disk.raw"
        wait_until(server, file.exists)
        yield file


@contextmanager
def raw_file(image: Image, directory: Path) -> Iterator[Path]:
    """No daemon at all."""
    yield image.raw


@contextmanager
def empty_pyfuse3(image: Image, directory: Path) -> Iterator[Path]:
    """bench/empty_pyfuse3.py, which shows nothing of the image."""
    with running([interpreter(), str(HERE / "empty_pyfuse3.py"), str(directory)], directory) as server:
        file = directory / "disk.raw"
        wait_until(server, file.exists)
        yield file


@contextmanager
def running(command: list[str], mountpoint: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon in the foreground; unmount `mountpoint` at the end, or else tell the daemon to end."""
    daemon = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield daemon
    finally:
        if mountpoint is None or not unmount(mountpoint):
            daemon.terminate()
        daemon.wait(PATIENCE)


def unmount(directory: Path) -> bool:
    """Return whether something was mounted there, and is no more."""
    return subprocess.run(["umount", str(directory)], capture_output=True).returncode == 0


def wait_until(daemon: subprocess.Popen[bytes], ready: Callable[[], bool]) -> None:
    """Wait for a daemon to be ready; its end or too long a wait means that it cannot show the image."""
    deadline = time.monotonic() + PATIENCE
    while not ready():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise CannotShowError("it does not mount this image")
        time.sleep(STEP)


def peak_memory(directory: Path) -> int:
    """Return the peak of resident bytes of all processes whose command line names `directory`, together."""
    found, named = 0, re.compile(re.escape(os.fsencode(directory)) + rb"(?![\w-])")  # no longer name that starts so
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if int(process.name) != os.getpid() and named.search((process / "cmdline").read_bytes()):
                found += high_water((process / "status").read_text())
    return found


def high_water(status: str) -> int:
    """Return VmHWM of a /proc/PID/status in bytes; a process that just ended has none."""
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


RIVALS = {
    rival.name: rival
    for rival in (
        Rival(OURS, our_mount),
        Rival(PLAIN_PATH, plain_path),
        Rival(QEMU, qemu_export, (QEMU,)),
        Rival(NBD, nbd_mount, ("qemu-nbd", "nbdfuse")),
        Rival(QCOWMOUNT, qcowmount, (QCOWMOUNT,)),
        Rival(LIMIT, null_server, ("gcc", "pkg-config")),
        Rival(RAW, raw_file),
        Rival(OWN_PLAIN, our_mount),
        Rival(EMPTY, empty_pyfuse3),
    )
}

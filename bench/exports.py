"""The two that are compared: each shows an image as one file, mounted while a `with` lasts."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 10.0  # seconds until an export must be there


def qcowfs(*words: str | Path) -> None:
    """Run the command line of this checkout."""
    subprocess.run([sys.executable, "-m", "qcowfs", *map(str, words)], check=True)


@contextmanager
def our_mount(image: Path, directory: Path) -> Iterator[Path]:
    """qcowfs: yields the file of the active state."""
    qcowfs("mount", image, directory)
    try:
        yield directory / "current.raw"
    finally:
        qcowfs("umount", directory)


@contextmanager
def qemu_export(image: Path, file: Path) -> Iterator[Path]:
    """qemu-storage-daemon's FUSE export, over `file`."""
    file.touch()
    size = file.stat().st_size
    command = [
        "qemu-storage-daemon",
        *("--blockdev", f"driver=file,node-name=file,read-only=on,filename={image}"),
        *("--blockdev", "driver=qcow2,node-name=disk,read-only=on,file=file"),
        *("--export", f"type=fuse,id=export,node-name=disk,writable=off,mountpoint={file}"),
    ]
    daemon = subprocess.Popen(command)
    try:
        wait_until_larger(file, size)
        yield file
    finally:
        daemon.terminate()
        daemon.wait()


def wait_until_larger(file: Path, size: int) -> None:
    """Wait until the export's file lies over the empty one."""
    deadline = time.monotonic() + PATIENCE
    while file.stat().st_size <= size:
        if time.monotonic() > deadline:
            raise TimeoutError(f"no export at {file}")
        time.sleep(0.002)

"""The images that are measured, made with QEMU's own tools in a directory of their own."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.mount.images import with_many_snapshots

SIZE = 512 << 20  # bytes of the plain image: small enough to stay in the page cache, large enough not to be all of it


def run(*words: str | Path) -> None:
    """Run a program that has to succeed."""
    subprocess.run([str(word) for word in words], check=True, capture_output=True)


def plain(directory: Path) -> Path:
    """Random data, uncompressed, 64 KiB clusters: nothing that a fast wrong answer could guess."""
    raw, image = directory / "plain.raw", directory / "plain.qcow2"
    with raw.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(1 << 20))
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    raw.unlink()
    return image


def thousand_snapshots(directory: Path) -> Path:
    """1,000 internal snapshots."""
    image = directory / "snapshots.qcow2"
    with_many_snapshots(image, 1000)
    return image


def huge(directory: Path) -> Path:
    """A virtual size of 64 TiB, with data near its end."""
    image = directory / "huge.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "64T")
    run("qemu-io", "-f", "qcow2", "-c", f"write -P 1 {60 << 40} 1M", image)
    return image

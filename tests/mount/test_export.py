"""`export` onto a file system that is full: what is left of it, and what is told."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs import cli
from qcowfs.errors import QcowfsError
from tests.support.mounts import shell

ROOM = 1 << 20
LENGTH = 4 << 20


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    directory = tmp_path / "small"
    directory.mkdir()
    shell('mount -t tmpfs -o size=1m small "$1"', directory)
    try:
        yield directory
    finally:
        shell('umount "$1"', directory)


@pytest.mark.parametrize("words", [(), ("-O", "qcow2"), ("-O", "qcow2", "-c"), ("--all",)])
def test_no_room_leaves_nothing_and_tells_how_much_is_missing(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(os.urandom(LENGTH))
    out = small / "current.qcow2"
    places = [small, image] if "--all" in words else [image, "current", out]

    code = cli.main(["export", "--image-format", "raw", *words, *map(str, places)])

    assert QcowfsError.exit_code == code
    assert [] == os.listdir(small)
    why = f"cannot write: {os.strerror(errno.ENOSPC)}"
    told = re.match(rf"qcowfs: {out}: {why}: up to (\S+) MiB more would be needed", capsys.readouterr().err)
    assert told is not None
    assert LENGTH - ROOM <= float(told[1]) * (1 << 20) <= LENGTH

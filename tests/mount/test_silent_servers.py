"""Mounts of images on a server that stops to answer: whoever does not want to wait can go, and the mount can end.

Evidence: own fixture on a real qemu-nbd, which is stopped. The patience is longer than a test may take.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import need
from tests.support.mounts import Mounted, in_foreground, mounted, wait_until
from tests.support.nbd import Server, qemu_nbd
from tests.support.qemu import qemu, qemu_io

need("qemu-nbd", "qemu-img", "qemu-io", "dd")

SOON = 30  # seconds, on a busy machine
PATIENCE = ("--source-timeout", "300")
READERS = 20  # more than the processors of this machine have workers

pytestmark = pytest.mark.expect_warnings


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("v")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", place / "disk", "64M")
    qemu_io(place / "disk", "write -P 1 0 32M")
    with qemu_nbd(place / "s", place / "disk", "-f", "raw") as running:
        yield running


@pytest.fixture
def point(tmp_path: Path) -> Path:
    (tmp_path / "mnt").mkdir()
    return tmp_path / "mnt"


@contextmanager
def silent(server: Server) -> Iterator[None]:
    assert server.process
    server.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        server.process.send_signal(signal.SIGCONT)


def reader(mount: Mounted, number: int) -> subprocess.Popen[bytes]:
    """Start to read a piece of the disk, past the kernel's cache. Before that dd asks for its size, and may wait."""
    words = ["dd", f"if={mount / 'current.raw'}", "of=/dev/null", "iflag=direct", "bs=64k", "count=1"]
    return subprocess.Popen([*words, f"skip={number}"], stderr=subprocess.DEVNULL)


def is_waiting(process: subprocess.Popen[bytes]) -> bool:
    """Tell whether it has asked for the piece: dd has opened the disk as its standard input, and sleeps."""
    with suppress(OSError):
        opened = Path(f"/proc/{process.pid}/fd/0").readlink().name == "current.raw"
        return opened and Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] in "SD"
    return False


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_a_reader_can_be_ended_and_then_the_mount(server: Server, point: Path, end: signal.Signals) -> None:
    with mounted(server.url, point, *PATIENCE) as mount, silent(server), reader(mount, 200) as process:
        wait_until(lambda: is_waiting(process), "it does not read")
        process.send_signal(end)

        assert -end == process.wait(SOON)
        subprocess.run(["fusermount3", "-u", str(point)], check=True)
        mount.wait_gone()


def test_a_second_signal_ends_a_mount_that_is_being_read(server: Server, point: Path) -> None:
    with in_foreground(server.url, point, *PATIENCE) as mount, silent(server), reader(mount, 200) as process:
        wait_until(lambda: is_waiting(process), "it does not read")
        mount.signal(signal.SIGINT)
        wait_until(lambda: not mount.is_mounted(), "it is still mounted")
        mount.signal(signal.SIGINT)
        mount.wait_gone()

        assert process.wait(SOON) == 1  # an error, and no signal


def test_however_many_wait_the_mount_answers_the_others(server: Server, point: Path) -> None:
    with ExitStack() as stack:
        mount = stack.enter_context(mounted(server.url, point, *PATIENCE))
        (mount / "current.raw").stat()  # counts clusters, and so asks the server
        with silent(server):
            readers = [stack.enter_context(reader(mount, number * 16)) for number in range(READERS)]
            wait_until(lambda: all(map(is_waiting, readers)), "they do not read")

            assert (
                "current.raw"
                in subprocess.run(["ls", "-f", point], capture_output=True, text=True, timeout=SOON).stdout
            )
            assert os.statvfs(point).f_blocks
        assert [0] * READERS == [process.wait(SOON) for process in readers]

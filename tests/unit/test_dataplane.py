"""The data plane on a device that is only a socket: what goes wrong there, and no mount can be made to show.

The test is the kernel: it writes requests to its end of the pair, and reads the answers there.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs._dataplane import DataPlane
from qcowfs._handles import Handles
from qcowfs._nodes import Nodes
from qcowfs._source import FileSource
from qcowfs._tables import LayerMap
from tests.support.mounts import REPOSITORY

# linux/fuse.h
GETATTR = 3
OPEN = 14
READ = 15
INTERRUPT = 36
IN_HEADER = struct.Struct("=IIQQIIIHH")
READ_IN = struct.Struct("=QQIIQII")
OUT_HEADER = struct.Struct("=IiQ")


class File:
    """What the plane asks of a file of the tree."""

    def read(self, offset: int, length: int) -> bytes:
        raise AssertionError("the disk is read without Python")

    def end(self) -> int:
        raise AssertionError("the disk is read without Python")

    def report(self, fault: Exception) -> None:
        raise AssertionError(fault)


def request(opcode: int, unique: int, body: bytes = b"") -> bytes:
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, 1, 0, 0, 0, 0, 0) + body


@contextmanager
def started(handles: Handles, *, interruptible: bool = False) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Start a plane; gives the kernel's end of the device, and pyfuse3's end of what the plane passes on."""
    kernel, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    plane = DataPlane(device.fileno(), handles, Nodes(), workers=8, helpers=0, interruptible=interruptible)
    with kernel, device:
        kernel.settimeout(10)
        plane.start()
        try:
            yield kernel, device
        finally:
            plane.stop()


def test_what_nobody_knows_is_passed_on_and_the_answer_comes_back() -> None:
    with started(Handles()) as (kernel, pyfuse3):
        kernel.send(request(GETATTR, 2))
        passed_on = pyfuse3.recv(1 << 16)
        pyfuse3.send(OUT_HEADER.pack(OUT_HEADER.size, -errno.ENOENT, 2))
        answer = kernel.recv(1 << 16)

    assert passed_on == request(GETATTR, 2)
    assert answer == OUT_HEADER.pack(OUT_HEADER.size, -errno.ENOENT, 2)


def test_an_interrupt_that_is_noticed_before_its_request_ends_it() -> None:
    """Two threads have them, and either may be quicker. The kernel does not say it again."""
    with started(Handles(), interruptible=True) as (kernel, pyfuse3):
        kernel.send(request(INTERRUPT, 5, struct.pack("=Q", 4)))
        kernel.send(request(INTERRUPT, 7, struct.pack("=Q", 6)))
        kernel.send(request(GETATTR, 2))
        assert pyfuse3.recv(1 << 16) == request(GETATTR, 2)
        kernel.send(request(GETATTR, 4))
        first = kernel.recv(1 << 16)
        kernel.send(request(OPEN, 6))  # harms nobody only if it is answered by who did it

        assert first == OUT_HEADER.pack(OUT_HEADER.size, -errno.EINTR, 4)
        assert pyfuse3.recv(1 << 16) == request(OPEN, 6)


def test_what_cannot_be_passed_on_is_answered() -> None:
    """Nobody else would answer it, and who asked would wait until the mount is gone."""
    with started(Handles()) as (kernel, pyfuse3):
        pyfuse3.shutdown(socket.SHUT_RDWR)
        kernel.send(request(GETATTR, 2))

        assert kernel.recv(1 << 16) == OUT_HEADER.pack(OUT_HEADER.size, -errno.EIO, 2)


def test_messages_are_as_large_as_this_machine_allows() -> None:
    """A listing of 128 KiB has to fit whatever net.core.wmem_default says."""
    most = int(Path("/proc/sys/net/core/wmem_max").read_text())

    with started(Handles()) as (_, pyfuse3):
        assert pyfuse3.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) >= min(most, 512 << 10)


@pytest.mark.expect_warnings
def test_a_file_that_is_cut_off_is_told_of_once_however_many_have_it_open(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"x" * 512)
    source = FileSource(os.open(path, os.O_RDONLY), str(path))
    disk = Disk([LayerMap.raw(source, depth=0, virtual_size=4096)], 4096, Cache(1 << 20))
    handles = Handles()
    numbers = [handles.attach(disk, File()) for _ in range(3)]

    with started(handles) as (kernel, _):
        for number in numbers:
            kernel.send(request(READ, 2, READ_IN.pack(number, 0, 4096, 0, 0, 0, 0)))
            assert kernel.recv(1 << 16)[OUT_HEADER.size :] == b"x" * 512 + bytes(3584)

    assert len([record for record in caplog.records if "past the end" in record.getMessage()]) == 1


WITHOUT_THREADS = """
import os, pwd, resource, socket, sys, threading
sys.path.insert(0, sys.argv[1])
from tests.unit.test_dataplane import READ, READ_IN, GETATTR, Handles, request, started

INTERRUPT = 36

def size():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmSize")) >> 10

class Slow:
    called, done = threading.Event(), threading.Event()
    def read(self, offset, length):
        self.called.set()
        self.done.wait()
        return b""

handles, slow = Handles(), Slow()
number = handles.attach(None, slow)
if os.geteuid() == 0:
    os.setuid(pwd.getpwnam("nobody").pw_uid)  # no limit stops root
with started(handles) as (kernel, pyfuse3):
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
    kernel.send(request(READ, 2, READ_IN.pack(number, 0, 512, 0, 0, 0, 0)))
    slow.called.wait()
    before = size()
    for _ in range(5000):  # each of them leaves nobody waiting, so a thread is wanted
        kernel.send(request(INTERRUPT, 3))
    kernel.send(request(GETATTR, 4))
    pyfuse3.recv(1 << 16)
    print(size() - before)
    slow.done.set()
"""


def test_threads_that_are_not_to_be_had_cost_no_memory() -> None:
    words = [sys.executable, "-c", WITHOUT_THREADS, str(REPOSITORY)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 16  # MiB; 72 KiB for each request were 350

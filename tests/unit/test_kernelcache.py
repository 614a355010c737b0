"""What is written to the FUSE device, byte by byte as linux/fuse.h has it."""

from __future__ import annotations

import os
import socket
import struct

from qcowfs.kernelcache import KernelCache


def test_names_and_then_the_root_are_to_be_forgotten() -> None:
    ours, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    cache = KernelCache(device.detach())
    cache.forget([b"a.raw", b"a"])
    cache.close()
    messages = [ours.recv(4096) for _ in range(3)]
    ours.close()

    assert messages[0] == struct.pack("=IiQ", 38, 3, 0) + struct.pack("=QII", 1, 5, 0) + b"a.raw\0"
    assert messages[1] == struct.pack("=IiQ", 34, 3, 0) + struct.pack("=QII", 1, 1, 0) + b"a\0"
    assert messages[2] == struct.pack("=IiQ", 40, 2, 0) + struct.pack("=Qqq", 1, 0, 0)


def test_a_mount_that_is_gone_has_nothing_to_forget() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    cache = KernelCache(reader)  # not to be written to

    cache.forget([b"a.raw"])
    cache.close()

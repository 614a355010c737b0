"""A file system with one file, whose reads in some range wait until they are let go: a source that is slow.

`python -m tests.support.slow FILE DIRECTORY START END` shows FILE as DIRECTORY/slow. Each read that waits is a line on
standard output; a line, or the end, of standard input lets all of them go, and those to come. Nothing depends on time.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyfuse3
import trio

from tests.support.mounts import PATIENCE, REPOSITORY, force_unmount, wait_until

NAME = b"slow"
READS = "user.reads"
FILE = pyfuse3.ROOT_INODE + 1


class SlowSource:
    """The file system, in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], path: Path) -> None:
        self._process = process
        self.path = path

    def wait_for_reads(self, count: int) -> None:
        """Wait until `count` more reads wait."""
        assert self._process.stdout is not None
        for _ in range(count):
            assert self._process.stdout.readline() == "waiting\n"

    @property
    def reads(self) -> int:
        """How often what is slow was read so far."""
        return int(os.getxattr(self.path, READS))

    def let_go(self) -> None:
        """Answer all reads, those to come too."""
        assert self._process.stdin is not None
        if not self._process.stdin.closed:
            self._process.stdin.close()


@contextmanager
def slow_source(file: Path, directory: Path, start: int, end: int) -> Iterator[SlowSource]:
    """Show `file` below `directory`; reads that begin from `start` on, and before `end`, wait."""
    directory.mkdir()
    words = [sys.executable, "-m", "tests.support.slow", str(file), str(directory), str(start), str(end)]
    with subprocess.Popen(
        words, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        try:
            wait_until(lambda: process.poll() is not None or (directory / "slow").exists(), "it was never there")
            source = SlowSource(process, directory / "slow")
            yield source
        finally:
            source.let_go()
            force_unmount(directory)
            process.wait(PATIENCE)
    assert process.returncode == 0


class _Operations(pyfuse3.Operations):
    def __init__(self, descriptor: int, slow: range) -> None:
        super().__init__()
        self._descriptor = descriptor
        self._slow = slow
        self._reads = 0
        self.released = trio.Event()

    async def lookup(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        if name != NAME:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return await self.getattr(FILE, ctx)

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = 0o40755 if inode == pyfuse3.ROOT_INODE else 0o100644
        entry.st_size = os.fstat(self._descriptor).st_size if inode == FILE else 0
        return entry

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        return pyfuse3.FileInfo(fh=inode, direct_io=True)

    async def getxattr(self, inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> bytes:
        if name != READS.encode():
            raise pyfuse3.FUSEError(errno.ENODATA)
        return b"%d" % self._reads

    async def read(self, fh: int, off: int, size: int) -> bytes:
        self._reads += off in self._slow
        if off in self._slow and not self.released.is_set():
            print("waiting", flush=True)
            await self.released.wait()
        return os.pread(self._descriptor, size, off)


async def _serve(operations: _Operations) -> None:
    async def wait_for_release() -> None:
        await trio.lowlevel.wait_readable(0)
        operations.released.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_release)
        await pyfuse3.main(min_tasks=2, max_tasks=100)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    shown, where, start, end = sys.argv[1:]
    slow = _Operations(os.open(shown, os.O_RDONLY), range(int(start), int(end)))
    pyfuse3.init(slow, where, {*pyfuse3.default_options, "fsname=slow"} - {"default_permissions"})
    try:
        trio.run(_serve, slow)
    finally:
        pyfuse3.close()

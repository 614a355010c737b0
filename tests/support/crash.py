"""Images of ext3/ext4 file systems whose machine stopped: the journal is full of what is not yet in its place.

A file system is mounted on a loop device, a seeded storm changes it, EXT4_IOC_SHUTDOWN stops it as a power cut would,
and the image is copied before the umount, which would write every block to its place and hide what is tested.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import struct
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "LOGFLUSH",
    "MAGIC",
    "NOLOGFLUSH",
    "FileDevice",
    "Kind",
    "Storm",
    "crash",
    "mounted",
    "shut_down",
    "slow_writeback",
]

EXT4_IOC_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32)
LOGFLUSH, NOLOGFLUSH = 1, 2
WRITEBACK = ("dirty_expire_centisecs", "dirty_writeback_centisecs")
MAGIC = bytes.fromhex("c03b3998")


class FileDevice:
    """A Device (qcowfs.inside.reader) that is a file. It counts its reads."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = path.stat().st_size
        self.reads = 0
        self.bytes_read = 0

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise OSError(5, "a read past the end of the volume")
        self.reads += 1
        self.bytes_read += length
        return os.pread(self._descriptor, length, offset)

    def __del__(self) -> None:
        os.close(self._descriptor)


@contextlib.contextmanager
def mounted(image: Path, options: str = "rw", program: str = "mount") -> Iterator[Path]:
    """Mount `image` on a loop device, which is writable even if the mount is not: so recovery can write.

    Args:
        program: takes arguments as mount(8) does: "ntfs-3g", for one.
    """
    point = image.with_name(f"{image.name}.mnt")
    point.mkdir()
    find = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True)
    loop = find.stdout.strip()
    try:
        subprocess.run([program, "-o", options, loop, str(point)], check=True, capture_output=True)
        try:
            yield point
        finally:
            subprocess.run(["umount", str(point)], check=True)
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
        point.rmdir()


class Storm:
    """Seeded changes of a tree. Whatever the file system refuses (no room, no such name) is passed over."""

    def __init__(self, root: Path, rng: random.Random) -> None:
        self._root = root
        self._rng = rng
        self._files: list[Path] = []
        self._directories = [root]

    def adopt(self) -> None:
        """Change what is there already, too."""
        for at, directories, files in os.walk(self._root):
            self._directories += [Path(at, name) for name in directories if name != "lost+found"]
            self._files += [Path(at, name) for name in files]
        self._directories.sort()  # as a directory has them, they are in another order each time
        self._files.sort()

    def run(self, steps: int) -> None:
        """Change everything that can be changed."""
        self._run(
            steps,
            [self._create] * 8
            + [self._append] * 4
            + [self._delete] * 4
            + [self._rename, self._truncate, self._make_directory, self._chmod, self._link, self._symlink, self._xattr]
            + [self._remove_tree, self._flush],
        )

    def run_fast(self, steps: int) -> None:
        """Change only what fast commits can tell, and end with one of them."""
        actions = [self._create, self._append, self._delete, self._rename, self._truncate, self._link]
        self._run(steps, [*actions * 5, self._make_directory])
        self._fsync(self._root / "last", b"last")

    def _run(self, steps: int, actions: Sequence[Callable[[], None]]) -> None:
        for _ in range(steps):
            with contextlib.suppress(OSError):
                self._rng.choice(actions)()

    def _new_name(self) -> Path:
        name = f"{self._rng.choice('abcdefgh')}{self._rng.randrange(10**6):06}" + "x" * self._rng.choice(
            (0, 0, 40, 200)
        )
        return self._rng.choice(self._directories) / name

    def _content(self) -> bytes:
        length = self._rng.choice((0, 10, 1000, 4096, 9000, 70000))
        # Blocks that begin with jbd2's magic number are stored without it in the journal.
        return (MAGIC * 3 if self._rng.random() < 0.2 else b"") + self._rng.randbytes(length)

    def _fsync(self, path: Path, content: bytes) -> None:
        with path.open("ab") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def _create(self) -> None:
        path = self._new_name()
        path.write_bytes(self._content())
        self._files.append(path)

    def _append(self) -> None:
        path = self._rng.choice(self._files or [self._root])
        if self._rng.random() < 0.15:
            self._fsync(path, self._content())
        else:
            with path.open("ab") as file:
                file.write(self._content())

    def _delete(self) -> None:
        if self._files:
            self._files.pop(self._rng.randrange(len(self._files))).unlink()

    def _rename(self) -> None:
        if self._files:
            index = self._rng.randrange(len(self._files))
            self._files[index] = self._files[index].rename(self._new_name())

    def _truncate(self) -> None:
        os.truncate(self._rng.choice(self._files or [self._root]), self._rng.choice((0, 1, 5000, 100_000)))

    def _make_directory(self) -> None:
        path = self._new_name()
        path.mkdir()
        self._directories.append(path)

    def _chmod(self) -> None:
        path = self._rng.choice(self._files or [self._root])
        path.chmod(self._rng.randrange(0o1000))
        os.chown(path, self._rng.randrange(1 << 17), self._rng.randrange(1 << 17))

    def _link(self) -> None:
        path = self._new_name()
        path.hardlink_to(self._rng.choice(self._files or [self._root]))
        self._files.append(path)

    def _symlink(self) -> None:
        path = self._new_name()
        path.symlink_to("t" * self._rng.choice((1, 30, 59, 60, 900)))
        self._files.append(path)

    def _xattr(self) -> None:
        value = self._rng.randbytes(self._rng.choice((1, 60, 900)))
        os.setxattr(self._rng.choice(self._files or [self._root]), b"user.storm", value)

    def _remove_tree(self) -> None:
        """Empty a directory and remove it: its blocks are revoked, and soon used for something else."""
        if len(self._directories) < 4:
            return
        directory = self._directories.pop(self._rng.randrange(1, len(self._directories)))
        for path in [path for path in self._files if path.parent == directory]:
            path.unlink()
            self._files.remove(path)
        if directory in {path.parent for path in self._directories}:
            self._directories.append(directory)
        else:
            directory.rmdir()

    def _flush(self) -> None:
        descriptor = os.open(self._root, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _everything(storm: Storm, kind: Kind) -> None:
    storm.run(kind.steps)


@dataclass(frozen=True)
class Kind:
    """How a file system is made, mounted, changed and stopped (flushing the journal before it or not).

    `size` is in bytes.
    """

    name: str
    mkfs: Sequence[str]
    options: str = "commit=600"
    size: int = 64 << 20
    steps: int = 600
    change: Callable[[Storm, Kind], None] = _everything
    stops: Sequence[int] = (LOGFLUSH, NOLOGFLUSH)


def crash(directory: Path, kind: Kind, seed: int) -> Path:
    """Return the image of a new file system of `kind` after a seeded storm and a power cut."""
    image = directory / f"{kind.name}-{seed}.img"
    image.touch()
    os.truncate(image, kind.size)
    subprocess.run(["mkfs.ext4", "-q", "-F", *kind.mkfs, str(image)], check=True, capture_output=True)
    copy = image.with_suffix(".crash")
    with slow_writeback(), mounted(image, kind.options) as point:
        rng = random.Random(seed)
        kind.change(Storm(point, rng), kind)
        shut_down(point, rng.choice(kind.stops))
        subprocess.run(["cp", "--sparse=always", str(image), str(copy)], check=True)
    image.unlink()
    return copy


def shut_down(point: Path, how: int) -> None:
    """Cut the power of a mounted file system: LOGFLUSH or NOLOGFLUSH."""
    descriptor = os.open(point, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", how))
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def slow_writeback() -> Iterator[None]:
    """Keep the kernel from writing blocks to their places by itself.

    One process at a time: two that overlap would each take the other's setting for what was there before, and leave it.
    """
    files = [Path("/proc/sys/vm", name) for name in WRITEBACK]
    with files[0].open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = [file.read_text() for file in files]
        for file in files:
            file.write_text("360000")
        try:
            yield
        finally:
            for file, text in zip(files, before, strict=True):
                file.write_text(text)

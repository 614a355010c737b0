"""A tree with everything that is hard to show: sizes, holes, names, times, owners, attributes at their limits.

What a file system or its kernel does not take is left out of the tree. Seeded; small, but for the one file that the
caller chooses the size of.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import socket
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["plant"]

SECOND = 10**9
KEEP_SIZE, PUNCH_HOLE = 1, 2  # of fallocate(2)
LIBC = ctypes.CDLL(None, use_errno=True)
TARGETS = (1, 7, 58, 59, 60, 61, 120, 1000)  # bytes; 60 are where a target leaves the inode of ext
TIMES = (  # atime and mtime, in nanoseconds since the epoch
    (-1, -1_500_000_001),
    (-(2**31) * SECOND, 0),
    (1, 1_999_999_999),
    ((2**31 - 1) * SECOND, 2**31 * SECOND),
    (2_500_000_000 * SECOND + 5, 2**32 * SECOND + 999_999_999),
    (2_208_988_800 * SECOND, (2**33 + 12345) * SECOND + 123_456_789),
    ((2**34 - 2**31 - 1) * SECOND, 7_258_118_400 * SECOND + 987_654_321),
)
OWNERS = ((0, 0), (65535, 65535), (65536, 70000), (70000, 4_000_000_000), (4_294_967_294, 1))
HOLES = (13 << 12, 5 << 20, 70 << 20, 5 << 30, 300 << 30, (1 << 40) - 1)  # where single blocks of a file are
UNTOLD = (errno.EFBIG, errno.EOPNOTSUPP, errno.ENOSPC, errno.ERANGE, errno.E2BIG, errno.EOVERFLOW, errno.EINVAL)


def plant(root: Path, seed: int, *, big: int = 8 << 20, names: int = 4000) -> None:
    """Make the tree in `root`.

    Args:
        big: bytes of a file of random bytes.
        names: in one directory.
    """
    rng = random.Random(seed)
    (root / "big").write_bytes(rng.randbytes(big))
    _plant_sizes(root / "sizes", rng)
    _plant_fragments(root, rng)
    _plant_allocated(root / "allocated", rng)
    _plant_names(root / "names")
    _plant_kinds(root / "kinds")
    _plant_owners_and_times(root / "owners")
    _plant_attributes(root / "attributes", rng)
    _plant_nested(root)
    _plant_many(root / "many", names)


@contextlib.contextmanager
def _if_it_can() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in UNTOLD:
            raise


def _plant_sizes(at: Path, rng: random.Random) -> None:
    at.mkdir()
    for size in (0, 1, 59, 60, 61, 130, 160, 161, 900, 1023, 1024, 1025, 4095, 4096, 4097, 49152, 49153, 70000):
        (at / str(size)).write_bytes(rng.randbytes(size))
    (at / "zeros").write_bytes(bytes(70000))
    with (at / "grown").open("wb") as file:
        file.truncate(1 << 40 if _takes(at, 1 << 40) else 1 << 30)


def _takes(at: Path, size: int) -> bool:
    """Return whether a file may have so many bytes."""
    path = at / "probe"
    with path.open("wb") as file:
        try:
            file.truncate(size)
        except OSError:
            return False
        finally:
            path.unlink()
    return True


def _plant_fragments(root: Path, rng: random.Random) -> None:
    """Make a file of far places, one of so many extents that their tree is deep, and two that took turns to grow."""
    unit = os.statvfs(root).f_bsize
    with (root / "sparse").open("wb") as file:
        for place in HOLES:
            with _if_it_can():
                file.seek(place)
                file.write(rng.randbytes(1000))
                file.flush()
    with (root / "fragments").open("wb") as file:
        for number in range(4 * ((unit - 12) // 12) + 50):
            os.pwrite(file.fileno(), rng.randbytes(16), 2 * number * unit)
    with (root / "first").open("wb") as first, (root / "second").open("wb") as second:
        for _ in range(40):
            for file in (first, second):
                file.write(rng.randbytes(unit))
                file.flush()
                os.fdatasync(file.fileno())


def _plant_allocated(at: Path, rng: random.Random) -> None:
    at.mkdir()
    for name, mode, written in (("all", 0, ()), ("some", 0, (5, 9)), ("behind", KEEP_SIZE, (0,))):
        with (at / name).open("wb") as file:
            _fallocate(file.fileno(), mode, 0, 200_000)
            for block in written:
                os.pwrite(file.fileno(), rng.randbytes(5000), block * 8192 + 100)
    with (at / "punched").open("wb") as file:
        file.write(rng.randbytes(400_000))
        file.flush()
        os.fsync(file.fileno())
        for number in range(6):
            _fallocate(file.fileno(), KEEP_SIZE | PUNCH_HOLE, number * 65536 + 4096, 12288)


def _fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    call = LIBC.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    with _if_it_can():
        if call(descriptor, mode, offset, length):
            raise OSError(ctypes.get_errno(), "fallocate")


def _plant_names(at: Path) -> None:
    at.mkdir()
    names = (b"n" * 255, b"\xff\xfe not UTF-8", b"new\nline", b"back\\slash", b" ", b"...", b"\x01", "\u00fc".encode())
    for name in names:
        (Path(os.fsdecode(os.fsencode(at) + b"/" + name))).write_bytes(name)
    for length in TARGETS:
        (at / f"link{length}").symlink_to("t" * length)
    os.symlink(b"\xff/\\\n", os.fsencode(at / "odd-link"))
    (at / "dangling").symlink_to("../nothing")


def _plant_kinds(at: Path) -> None:
    at.mkdir()
    for name, kind, device in (
        ("chr", stat.S_IFCHR, os.makedev(1, 3)),
        ("blk", stat.S_IFBLK, os.makedev(255, 255)),
        ("large-chr", stat.S_IFCHR, os.makedev(300, 70000)),
        ("large-blk", stat.S_IFBLK, os.makedev(4095, 1048575)),
        ("fifo", stat.S_IFIFO, 0),
    ):
        os.mknod(at / name, kind | 0o640, device)
    here = os.getcwd()
    os.chdir(at)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("socket")
    finally:
        os.chdir(here)
    for mode in (0, 0o777, 0o4755, 0o2755, 0o1777, 0o7000):
        (at / f"mode{mode:o}").touch()
        (at / f"mode{mode:o}").chmod(mode)
    (at / "linked").write_bytes(b"linked")
    for number in range(40):
        (at / f"link{number}").hardlink_to(at / "linked")


def _plant_owners_and_times(at: Path) -> None:
    at.mkdir()
    for number, (uid, gid) in enumerate(OWNERS):
        (at / f"owned{number}").write_bytes(b"x")
        os.chown(at / f"owned{number}", uid, gid)
        (at / f"link{number}").symlink_to("x")
        os.chown(at / f"link{number}", uid, gid, follow_symlinks=False)
    for number, times in enumerate(TIMES):
        for path in (at / f"file{number}", at / f"directory{number}"):
            path.mkdir() if path.name.startswith("d") else path.touch()
            os.utime(path, ns=times)


def _plant_attributes(at: Path, rng: random.Random) -> None:
    at.mkdir()
    for size in (0, 1, 40, 256, 900, 3000, 30000):
        path = at / f"value{size}"
        path.write_bytes(b"x" * (size // 2))
        for name in ("user.some", "trusted.some", "security.some"):
            with _if_it_can():
                os.setxattr(path, name, rng.randbytes(size))
    (at / "many").mkdir()
    with _if_it_can():
        for number in range(30):
            os.setxattr(at / "many", f"user.{'n' * number}{number}", rng.randbytes(number))
    (at / "link").symlink_to("value0")
    os.setxattr(at / "link", "trusted.link", b"of a link", follow_symlinks=False)
    for length in (30, 300):
        for size in (200, 30000):
            link = at / f"link{length}-{size}"
            link.symlink_to("l" * length)
            with _if_it_can():
                os.setxattr(link, "trusted.link", rng.randbytes(size), follow_symlinks=False)
    (at / "file").touch()
    os.setxattr(
        at / "file", "system.posix_acl_access", _acl(((1, 6), (2, 4, 70001), (4, 4), (8, 7, 5), (16, 7), (32, 0)))
    )
    (at / "directory").mkdir()
    for name in ("access", "default"):
        os.setxattr(at / "directory", f"system.posix_acl_{name}", _acl(((1, 7), (2, 5, 0), (4, 5), (16, 5), (32, 5))))
    (at / "directory" / "heir").touch()


def _acl(entries: Sequence[Sequence[int]]) -> bytes:
    """Return an ACL as setxattr(2) takes it, of tags, permissions and perhaps ids."""
    packed = (struct.pack("<HHI", *entry[:2], entry[2] if len(entry) > 2 else 2**32 - 1) for entry in entries)
    return struct.pack("<I", 2) + b"".join(packed)


def _plant_nested(root: Path) -> None:
    for _ in range(40):
        root /= "nested"
        root.mkdir()
    (root / "leaf").write_bytes(b"leaf")


def _plant_many(at: Path, names: int) -> None:
    """Make a directory so large that it has an index, with gaps where names were removed."""
    at.mkdir()
    directory = os.open(at, os.O_RDONLY)
    try:
        for number in range(names):
            os.close(os.open(f"a rather long name {number:07}", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
        for number in range(0, names, 7):
            os.unlink(f"a rather long name {number:07}", dir_fd=directory)
    finally:
        os.close(directory)

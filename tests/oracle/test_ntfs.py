"""The reader of NTFS against ntfs-3g's mount of the same bytes.

Evidence: seeded trees; QCOWFS_NTFS_SEED is the seed.
"""

from __future__ import annotations

import errno
import os
import random
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qcowfs.inside import ntfs
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from qcowfs.inside.mft import mended
from qcowfs.inside.readers import open_reader
from tests.support import guesttree, lacking, need
from tests.support.crash import FileDevice, mounted
from tests.support.readertree import describe_reader, listing
from tests.support.trees import describe

need("mkntfs", "ntfs-3g", "losetup", "umount")
if ntfs.pyfsntfs is None:
    lacking("libfsntfs is not installed")
if os.geteuid() != 0:
    lacking("loop devices and mounts need root")

pytestmark = pytest.mark.xdist_group("ntfs")

SEED = int(os.environ.get("QCOWFS_NTFS_SEED", "1"))
OPTIONS = "streams_interface=xattr,compression,umask=022,noatime"
SIZE = 96 << 20
KINDS = {
    "default": (),
    "cluster-512": ("-c", "512"),
    "cluster-8k": ("-c", "8192"),
    "cluster-64k": ("-c", "65536"),
    "sector-4096": ("-s", "4096"),
}
COMPRESSED = struct.pack(">I", 0x800)
SYMLINK, JUNCTION, LINUX, CLOUD, WOF = (
    0xA000000C,
    0xA0000003,
    0xA000001D,
    0x9000001A,
    0x80000017,
)  # tags of reparse points


def make(image: Path, kind: str, change: Callable[[Path], None]) -> Path:
    """Return `image`, a new file system of `kind` whose root was given to `change`."""
    image.touch()
    os.truncate(image, SIZE)
    subprocess.run(["mkntfs", "-F", "-Q", "-q", *KINDS[kind], str(image)], check=True, capture_output=True)
    with mounted(image, OPTIONS, "ntfs-3g") as root:
        change(root)
    return image


def populate(root: Path) -> None:
    rng = random.Random(SEED)
    for name, content in guesttree.write_tree(rng, 8 << 20).items():
        path = root / name
        if content is None:
            path.mkdir(exist_ok=True)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        os.utime(path, ns=(rng.randrange(9 * 10**18), rng.randrange(9 * 10**18)))  # ntfs-3g cuts those before 1970
    many(root / "many", rng)
    pieces(root, rng)
    if os.statvfs(root).f_bsize <= 4096:  # NTFS compresses in no larger clusters, and libfsntfs takes it for damage
        compressed(root / "compressed", rng)
    special(root)


def many(directory: Path, rng: random.Random) -> None:
    directory.mkdir()
    for number in range(1500):
        (directory / f"one of many files {number}").touch()
    for number in rng.sample(range(1500), 500):
        (directory / f"one of many files {number}").unlink()


def pieces(root: Path, rng: random.Random) -> None:
    """Write every other cluster of a file, so that its runs need several records; the order is that of no other."""
    unit = os.statvfs(root).f_bsize
    with (root / "in pieces").open("wb") as file:
        for number in rng.sample(range(400), 400):
            file.seek(2 * number * unit)
            file.write(rng.randbytes(unit))
    with (root / "sparse").open("wb") as file:
        for place in rng.sample(range(0, 40 << 20, 1 << 20), 12):
            file.seek(place)
            file.write(rng.randbytes(rng.randrange(1, 200_000)))
        file.truncate(50 << 20)


def compressed(directory: Path, rng: random.Random) -> None:
    directory.mkdir()
    os.setxattr(directory, "system.ntfs_attrib_be", COMPRESSED)
    (directory / "text").write_bytes(b"".join(b"line %d of a text\n" % rng.randrange(1000) for _ in range(20_000)))
    (directory / "random").write_bytes(rng.randbytes(300_001))
    (directory / "zeros").write_bytes(bytes(200_000))
    (directory / "mixed").write_bytes(b"".join(rng.choice((bytes, rng.randbytes))(50_000) for _ in range(12)) + b"end")
    (directory / "resident").write_bytes(b"a" * 100)
    (directory / "empty").touch()


def special(root: Path) -> None:
    """Links, streams, names that are no UTF-16, and what reparse points make of files."""
    (root / "hard").write_bytes(b"linked")
    (root / "linked").mkdir()
    os.link(root / "hard", root / "linked" / "again")
    (root / "symbolic").symlink_to("linked/agäin")
    os.setxattr(root / "hard", "user.stream", b"resident")
    os.setxattr(root / "hard", "user.strëam", b"n" * 9000)
    os.setxattr(root / "hard", "user.nothing", b"")
    os.setxattr(root / "linked", "user.of a directory", b"value")
    (root / "streams").touch()
    for number in range(80):
        os.setxattr(root / "streams", f"user.{number}", b"%d" % number * 100)
    (root / os.fsdecode(b"half a pair \xed\xa0\x80")).write_bytes(b"half")
    dos = root / "a name that has a short one"
    dos.touch()
    os.setxattr(dos, "system.ntfs_dos_name", b"ANAMET~1")
    (root / "relative").touch()
    os.setxattr(root / "relative", "system.ntfs_reparse_data", link("linked\\again", 1))
    (root / "of Linux").touch()
    target = struct.pack("<I", 2) + "linked/agäin".encode()
    os.setxattr(root / "of Linux", "system.ntfs_reparse_data", struct.pack("<IHH", LINUX, len(target), 0) + target)


def link(target: str, flags: int) -> bytes:
    stored = target.encode("utf-16-le")
    body = struct.pack("<HHHHI", 0, len(stored), 0, len(stored), flags) + stored
    return struct.pack("<IHH", SYMLINK, len(body), 0) + body


def junction(target: str) -> bytes:
    stored = target.encode("utf-16-le")
    body = struct.pack("<HHHH", 0, len(stored), 0, 0) + stored
    return struct.pack("<IHH", JUNCTION, len(body), 0) + body


def record(image: Path, number: int) -> int:
    """Return where a record of the master file table is; it is in one piece while it is small."""
    with image.open("rb") as file:
        boot = file.read(512)
    sector, per_cluster, mft, size = (
        *struct.unpack_from("<HB", boot, 11),
        int.from_bytes(boot[48:56], "little"),
        struct.unpack_from("<b", boot, 64)[0],
    )
    return mft * sector * per_cluster + number * (1 << -size)


def patch(image: Path, place: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(place)
        file.write(data)


def attributes(image: Path, number: int) -> Iterator[tuple[int, bytes]]:
    """Yield place and bytes of each attribute in a record."""
    at = record(image, number)
    stored = mended(FileDevice(image).read(at, 1024), b"FILE")
    place = int.from_bytes(stored[20:22], "little")
    while (length := int.from_bytes(stored[place + 4 : place + 8], "little")) >= 24:
        yield at + place, stored[place : place + length]
        place += length


def data_attribute(image: Path, number: int) -> int:
    """Return where the first $DATA of a record is."""
    return next(place for place, stored in attributes(image, number) if stored[:4] == struct.pack("<I", 0x80))


def as_shown(image: Path) -> dict[bytes, Any]:
    with mounted(image, f"ro,{OPTIONS}", "ntfs-3g") as root:
        return describe(root)


def as_read(image: Path) -> dict[bytes, Any]:
    device = FileDevice(image)
    return describe_reader(open_reader("ntfs", device, recover=True), device)


def as_a_worker_reads(image: Path) -> dict[bytes, Any]:
    device = FileDevice(image)
    launcher = Launcher()
    tree = Tree(launcher, "disk/p1", "ntfs", device.size, device.read, True)
    try:
        return describe_reader(tree, device)
    finally:
        tree.close()
        launcher.close()


@pytest.mark.parametrize("kind", KINDS)
def test_the_tree_is_as_ntfs_3g_shows_it(tmp_path: Path, kind: str) -> None:
    image = make(tmp_path / "image", kind, populate)
    expected = as_shown(image)

    assert len(expected) > 1200
    assert expected == as_read(image)
    assert expected == as_a_worker_reads(image)


def test_the_trees_have_files_of_many_records(tmp_path: Path) -> None:
    """Otherwise the comparison would say nothing of them."""
    image = make(tmp_path / "image", "default", populate)
    reader = open_reader("ntfs", FileDevice(image), recover=True)
    lists = [
        name
        for name in (b"in pieces", b"streams")
        for _, stored in attributes(image, reader.lookup(reader.root, name))
        if stored[:4] == struct.pack("<I", 0x20)
    ]

    assert [b"in pieces", b"streams"] == lists


def test_what_was_never_written_of_a_file_is_zeros(tmp_path: Path) -> None:
    def change(root: Path) -> None:
        (root / "file").write_bytes(b"a" * 100_000)
        numbers.append((root / "file").stat().st_ino)

    numbers: list[int] = []
    image = make(tmp_path / "image", "default", change)
    before = as_read(image)
    patch(image, data_attribute(image, numbers[0]) + 56, struct.pack("<Q", 5_001))
    after = as_read(image)

    assert before[b"file"] != after[b"file"]
    assert as_shown(image) == after


def test_reparse_points_are_links_or_shown_as_they_are_stored(tmp_path: Path) -> None:
    def change(root: Path) -> None:
        (root / "cloud").write_bytes(b"c" * 5000)
        os.setxattr(root / "cloud", "system.ntfs_reparse_data", struct.pack("<IHH", CLOUD, 8, 0) + bytes(8))
        (root / "drive").touch()
        os.setxattr(root / "drive", "system.ntfs_reparse_data", link("\\??\\C:\\Windows\\x", 0))
        (root / "junction").mkdir()
        os.setxattr(root / "junction", "system.ntfs_reparse_data", junction("\\??\\C:\\Users"))

    image = make(tmp_path / "image", "default", change)
    device = FileDevice(image)
    reader = open_reader("ntfs", device, recover=True)
    found = describe_reader(reader, device)

    assert stat.S_ISREG(found[b"cloud"][0])
    assert 5000 == found[b"cloud"][5]
    assert b"C:/Windows/x" == found[b"drive"][-1]
    assert b"C:/Users" == found[b"junction"][-1]


def test_what_windows_compresses_of_its_own_is_unpacked(tmp_path: Path) -> None:
    content = os.urandom(5000)  # what does not become shorter is stored as it is, in chunks of 4 KiB

    def change(root: Path) -> None:
        with (root / "file").open("wb") as file:
            file.truncate(len(content))
        os.setxattr(root / "file", "user.WofCompressedData", struct.pack("<I", 4096) + content)
        wof = struct.pack("<IIII", 1, 2, 1, 0)
        os.setxattr(root / "file", "system.ntfs_reparse_data", struct.pack("<IHH", WOF, len(wof), 0) + wof)

    image = make(tmp_path / "image", "default", change)
    reader = open_reader("ntfs", FileDevice(image), recover=True)
    number = reader.lookup(reader.root, b"file")

    assert reader.extents(number, 0, 1) is None
    assert content == reader.read(number, 0, 10_000)


def test_an_encrypted_file_is_refused(tmp_path: Path) -> None:
    image = make(tmp_path / "image", "default", lambda root: (root / "file").write_bytes(b"e" * 5000))
    with mounted(image, OPTIONS, "ntfs-3g") as root:
        number = (root / "file").stat().st_ino
    patch(image, data_attribute(image, number) + 12, struct.pack("<H", 0x4000))
    reader = open_reader("ntfs", FileDevice(image), recover=True)

    with pytest.raises(OSError) as refused:
        reader.extents(reader.lookup(reader.root, b"file"), 0, 1)
    assert errno.ENOKEY == refused.value.errno


def test_without_its_library_only_what_is_compressed_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(root: Path) -> None:
        (root / "plain").write_bytes(b"p" * 5000)
        compressed(root / "compressed", random.Random(SEED))

    image = make(tmp_path / "image", "default", change)
    monkeypatch.setattr(ntfs, "pyfsntfs", None)
    reader = open_reader("ntfs", FileDevice(image), recover=True)
    directory = reader.lookup(reader.root, b"compressed")

    assert reader.extents(reader.lookup(reader.root, b"plain"), 0, 1) is not None
    assert reader.extents(reader.lookup(directory, b"text"), 0, 1) is None
    with pytest.raises(OSError, match=r"install qcowfs\[windows\]"):
        reader.read(reader.lookup(directory, b"text"), 0, 100)


@pytest.mark.parametrize("damage", ["signature", "sequence", "free", "attributes"])
def test_a_damaged_record_costs_its_own_file_alone(tmp_path: Path, damage: str) -> None:
    def change(root: Path) -> None:
        for name in ("first", "lost", "rest"):
            (root / name).write_bytes(name.encode())
        numbers.append((root / "lost").stat().st_ino)

    numbers: list[int] = []
    image = make(tmp_path / "image", "default", change)
    at = record(image, numbers[0])
    patches = {"signature": (0, b"BAAD"), "sequence": (16, b"\7"), "free": (22, b"\0"), "attributes": (20, b"\xff\x0f")}
    patch(image, at + patches[damage][0], patches[damage][1])
    reader = open_reader("ntfs", FileDevice(image), recover=True)
    listed = dict(listing(reader, reader.root))

    assert {b"first": 0, b"rest": 0, b"lost": errno.EIO} == {name: inode.error for name, inode in listed.items()}
    assert {stat.S_IFREG} == {stat.S_IFMT(inode.mode) for inode in listed.values()}
    assert reader.lookup(reader.root, b"rest") == listed[b"rest"].ino
    with pytest.raises(OSError):
        reader.lookup(reader.root, b"lost")

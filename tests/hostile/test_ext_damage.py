"""Damage at a chosen place of ext: what it takes away, what it leaves, and what is said of it."""

from __future__ import annotations

import errno
import os
import re
import struct
import subprocess
import time
from itertools import pairwise
from pathlib import Path

import pytest

from qcowfs import limits
from qcowfs.inside.reader import Reader, Unreadable
from tests.support import need
from tests.support.crash import FileDevice
from tests.support.readertree import entries_of

ext = pytest.importorskip("qcowfs.inside.ext")

BLOCK = 1024
NAMES = {f"a name of some length {number:04}".encode() for number in range(300)}
ROOT = 2


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image with a directory of some blocks and an index, and files of few, of many extents, and of none."""
    need("mke2fs", "debugfs")
    at = tmp_path_factory.mktemp("damage")
    directory = at / "tree" / "directory"
    directory.mkdir(parents=True)
    for name in NAMES:
        (directory / os.fsdecode(name)).touch()
    with (at / "tree" / "fragments").open("wb") as file:
        for number in range(500):
            os.pwrite(file.fileno(), b"x", 2 * number * BLOCK)
    (at / "tree" / "file").write_bytes(b"f" * 5000)
    image = at / "image"
    options = ["-t", "ext4", "-b", str(BLOCK), "-O", "metadata_csum,^has_journal", "-d", at / "tree"]
    subprocess.run(["mke2fs", "-q", "-F", *options, image, "8M"], check=True)
    return image.read_bytes()


class Image:
    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        path.write_bytes(content)

    def debugfs(self, *commands: str) -> str:
        text = ""
        for command in commands:
            done = subprocess.run(
                ["debugfs", "-w", "-R", command, self.path], check=True, capture_output=True, text=True
            )
            text += done.stdout
        return text

    def write(self, offset: int, content: bytes) -> None:
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(content)

    def blocks(self, path: str) -> list[int]:
        """Return the blocks of a file or directory, in order."""
        return [int(number) for number in self.debugfs(f"blocks {path}").split()]

    def reader(self) -> Reader:
        return ext.open_reader(FileDevice(self.path), recover=True)


@pytest.fixture
def image(pristine: bytes, tmp_path: Path) -> Image:
    return Image(tmp_path / "image", pristine)


def listed(reader: Reader, directory: bytes, room: int = 4096) -> tuple[list[bytes], int]:
    """Return the names that a listing has, and the errno that it ends with."""
    found: list[bytes] = []
    try:
        for name, _inode, _extents in entries_of(reader, reader.lookup(ROOT, directory), room):
            found.append(name)
    except OSError as error:
        return found, error.errno or 0
    return found, 0


@pytest.mark.parametrize("room", [1, 100, 1000, 4096, 1 << 20])
def test_pages_of_any_size_have_every_name_once(image: Image, room: int) -> None:
    found, error = listed(image.reader(), b"directory", room)

    assert 0 == error
    assert sorted(NAMES) == sorted(found)


@pytest.mark.parametrize("room", [1, 4096, 1 << 20])
@pytest.mark.parametrize("which", [1, 5, -1])
def test_a_damaged_block_hides_only_its_own_names(image: Image, which: int, room: int) -> None:
    block = image.blocks("/directory")[which]
    content = image.path.read_bytes()[block * BLOCK : (block + 1) * BLOCK]
    lost = set(re.findall(rb"a name of some length \d{4}", content))
    image.write(block * BLOCK + 300, b"\xff")
    reader = image.reader()

    found, error = listed(reader, b"directory", room)

    assert 10 < len(lost)
    assert errno.EIO == error
    assert sorted(NAMES - lost) == sorted(found)
    directory = reader.lookup(ROOT, b"directory")
    for name in NAMES - lost:
        assert reader.lookup(directory, name)
    for name in (*list(lost)[:3], b"no such name"):
        with pytest.raises(OSError, match=f"directory {directory}: some of its blocks cannot be read") as fault:
            reader.lookup(directory, name)
        assert errno.EIO == fault.value.errno


def test_a_name_that_is_not_there_is_not_there(image: Image) -> None:
    reader = image.reader()

    with pytest.raises(FileNotFoundError):
        reader.lookup(reader.lookup(ROOT, b"directory"), b"no such name")
    with pytest.raises(NotADirectoryError):
        reader.lookup(reader.lookup(ROOT, b"file"), b"no such name")


@pytest.mark.parametrize(
    "entry",
    [
        struct.pack("<IHBB", 12, 8, 1, 1),  # too short
        struct.pack("<IHBB", 12, 14, 1, 1),  # no multiple of 4
        struct.pack("<IHBB", 12, 12, 5, 1),  # its name does not fit
        struct.pack("<IHBB", 12, 2000, 1, 1),  # longer than the block
        struct.pack("<IHBB", 12, BLOCK - 44, 1, 1),  # what is left of the block is no entry
        struct.pack("<IHBB", 0xFFFFFF, 12, 1, 1),  # no such inode
    ],
)
def test_a_wrong_entry_hides_the_rest_of_its_block(image: Image, entry: bytes) -> None:
    image.debugfs("feature -metadata_csum")
    block = image.blocks("/directory")[2]
    content = image.path.read_bytes()[block * BLOCK : (block + 1) * BLOCK]
    names = re.findall(rb"a name of some length \d{4}", content)
    first = struct.unpack_from("<H", content, 4)[0]
    image.write(block * BLOCK + first, entry)

    found, error = listed(image.reader(), b"directory")

    assert errno.EIO == error
    assert sorted(NAMES - set(names[1:])) == sorted(found)


@pytest.mark.parametrize("name", [b"a/b", b"a\0b", b"", b".", b".."])
def test_names_that_linux_cannot_have_are_left_out(image: Image, name: bytes) -> None:
    image.debugfs("feature -metadata_csum")
    block = image.blocks("/directory")[2]
    content = image.path.read_bytes()[block * BLOCK : (block + 1) * BLOCK]
    replaced = content[8 : 8 + content[6]]
    image.write(block * BLOCK + 6, bytes([len(name)]))
    image.write(block * BLOCK + 8, name)

    found, error = listed(image.reader(), b"directory")

    assert 0 == error
    assert sorted(NAMES - {replaced}) == sorted(found)


def test_a_directory_that_holds_itself_has_an_end_at_every_level(image: Image) -> None:
    image.debugfs("link /directory /directory/again")
    reader = image.reader()
    directory = reader.lookup(ROOT, b"directory")

    assert directory == reader.lookup(directory, b"again")
    assert sorted(NAMES | {b"again"}) == sorted(listed(reader, b"directory")[0])


def test_a_broken_node_of_an_extent_tree_is_an_error_of_its_file_alone(image: Image) -> None:
    nodes = re.findall(r"\(ETB(\d+)\):(\d+)", image.debugfs("stat /fragments"))
    node = [number for level, number in nodes if level == max(nodes)[0]][1]  # of the leaves
    image.write(int(node) * BLOCK + 20, b"\xff")
    reader = image.reader()
    ino = reader.lookup(ROOT, b"fragments")

    found = reader.extents(ino, 0, 1 << 16)
    assert found is not None
    assert 50 < len(found.extents) < 100
    assert [2 * number * BLOCK for number in range(len(found.extents))] == [start for start, *_ in found.extents]
    with pytest.raises(OSError, match=f"inode {ino}: the checksum of a node") as fault:
        reader.extents(ino, found.end, 1 << 16)
    assert errno.EIO == fault.value.errno
    assert reader.extents(reader.lookup(ROOT, b"file"), 0, 10)
    assert reader.stat(ino)


def test_a_damaged_inode_is_not_taken_for_another(image: Image) -> None:
    block, offset = re.findall(r"located at block (\d+), offset 0x([0-9a-f]+)", image.debugfs("imap /file"))[0]
    whole = image.reader()
    image.write(int(block) * BLOCK + int(offset, 16) + 4, b"\x07")  # its size
    reader = image.reader()
    file = reader.lookup(ROOT, b"file")
    others = [ROOT, *(reader.lookup(ROOT, name) for name in (b"directory", b"fragments", b"lost+found"))]

    for ask in (reader.stat, reader.xattrs):
        for number in others:
            assert whole.stat(number) == reader.stat(number)
        with pytest.raises(OSError, match=f"inode {file}: Inode checksum does not match inode"):
            ask(file)
        for number in others:
            assert whole.stat(number) == reader.stat(number)


@pytest.mark.parametrize(
    ("extents", "text"),
    [
        ([(0, 4, 500), (2, 4, 600)], "overlaps another"),
        ([(4, 4, 500), (0, 4, 600)], "overlaps another"),
        ([(0, 0, 500)], "overlaps another"),
        ([(0, 4, 0)], "outside the volume"),
        ([(0, 4, 8190)], "outside the volume"),
        ([(0, 4, 1 << 47)], "outside the volume"),
    ],
)
def test_extents_that_cannot_be(image: Image, extents: list[tuple[int, int, int]], text: str) -> None:
    image.debugfs("feature -metadata_csum")
    packed = struct.pack("<HHHHI", 0xF30A, len(extents), 4, 0, 0)
    for start, length, block in extents:
        packed += struct.pack("<IHHI", start, length, block >> 32, block & 0xFFFFFFFF)
    write_map(image, "/file", packed)
    reader = image.reader()
    ino = reader.lookup(ROOT, b"file")

    with pytest.raises(OSError, match=f"inode {ino}: .*{text}"):
        reader.extents(ino, 0, 10)
    assert {name: given for name, _inode, given in entries_of(reader, ROOT)}[b"file"] is None


@pytest.mark.parametrize(
    "head", [(0xF30B, 1, 4, 0), (0xF30A, 5, 4, 0), (0xF30A, 1, 5, 0), (0xF30A, 1, 4, 6), (0xF30A, 0, 0, 0)]
)
def test_a_root_of_extents_that_cannot_be(image: Image, head: tuple[int, ...]) -> None:
    image.debugfs("feature -metadata_csum")
    write_map(image, "/file", struct.pack("<HHHHI", *head, 0) + struct.pack("<IHHI", 0, 4, 0, 500))
    reader = image.reader()

    with pytest.raises(OSError, match="a node of its extent tree is damaged"):
        reader.extents(reader.lookup(ROOT, b"file"), 0, 10)


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_an_extent_tree_that_repeats_itself_has_an_end(image: Image, depth: int) -> None:
    """A node of which all children are the same node."""
    image.debugfs("feature -metadata_csum")
    node = image.blocks("/file")[0]
    many = b"".join(struct.pack("<IIHH", 1000 * number, node, 0, 0) for number in range(84))
    image.write(node * BLOCK, struct.pack("<HHHHI", 0xF30A, 84, 84, depth - 1, 0) + many)
    write_map(image, "/file", struct.pack("<HHHHI", 0xF30A, 1, 4, depth, 0) + struct.pack("<IIHH", 0, node, 0, 0))
    image.debugfs("sif /file size 0x10000000000")
    reader = image.reader()

    with pytest.raises(OSError, match="extent"):
        reader.extents(reader.lookup(ROOT, b"file"), 0, 10)


def test_a_map_of_indirect_blocks_that_repeats_itself_is_walked_in_small_steps(image: Image) -> None:
    """All 2**24 blocks of a file are found through one block of pointers, which all are its own number."""
    image.debugfs("feature -metadata_csum", "sif /file flags 0", "sif /file size 0x400000000")
    node = image.blocks("/directory")[0]
    image.write(node * BLOCK, struct.pack("<I", node) * 256)
    write_map(image, "/file", struct.pack("<I", 0) * 12 + struct.pack("<I", node) * 3)
    device = FileDevice(image.path)
    reader = ext.open_reader(device, recover=True)
    ino = reader.lookup(ROOT, b"file")
    place = steps = 0
    while place < 1 << 30:
        found = reader.extents(ino, place, 1 << 16)
        assert found is not None and found.end > place
        place, steps = found.end, steps + 1

    assert steps < 1000


@pytest.mark.parametrize(("size", "outcome"), [(1 << 30, 0), ((1 << 30) + BLOCK, errno.EFBIG)])
def test_a_directory_of_nothing_is_looked_through_in_bounded_time(image: Image, size: int, outcome: int) -> None:
    """A million blocks, which are all the same one, without a name."""
    image.debugfs("feature -metadata_csum", "sif /directory flags 0", f"sif /directory size {size}")
    blocks = image.blocks("/file")[:4]
    image.write(blocks[0] * BLOCK, struct.pack("<IHBB", 0, BLOCK, 0, 0))
    for child, node in pairwise(blocks):
        image.write(node * BLOCK, struct.pack("<I", child) * 256)
    write_map(image, "/directory", struct.pack("<15I", *blocks[:1] * 12, *blocks[1:]))
    start = time.process_time()

    found, error = listed(image.reader(), b"directory")

    assert outcome == error
    assert found == []
    assert time.process_time() - start < limits.INSIDE_REQUEST_SECONDS


@pytest.mark.timeout(60, method="thread")
def test_a_map_of_nothing_is_walked_in_small_steps(tmp_path: Path) -> None:
    """4 * 10**12 blocks of a file, none of which is stored, in a map of three blocks of pointers."""
    need("mke2fs", "debugfs")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"f" * (4 * 65536))
    options = ["-t", "ext4", "-b", "65536", "-O", "^metadata_csum,^has_journal", "-d", tmp_path / "tree"]
    command = ["mke2fs", "-q", "-F", *options, tmp_path / "made", "16M"]
    subprocess.run(command, check=True, capture_output=True)
    image = Image(tmp_path / "image", (tmp_path / "made").read_bytes())
    blocks = image.blocks("/file")
    image.debugfs("sif /file flags 0", f"sif /file size {1 << 58}")
    image.write(blocks[0] * 65536, bytes(65536))
    for child, node in pairwise(blocks[:3]):
        image.write(node * 65536, struct.pack("<I", child) * 16384)
    write_map(image, "/file", struct.pack("<15I", *[0] * 12, *blocks[:3]), 65536)
    reader = image.reader()
    start, place = time.process_time(), 0

    for _ in range(3):
        found = reader.extents(reader.lookup(ROOT, b"file"), place, 10)
        assert found is not None and place < found.end < 1 << 58
        place = found.end
    assert time.process_time() - start < limits.INSIDE_REQUEST_SECONDS


@pytest.mark.parametrize("offset", [0, 1, 1500, 4999])
def test_extents_begin_where_they_are_asked_for(image: Image, offset: int) -> None:
    reader = image.reader()
    ino = reader.lookup(ROOT, b"file")

    found = reader.extents(ino, offset, 10)

    assert found is not None and found.end == 5000
    place = image.blocks("/file")[0] * BLOCK
    assert [(offset, 5000 - offset, place + offset)] == [tuple(extent) for extent in found.extents]


def write_map(image: Image, path: str, content: bytes, unit: int = BLOCK) -> None:
    """Let `content` be the i_block of an inode; `unit` is the size of the image's blocks."""
    block, offset = re.findall(r"block (\d+), offset (0x[0-9a-f]+)", image.debugfs(f"imap {path}"))[0]
    image.write(int(block) * unit + int(offset, 16) + 40, content.ljust(60, b"\0"))


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (88, b"\x80\x00"),
        (88, b"\xc8\x00"),
        (56, b"\0\0"),
        (20, b"\x80"),
        (40, b"\xff\xff"),
        (24, b"\7"),
        (96, b"\0\0\0\x80"),
    ],
)
def test_a_superblock_that_leads_to_no_root_is_refused(image: Image, offset: int, content: bytes) -> None:
    image.debugfs("feature -metadata_csum")
    image.write(1024 + offset, content)

    with pytest.raises(Unreadable, match="ext"):
        image.reader()

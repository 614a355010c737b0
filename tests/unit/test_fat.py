"""The readers of FAT and exFAT on what no driver would write. Evidence: own images; the drivers' are in tests/e2e."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from qcowfs.inside.reader import Unreadable
from qcowfs.inside.readers import open_reader
from tests.support import need
from tests.support.crash import FileDevice
from tests.support.forgefat import DATE, SECTOR, TIME, Exfat, Fat, File, Memory
from tests.support.readertree import describe_reader, listing

WRITTEN = 1_738_555_506  # the time that the images have: 2025-02-03 04:05:06
FATS = (12, 16, 32)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(tree: Any, path: str = "") -> dict[bytes, str | None]:
    """Return what describe_reader should say of each file's content."""
    found: dict[bytes, str | None] = {}
    for name, content in tree.items():
        full = f"{path}{name}"
        key = full.encode("utf-8", "surrogatepass")
        if isinstance(content, dict):
            found |= {key: None} | contents(content, f"{full}/")
        else:
            found[key] = sha(content.content if isinstance(content, File) else content)
    return found


def told(kind: str, data: bytes | bytearray) -> dict[bytes, Any]:
    device = Memory(data)
    return describe_reader(open_reader(kind, device, recover=True), device, sha256=True)


def read(kind: str, data: bytes | bytearray) -> dict[bytes, str | None]:
    return {name: facts[-1] for name, facts in told(kind, data).items() if name}


TREE = {
    "a": b"",
    "one byte": b"1",
    "a cluster": b"c" * SECTOR,
    "one more": b"d" * (SECTOR + 1),
    "in pieces": os.urandom(9000),
    "half a pair \ud83d": b"half",
    "whole 😀 ß 日本": b"whole",
    "directory": {"in it": b"x" * 700, "deeper": {"at the bottom": b"b", "nothing": {}}},
    "l" * 255: b"longest",
}


@pytest.mark.parametrize("bits", FATS)
def test_files_lie_where_the_table_says(bits: int) -> None:
    assert contents(TREE) == read("vfat", Fat(bits, TREE).data)


def test_exfat_files_lie_where_the_table_says_or_together() -> None:
    together = {name: File(content, chained=False) for name, content in TREE.items() if isinstance(content, bytes)}

    assert contents(TREE) == read("exfat", Exfat(TREE).data)
    assert contents(together) == read("exfat", Exfat(together).data)


@pytest.mark.parametrize("seed", range(20))
def test_exfat_entries_that_lie_across_clusters_are_found_again(seed: int) -> None:
    tree = {f"{'x' * (number * 7 % 90)} {number}": b"%d" % number for number in range(60)}

    assert contents({"d": tree}) == read("exfat", Exfat({"d": tree}, seed=seed).data)


def test_what_exfat_holds_behind_the_valid_length_is_zeros() -> None:
    tree = {"file": File(b"v" * 3000, valid=1001), "nothing": File(b"v" * 3000, valid=0)}

    found = read("exfat", Exfat(tree).data)

    assert sha(b"v" * 1001 + bytes(1999)) == found[b"file"]
    assert sha(bytes(3000)) == found[b"nothing"]


@pytest.mark.parametrize(("zone", "hours"), [(0, 0), (0x7F, 0), (0x80, 0), (0x88, 2), (0xF8, -2), (0xB8, 14)])
def test_exfat_times_are_in_their_zone(zone: int, hours: int) -> None:
    times = told("exfat", Exfat({"file": File(zone=zone)}).data)[b"file"][7]

    assert (WRITTEN - hours * 3600) * 10**9 + 500_000_000 == times[0] == times[1]
    assert (WRITTEN - hours * 3600) * 10**9 == times[2]


def test_fat_times_are_utc_and_the_last_access_is_a_day() -> None:
    times = told("vfat", Fat(12, {"file": b""}).data)[b"file"][7]

    assert (WRITTEN * 10**9, WRITTEN * 10**9, WRITTEN // 86400 * 86400 * 10**9) == times


def test_read_only_files_cannot_be_written() -> None:
    tree = {"file": File(attributes=0x01), "directory": {}}
    for found in (told("vfat", Fat(16, tree).data), told("exfat", Exfat(tree).data)):
        assert stat.S_IFREG | 0o555 == found[b"file"][0]
        assert stat.S_IFDIR | 0o755 == found[b"directory"][0]


def patched(image: Fat, path: str, at: int, stored: bytes) -> bytearray:
    """Return the image with some bytes of a file's own entry changed."""
    place = image.entries[path] + at
    image.data[place : place + len(stored)] = stored
    return image.data


@pytest.mark.parametrize(
    ("at", "stored", "expected"),
    [
        (0, b"OTHER   TXT", b"OTHER.TXT"),  # the checksum of the long name is another's
        (0, b"OTHER   TXT\x20\x08", b"other.TXT"),
        (0, b"OTHER   TXT\x20\x10", b"OTHER.txt"),
        (0, b"OTHER      \x20\x18", b"other"),
        (0, b"\x05\x8e\x99     TXT\x20\x18", "σäö.txt".encode()),
        (0, b"\x82 B     T  ", "é B.T".encode()),
    ],
)
def test_a_file_without_its_long_name_has_its_short_one(at: int, stored: bytes, expected: bytes) -> None:
    assert {expected} == read("vfat", patched(Fat(12, {"a long name": b""}), "a long name", at, stored)).keys()


@pytest.mark.parametrize("change", [(0, b"\xe5"), (0, b"\0"), (11, b"\x08"), (11, b"\x28")])
def test_deleted_files_and_labels_are_not_shown(change: tuple[int, bytes]) -> None:
    found = read("vfat", patched(Fat(12, {"one": b"", "two": b"2"}), "one", *change))

    assert {b"two": sha(b"2")} == found


@pytest.mark.parametrize("name", ["a/b", "日" * 86, ".", ".."])
def test_a_name_that_linux_cannot_have_is_replaced_by_the_short_one(name: str) -> None:
    assert {b"FILE0001.TXT": sha(b"1")} == read("vfat", Fat(32, {name: b"1"}).data)
    assert {} == read("exfat", Exfat({name: b"1"}).data)


@pytest.mark.parametrize("bits", FATS)
@pytest.mark.parametrize("after", ["zero", "one", "end", "bad", "far"])
def test_a_chain_that_breaks_off_costs_what_lies_behind_it(bits: int, after: str) -> None:
    image = Fat(bits, {"file": os.urandom(5 * SECTOR)})
    first = struct.unpack_from("<H", image.data, image.entries["file"] + 26)[0]
    second = image.table[first]
    last = image.end_of_chain
    image.table[second] = {"zero": 0, "one": 1, "end": last, "bad": last - 8, "far": image.clusters + 2}[after]
    device = Memory(image.finish())
    reader = open_reader("vfat", device, recover=True)
    number = reader.lookup(reader.root, b"file")
    found = reader.extents(number, 0, 100)

    assert found is not None
    assert 2 * SECTOR == found.end == sum(extent.length for extent in found.extents)
    with pytest.raises(OSError, match="ends after 2") as broken:
        reader.extents(number, 2 * SECTOR, 100)
    assert errno.EIO == broken.value.errno


@pytest.mark.parametrize("bits", FATS)
def test_a_directory_whose_chain_returns_to_itself_is_an_error(bits: int) -> None:
    image = Fat(bits, {"directory": {f"a file with a long name {n}": b"" for n in range(40)}, "file": b"f"})
    first = struct.unpack_from("<H", image.data, image.entries["directory"] + 26)[0]
    image.table[image.table[first]] = first
    reader = open_reader("vfat", Memory(image.finish()), recover=True)
    listed = dict(listing(reader, reader.root))

    assert (errno.EIO, stat.S_IFDIR) == (listed[b"directory"].error, stat.S_IFMT(listed[b"directory"].mode))
    assert 0 == listed[b"file"].error
    with pytest.raises(OSError, match="no end"):
        reader.entries(listed[b"directory"].ino, 0, 4096)


@pytest.mark.parametrize("bits", FATS)
def test_a_directory_that_is_the_root_or_no_directory_is_an_error(bits: int) -> None:
    image = Fat(bits, {"root": {"x": b""}, "file": {"y": b""}, "content": b"c" * SECTOR})
    root = image.root_clusters[0] if bits == 32 else 0
    content = struct.unpack_from("<H", image.data, image.entries["content"] + 26)[0]
    patched(image, "root", 26, struct.pack("<H", root))
    patched(image, "file", 26, struct.pack("<H", content))
    reader = open_reader("vfat", Memory(image.data), recover=True)

    for name in (b"root", b"file"):
        with pytest.raises(OSError) as refused:
            reader.entries(reader.lookup(reader.root, name), 0, 4096)
        assert errno.EIO == refused.value.errno


def test_the_largest_file_of_fat_is_one_extent(tmp_path: Path) -> None:
    need("mkfs.vfat")
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 5 << 30)
    subprocess.run(["mkfs.vfat", "-F", "32", "-s", "64", str(image)], check=True, capture_output=True)
    boot = FileDevice(image).read(0, SECTOR)
    reserved, tables, length = *struct.unpack_from("<HB", boot, 14), struct.unpack_from("<I", boot, 36)[0]
    chain = struct.pack("<131072I", *range(4, 131075), 0x0FFFFFFF)
    entry = b"LARGE   BIN" + struct.pack("<BBBHHHHHHHI", 0, 0, 0, 0, 0, 0, 0, TIME, DATE, 3, 2**32 - 1)
    with image.open("r+b") as file:
        os.pwrite(file.fileno(), chain, reserved * SECTOR + 12)
        os.pwrite(file.fileno(), entry, (reserved + tables * length) * SECTOR)
    reader = open_reader("vfat", FileDevice(image), recover=True)
    found = reader.extents(reader.lookup(reader.root, b"LARGE.BIN"), 0, 10)

    assert found is not None
    assert (1, 2**32 - 1, 2**32 - 1) == (len(found.extents), found.extents[0].length, found.end)


def test_exfat_with_a_wrong_checksum_of_its_boot_region_is_refused() -> None:
    image = Exfat({})
    image.data[3 * SECTOR] ^= 1

    with pytest.raises(Unreadable, match="wrong checksum"):
        open_reader("exfat", Memory(image.data), recover=True)


def test_a_listing_goes_on_where_its_cookie_says() -> None:
    names = [f"file {number}" for number in range(500)]
    tree = {"d": dict.fromkeys(names, b"")}
    for kind, image in (("vfat", Fat(32, tree, clusters=900)), ("exfat", Exfat(tree, clusters=900))):
        reader = open_reader(kind, Memory(image.data), recover=True)
        directory = reader.lookup(reader.root, b"d")
        listed = [name for name, _ in listing(reader, directory, 1000)]

        assert [name.encode() for name in names] == listed

"""Damaged partition tables, LVM metadata and superblocks: only volumes within the disk, few notes, soon."""

from __future__ import annotations

import random
import struct
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from qcowfs import limits
from qcowfs.inside.contents import Contents, VolumeBytes, look
from qcowfs.inside.lvmlabel import checksum, dashed
from qcowfs.inside.volume import Volume
from tests.support import need
from tests.support.disks import BytesDisk, run
from tests.support.lvm import lvm_on

SIZE = 48 << 20
MUTATIONS = 1000  # of each kind of disk
SECONDS = 5  # that one look may take
BYTES = (0, 1, 5, 0x0F, 0x7F, 0x80, 0xEE, 0xFF)
NUMBERS = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 62, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)

MBR = """label: dos
1 : start=2048, size=4000, type=83
2 : start=8192, size=60000, type=f
4 : start=70000, size=4000, type=7
5 : start=9000, size=5000
6 : start=15000, size=5000
7 : start=21000, size=5000
"""
GPT = "label: gpt\n" + "size=2048\n" * 30
TOOLS = {
    "gpt": ("sfdisk", "-q", "--no-tell-kernel", "--no-reread"),
    "mbr": ("sfdisk", "-q", "--no-tell-kernel", "--no-reread"),
    "ext4": ("mkfs.ext4", "-q", "-F", "-L", "x"),
    "fat16": ("mkfs.vfat", "-F", "16", "-n", "X"),
    "fat32": ("mkfs.vfat", "-F", "32", "-s", "1", "-n", "X"),
    "exfat": ("mkfs.exfat", "-L", "x"),
    "ntfs": ("mkfs.ntfs", "-F", "-Q", "-q", "-L", "x"),
    "swap": ("mkswap",),
}
# Where the structures are, from and to; NTFS has its volume's record behind the third cluster.
PLACES = {
    "gpt": [(440, 2048), (512, 604), (1024, 1400), (SIZE - 512, SIZE - 420)],
    "mbr": [(440, 512), (440, 512), *((start * 512 + 446, start * 512 + 512) for start in (8192, 14000, 20000))],
    "ext4": [(1024, 2048), (1024, 1200)],
    "fat16": [(0, 64), (54, 512)],
    "fat32": [(0, 96), (82, 512)],
    "exfat": [(0, 128)],
    "ntfs": [(0, 84), (4 * 4096 + 3072, 4 * 4096 + 4096)],
    "swap": [(1024, 1100), (4086, 4096)],
    "lvm": [(512, 660), (4096, 4200), (4608, 12000)],
}


@pytest.fixture(scope="module", params=PLACES)
def healthy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    """The kind of disk, and all its bytes."""
    kind = request.param
    directory = tmp_path_factory.mktemp(kind)
    path = directory / "disk"
    with open(path, "wb") as file:
        file.truncate(SIZE)
    if kind == "lvm":
        make_lvm(path, directory)
    else:
        need(TOOLS[kind][0])
        run(*TOOLS[kind], path, text={"gpt": GPT, "mbr": MBR}.get(kind))
    data = path.read_bytes()
    assert look([BytesDisk(data)]).items
    return kind, data


def make_lvm(path: Path, directory: Path) -> None:
    need("lvm", "losetup")
    with lvm_on([path], directory) as lvm:
        lvm("pvcreate", "-q", *lvm.devices)
        lvm("vgcreate", "-s", "1m", "vg", *lvm.devices)
        for number in range(3):
            lvm.create("vg", f"lv{number}", "-l", "4")
        lvm("lvextend", "-q", "-l", "+2", "vg/lv0")


class DamagedDisk(BytesDisk):
    """A disk with other bytes in some places; to copy the whole for each would take longer than to look at it."""

    def __init__(self, data: bytes, size: int) -> None:
        super().__init__(data, size)
        self.patches: dict[int, int] = {}

    def pread(self, offset: int, length: int) -> bytes:
        data = bytearray(super().pread(offset, length))
        for place, value in self.patches.items():
            if offset <= place < offset + len(data):
                data[place - offset] = value
        return bytes(data)

    def patch(self, place: int, data: bytes) -> None:
        self.patches.update(zip(range(place, place + len(data)), data, strict=True))

    def number(self, place: int, width: int) -> int:
        return int.from_bytes(self.pread(place, width), "little")


def damage(kind: str, disk: DamagedDisk, generator: random.Random) -> None:
    for _ in range(generator.randrange(1, 5)):
        start, end = generator.choice(PLACES[kind])
        place = generator.randrange(start, end)
        if generator.random() < 0.5:
            disk.patch(place, bytes([generator.choice((*BYTES, generator.randrange(256)))]))
        else:
            width = generator.choice((2, 4, 8))
            value = generator.choice(NUMBERS) & ((1 << 8 * width) - 1)
            disk.patch(place // width * width, value.to_bytes(width, "little"))


def mend_gpt(disk: DamagedDisk) -> None:
    array = disk.pread(
        disk.number(512 + 72, 8) % disk.virtual_size // 512 * 512, disk.number(512 + 80, 4) % 40_000 * 128
    )
    disk.patch(512 + 88, zlib.crc32(array).to_bytes(4, "little"))
    disk.patch(512 + 16, bytes(4))
    disk.patch(512 + 16, zlib.crc32(disk.pread(512, 92)).to_bytes(4, "little"))


def mend_lvm(disk: DamagedDisk) -> None:
    disk.patch(512 + 16, checksum(disk.pread(512 + 20, 492)).to_bytes(4, "little"))
    text = disk.pread(4096 + disk.number(4096 + 40, 8) % (1 << 20), disk.number(4096 + 48, 8) % (1 << 20))
    disk.patch(4096 + 56, checksum(text).to_bytes(4, "little"))
    disk.patch(4096, checksum(disk.pread(4100, 508)).to_bytes(4, "little"))


MENDERS: dict[str, Callable[[DamagedDisk], None]] = {"gpt": mend_gpt, "lvm": mend_lvm}


def check(contents: Contents, disks: list[BytesDisk]) -> None:
    names = [item.volume.name for item in contents.items]
    assert len(set(names)) == len(names) <= limits.MAX_PARTITIONS + limits.MAX_LVM_VOLUMES
    assert len(contents.notes) <= limits.MAX_NOTES
    assert all(note.isprintable() for note in contents.notes)
    for item in contents.items:
        check_volume(item.volume, disks)
        if item.filesystem is not None:
            assert item.filesystem.kind and item.filesystem.size >= 0
            assert item.filesystem.trouble.isprintable()


def check_volume(volume: Volume, disks: list[BytesDisk]) -> None:
    assert volume.name == b"" or (b"/" not in volume.name and volume.name not in (b".", b".."))
    assert bool(volume.segments) != bool(volume.trouble)
    assert volume.size > 0 or volume.trouble
    end = 0
    for segment in volume.segments:
        assert segment.start == end and segment.length > 0
        assert 0 <= segment.offset <= segment.offset + segment.length <= disks[segment.disk].virtual_size
        end += segment.length
    assert end == (volume.size if volume.segments else 0)
    if volume.segments:
        reader = VolumeBytes(volume, disks)
        assert len(reader.read(volume.size - 1, 100)) == 1


def timed_look(disks: list[BytesDisk]) -> Contents:
    start = time.process_time()
    contents = look(disks)
    assert time.process_time() - start < SECONDS
    return contents


def test_seeded_damage(healthy: tuple[str, bytes]) -> None:
    kind, data = healthy
    generator = random.Random(kind)
    results = set()
    for number in range(MUTATIONS):
        disk = DamagedDisk(data, SIZE if generator.random() < 0.9 else generator.randrange(1, 60_000))
        damage(kind, disk, generator)
        if number % 2 and kind in MENDERS:  # else hardly anything passes the first check
            MENDERS[kind](disk)
        contents = timed_look([disk])
        check(contents, [disk])
        results.add((len(contents.items), len(contents.notes)))
    assert len(results) > 1


def ebr(entries: Sequence[tuple[int, int, int]]) -> bytes:
    """Return a boot record with entries of (type, start, length)."""
    table = b"".join(struct.pack("<BxxxBxxxII", 0, *entry) for entry in entries)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def test_a_chain_of_boot_records_that_leads_back() -> None:
    disk = DamagedDisk(ebr([(5, 100, 90_000)]), SIZE)
    disk.patch(100 * 512, ebr([(0x83, 10, 10), (5, 50, 100)]))
    disk.patch(150 * 512, ebr([(0x83, 10, 10), (5, 0, 100)]))

    contents = timed_look([disk])

    assert [b"p5", b"p6"] == [item.volume.name for item in contents.items]
    assert ["the chain of logical partitions leads back to sector 100"] == contents.notes


@pytest.mark.parametrize(("data", "count"), [((0x83, 1, 1), 251), ((0, 0, 0), 0)], ids=["partitions", "empty"])
def test_a_chain_of_boot_records_without_end(data: tuple[int, int, int], count: int) -> None:
    disk = BytesDisk(ebr([(5, 8, 90_000)]) + bytes(7 * 512), SIZE)
    disk.data += b"".join(ebr([data, (5, number * 2, 2)]) + bytes(512) for number in range(1, 2000))

    contents = timed_look([disk])

    assert count == len(contents.items)
    assert ["the chain of logical partitions is longer than Linux follows it"] == contents.notes


def slow_fat(disk: DamagedDisk, place: int) -> None:
    """Put a FAT32 there whose root directory is full of deleted files, so that its label is looked for to the end."""
    fat = bytearray(512)
    fat[0x52:0x5A] = b"FAT32   "
    struct.pack_into("<HBHBHHBH", fat, 11, 512, 128, 1, 1, 0, 0, 0xF8, 0)
    struct.pack_into("<II4xI", fat, 32, 60_000, 1, 2)
    disk.patch(place, bytes(fat))
    disk.patch(place + 1024, b"\xe5" * limits.MAX_ROOT_BYTES)


def test_all_the_partitions_that_a_gpt_can_name() -> None:
    """Each is of the same bytes, and those are a file system whose label is far down in a directory."""
    entry = bytes([1] * 16) + bytes(16) + struct.pack("<QQ", 8192, 90_000) + bytes(80)
    array = entry * 20_000
    header = struct.pack(
        "<8sIIIIQQQQ16sQIII",
        b"EFI PART",
        0x10000,
        92,
        0,
        0,
        1,
        90_000,
        5010,
        90_000,
        bytes(16),
        2,
        20_000,
        128,
        zlib.crc32(array),
    )
    header = header[:16] + zlib.crc32(header).to_bytes(4, "little") + header[20:]
    disk = DamagedDisk(ebr([(0xEE, 1, 90_000)]) + header.ljust(512, b"\0") + array, SIZE)
    slow_fat(disk, 8192 * 512)

    contents = timed_look([BytesDisk(disk.pread(0, 5 << 20), SIZE)])

    assert limits.MAX_PARTITIONS == len(contents.items)
    assert {"vfat"} == {item.filesystem.kind for item in contents.items if item.filesystem}
    assert [f"partitions from p{limits.MAX_PARTITIONS + 1} on are not shown"] == contents.notes


@pytest.mark.parametrize(
    "text",
    [
        b"a {" * 100_000,
        b"vg { a = [" + b"1," * 1_000_000 + b"] }",
        b'vg { a = "' + b"\\" * 2_000_000,
        b"#" * (4 << 20),
        b"vg { physical_volumes { " + b"p { } " * 300_000 + b"} }",
        b"vg { extent_size = 9999999999999999999999 }",
    ],
    ids=["depth", "list", "string", "comment", "sections", "number"],
)
def test_metadata_of_lvm_that_costs_much(text: bytes) -> None:
    disk = lvm_with(text[: 4 << 20])

    contents = timed_look([disk])

    check(contents, [disk])
    assert "LVM2_member" == contents.items[0].filesystem.kind  # type: ignore[union-attr]


def lvm_with(text: bytes) -> BytesDisk:
    """Return a disk that is a physical volume with this metadata."""
    size = (5 << 20) + 512
    pv = b"A" * 32 + struct.pack("<Q6Q", SIZE, 1 << 20, 0, 0, 0, 4096, size) + bytes(16)
    label = (struct.pack("<I8s", 32, b"LVM2 001") + pv).ljust(492, b"\0")
    sector = struct.pack("<8sQI", b"LABELONE", 1, checksum(label)) + label
    mda = struct.pack("<16sIQQQQII", b" LVM2 x[5A%r0N*>", 1, 4096, size, 512, len(text), checksum(text), 0)
    mda = mda.ljust(508, b"\0")
    data = (bytes(512) + sector).ljust(4096, b"\0") + checksum(mda).to_bytes(4, "little") + mda + text
    return BytesDisk(data, SIZE)


def test_all_the_volumes_that_a_group_can_name() -> None:
    segment = 'segment1{start_extent=0 extent_count=7000 type="striped" stripes=["pv0",0]}'
    volumes = " ".join(f'lv{number}{{status=["VISIBLE"] {segment}}}' for number in range(20_000))
    physical = f'{{ pv0 {{ id = "{dashed("A" * 32)}" pe_start = 20000 pe_count = 7000 }} }}'
    text = f'vg {{ extent_size = 8 seqno = 1 id = "y" physical_volumes {physical} logical_volumes {{ {volumes} }} }}'
    disk = DamagedDisk(lvm_with(text.encode()).data, SIZE)
    slow_fat(disk, 20_000 * 512)
    fast = BytesDisk(disk.pread(0, 12 << 20), SIZE)

    contents = timed_look([fast])

    check(contents, [fast])
    assert 1 + limits.MAX_LVM_VOLUMES == len(contents.items)
    assert {"LVM2_member", "vfat"} == {item.filesystem.kind for item in contents.items if item.filesystem}
    assert [f"only the first {limits.MAX_LVM_VOLUMES} logical volumes are shown"] == contents.notes


SEGMENT = '{ start_extent = 0 extent_count = 1 type = "striped" stripes = ["pv0", 0] }'
VOLUME = f'{{ id = "x" status = ["VISIBLE"] segment1 {SEGMENT} }}'
PHYSICAL = f'{{ pv0 {{ id = "{dashed("A" * 32)}" pe_start = 2048 pe_count = 9 }} }}'
VOLUMES = f"{{ %s {VOLUME} %s {VOLUME} }}"
GROUP = f'{{ extent_size = 8 seqno = 1 id = "y" physical_volumes {PHYSICAL} logical_volumes {VOLUMES} }}'


def seen(text: str) -> tuple[list[bytes], int]:
    """Return the names of the logical volumes of a group with this metadata, and how many notes there are."""
    disk = lvm_with(text.encode("utf-8", errors="surrogateescape"))
    contents = timed_look([disk])
    check(contents, [disk])
    return [item.volume.name for item in contents.items[1:]], len(contents.notes)


@pytest.mark.parametrize("name", ["..", ".", "x" * 128, "x" * 126, "-a"])
def test_names_that_lvm_would_not_take(name: str) -> None:
    long = len(name) == 126  # it would be too long only with the group's

    assert ([b"vg-good"], int(long)) == seen(f"vg {GROUP % (name, 'good')}")
    assert ([], 1 + long) == seen(f"{name} {GROUP % ('one', 'two')}")


@pytest.mark.parametrize("name", ["a/b", "a\nb", "\udcff", '"a"', "a\0b"])
def test_names_that_are_no_words(name: str) -> None:
    assert ([], 1) == seen(f"vg {GROUP % (name, 'good')}")


@pytest.mark.parametrize("seed", range(60))
def test_places_that_cannot_be_read(healthy: tuple[str, bytes], seed: int) -> None:
    """A read error loses what is recorded there, is told in a note, and raises nothing."""
    kind, data = healthy
    generator = random.Random(f"{kind} {seed}")
    start, end = generator.choice([*PLACES[kind], (0, 70_000)])
    place = generator.randrange(start, end) // 512 * 512
    whole = look([BytesDisk(data)])
    disk = BytesDisk(data, broken=[(place, place + 512)])

    contents = timed_look([disk])

    check(contents, [disk])
    assert contents == whole or contents.notes or kind in ("fat16", "fat32", "exfat", "ntfs")

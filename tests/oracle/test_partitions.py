"""Partition tables against sfdisk, sgdisk and partx (libblkid), which read the same bytes.

The test kernel has no partition support of its own; partx tells a kernel what to show, by the kernel's rules.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from qcowfs.inside.partitions import find
from qcowfs.inside.volume import Volume
from tests.support import need
from tests.support.disks import FileDisk, attached, run

SIZE = 64 << 20
SECTORS = SIZE // 512
EXTENDED = ("0x5", "0xf", "0x85")
SFDISK = ("sfdisk", "--quiet", "--no-reread", "--no-tell-kernel")  # it waits 0.25 s for a kernel it tells
GUIDS = ("0FC63DAF-8483-4772-8E79-3D69D8477DE4", "C12A7328-F81F-11D2-BA4B-00A0C93EC93B")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    need("sfdisk", "sgdisk", "partx", "losetup")
    path = tmp_path / "disk.raw"
    path.touch()
    with open(path, "r+b") as file:
        file.truncate(SIZE)
    return path


def partx(device: Path | str, sector_size: int = 512) -> list[tuple[object, ...]]:
    """Return name, start, size, type, uuid and label of each partition but the extended one, in bytes."""
    said = run("partx", "--pairs", "-o", "NR,START,SECTORS,TYPE,UUID,NAME", device, check=False)
    found = []
    for line in said.splitlines():
        number, start, sectors, kind, identity, label = re.findall(r'"([^"]*)"', line)
        if kind not in EXTENDED:
            kind = kind if kind.startswith("0x") else kind.upper()
            label = re.sub(rb"\\x(..)", lambda match: bytes.fromhex(match[1].decode()), label.encode()).decode()
            found.append((f"p{number}".encode(), int(start) * 512, int(sectors) * 512, kind, identity, label))
    return found


def sfdisk(path: Path | str) -> list[tuple[object, ...]]:
    table = json.loads(run("sfdisk", "--json", path))["partitiontable"]
    found = []
    for one in table.get("partitions", []):
        number = re.search(r"\d+$", one["node"].removeprefix(str(path)))
        assert number is not None
        kind = one["type"] if "-" in one["type"] else f"0x{one['type']}"
        if kind not in EXTENDED:
            size = table["sectorsize"]
            found.append((f"p{number[0]}".encode(), one["start"] * size, one["size"] * size, kind))
    return found


def ours(path: Path) -> list[tuple[object, ...]]:
    found = find(FileDisk(path))
    assert found.notes == []
    return [shown(volume) for volume in found.volumes]


def shown(volume: Volume) -> tuple[object, ...]:
    assert len(volume.segments) == 1 and volume.segments[0].length == volume.size
    return volume.name, volume.segments[0].offset, volume.size, volume.type, volume.uuid, volume.label


def random_gpt(generator: random.Random) -> str:
    lines, start = ["label: gpt", f"table-length: {generator.choice([128, 128, 4, 8, 200, 256])}"], 2048
    limit = int(lines[1].split()[1])
    for number in sorted(generator.sample(range(1, min(limit, 130) + 1), generator.randrange(1, min(limit, 20)))):
        start += generator.randrange(0, 500)
        size = generator.randrange(1, 4000)
        name = generator.choice(["", "root", "EFI System", "größer", "x" * 36, "日本"])
        lines.append(f'{number} : start={start}, size={size}, type={generator.choice(GUIDS)}, name="{name}"')
        start += size
    return "\n".join(lines)


def random_mbr(generator: random.Random) -> str:
    """A table with primary ones, and mostly an extended one that holds logical ones."""
    lines = ["label: dos", f"label-id: {generator.randrange(1 << 32):#010x}"]
    slots = generator.sample([1, 2, 3, 4], generator.randrange(1, 5))
    start, logical = 2048, 5
    extended = generator.choice([*slots, 0])
    for slot in slots:
        size = generator.randrange(16_000, 24_000) if slot == extended else generator.randrange(1, 6000)
        kind = (
            generator.choice(["5", "f", "85"]) if slot == extended else generator.choice(["83", "7", "c", "82", "8e"])
        )
        lines.append(f"{slot} : start={start}, size={size}, type={kind}")
        place = start
        while slot == extended and generator.random() < 0.85 and place + 3000 < start + size:
            place += generator.randrange(1, 500)
            length = generator.randrange(1, 2000)
            lines.append(f"{logical} : start={place}, size={length}, type={generator.choice(['83', '82', '7'])}")
            place += length
            logical += 1
        start += size + generator.randrange(0, 1000)
    lines[2:] = sorted(lines[2:], key=lambda line: int(line.split()[0]))
    return "\n".join(lines)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("table", [random_gpt, random_mbr])
def test_random_tables(image: Path, table: object, seed: int) -> None:
    script = table(random.Random(seed))  # type: ignore[operator]
    run(*SFDISK, "--force", image, text=script)

    found = ours(image)

    assert partx(image) == found
    assert sfdisk(image) == [one[:4] for one in found]


@pytest.mark.parametrize("seed", range(3))
def test_sectors_of_4096_bytes(image: Path, seed: int) -> None:
    with attached(image, "--sector-size", "4096") as device:
        lines = ["label: gpt"]
        start = 256
        generator = random.Random(seed)
        for _ in range(generator.randrange(1, 9)):
            size = generator.randrange(1, 500)
            lines.append(f"start={start}, size={size}, name=four")
            start += size
        run(*SFDISK, "--force", device, text="\n".join(lines))
        expected = sfdisk(device)

    assert expected == [one[:4] for one in ours(image)]


@pytest.mark.parametrize("holds", ["p1", "p5", "nothing"])
def test_an_mbr_of_sectors_of_4096_bytes(image: Path, holds: str) -> None:
    need("mke2fs")
    script = """label: dos
        1 : start=256, size=2000, type=83
        2 : start=4096, size=9000, type=5
        5 : start=4200, size=2000, type=83
        6 : start=7000, size=1000, type=83"""
    with attached(image, "--sector-size", "4096") as device:
        run(*SFDISK, "--force", device, text=script if holds != "p1" else script.partition("2 :")[0])
        expected = sfdisk(device)
    if holds != "nothing":
        start = next(one[1] for one in expected if one[0] == holds.encode())
        run("mke2fs", "-q", "-F", "-t", "ext4", "-E", f"offset={start}", image, "2000k")

    found = ours(image)

    assert len(found) == (1 if holds == "p1" else 3)
    assert expected == [one[:4] for one in found]


@pytest.mark.parametrize("damaged", ["header", "array", "both"])
def test_the_backup_is_used_where_the_first_table_is_damaged(image: Path, damaged: str) -> None:
    run(*SFDISK, image, text="label: gpt\nsize=1000\nsize=2000, name=two\n")
    expected = ours(image)
    with open(image, "r+b") as file:
        if damaged in ("header", "both"):
            file.seek(512 + 40)
            file.write(b"\xff" * 8)
        if damaged in ("array", "both"):
            file.seek(1024)
            file.write(b"\xff" * 64)

    found = find(FileDisk(image))

    assert expected == [shown(volume) for volume in found.volumes]
    assert expected == partx(image)
    assert ["the GPT at the disk's start is damaged; its backup at 0x3fffe00 is used"] == found.notes


def test_the_backup_of_a_disk_with_sectors_of_4096_bytes(image: Path) -> None:
    with attached(image, "--sector-size", "4096") as device:
        run("sfdisk", "--quiet", device, text="label: gpt\nsize=100\nsize=200\n")
    expected = ours(image)
    with open(image, "r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))

    found = find(FileDisk(image))

    assert [100 << 12, 200 << 12] == [volume.size for volume in found.volumes]
    assert expected == [shown(volume) for volume in found.volumes]
    assert ["the GPT at the disk's start is damaged; its backup at 0x3fff000 is used"] == found.notes


def test_a_gpt_of_which_nothing_is_left(image: Path) -> None:
    run(*SFDISK, image, text="label: gpt\nsize=1000\n")
    with open(image, "r+b") as file:
        for place in (512, SIZE - 512):
            file.seek(place)
            file.write(bytes(512))

    found = find(FileDisk(image))

    assert (found.volumes, found.notes) == ([], ["the GPT and its backup are damaged; no partition is shown"])


def test_a_grown_disk_has_its_backup_where_the_first_header_says(image: Path) -> None:
    run(*SFDISK, image, text="label: gpt\nsize=1000\nsize=2000\n")
    expected = ours(image)
    with open(image, "r+b") as file:
        file.truncate(2 * SIZE)
        file.seek(1024)
        file.write(b"\xff" * 8)

    assert expected == [shown(volume) for volume in find(FileDisk(image)).volumes]


def test_without_a_protective_mbr_a_gpt_is_not_believed(image: Path) -> None:
    run(*SFDISK, image, text="label: gpt\nsize=1000\n")
    with open(image, "r+b") as file:
        file.write(bytes(512))

    found = find(FileDisk(image))

    assert partx(image) == found.volumes == []
    assert ["there is a GPT, but no protective MBR; as in Linux it is not believed"] == found.notes


def test_in_a_hybrid_disk_the_gpt_wins(image: Path) -> None:
    run(*SFDISK, image, text="label: gpt\nsize=10000\nsize=2000\nsize=3000\n")
    run("sgdisk", "--hybrid", "2:1", image)

    found = ours(image)

    assert [b"p1", b"p2", b"p3"] == [one[0] for one in found]
    assert partx(image) == found


@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_partitions_past_the_end_of_the_disk(image: Path, table: str) -> None:
    """Linux cuts the one and leaves the other out; of a GPT like this it shows nothing, which helps nobody."""
    run(*SFDISK, image, text=f"label: {table}\nstart=2048, size=2048\nstart=8192, size=8192\nstart=90000\n")
    with open(image, "r+b") as file:
        file.truncate(10_000 * 512)

    found = find(FileDisk(image))

    assert [(b"p1", 2048 * 512), (b"p2", 1808 * 512)] == [(volume.name, volume.size) for volume in found.volumes]
    expected = [
        "p2 reaches past the end of the disk and is cut off there",
        "p3 lies past the end of the disk and is not shown",
    ]
    assert (["the GPT was made for a larger disk"] if table == "gpt" else []) + expected == found.notes


def test_overlapping_partitions_are_shown_as_they_are(image: Path) -> None:
    run(*SFDISK, "--force", image, text="label: dos\nstart=2048, size=9000\nstart=20000, size=9000\n")
    with open(image, "r+b") as file:
        file.seek(0x1BE + 16 + 8)
        file.write((4000).to_bytes(4, "little"))

    assert [2048 * 512, 4000 * 512] == [one[1] for one in ours(image)]
    assert partx(image) == ours(image)


@pytest.mark.parametrize(
    "words",
    [
        ("mkfs.vfat", "-F", "12"),
        ("mkfs.vfat", "-F", "16"),
        ("mkfs.vfat", "-F", "32"),
        ("mkfs.ntfs", "-F", "-Q", "-q"),
        ("mkfs.exfat",),
        ("mkfs.ext4", "-q"),
    ],
    ids=" ".join,
)
def test_a_file_system_is_no_partition_table(image: Path, words: tuple[str, ...]) -> None:
    need(words[0])
    run(*words, image)

    assert [] == ours(image)


def test_boot_code_before_ext4_is_no_partition_table(image: Path) -> None:
    need("mkfs.ext4")
    run("mkfs.ext4", "-q", image)
    with open(image, "r+b") as file:
        file.write(b"\xeb\x63" + random.Random(1).randbytes(438) + bytes(70) + b"\x55\xaa")

    assert [] == ours(image)


def test_a_disk_that_was_fat_once_has_its_partitions(image: Path) -> None:
    """GRUB keeps the parameters of a FAT in the first sector; the kernel looks at the table nevertheless."""
    run("mkfs.vfat", image)
    run(*SFDISK, "--force", "--wipe", "never", image, text="label: dos\nstart=2048, size=2048\n")
    with open(image, "rb") as file:
        assert b"FAT" in file.read(512)

    assert [b"p1"] == [one[0] for one in ours(image)]


def test_code_where_a_table_would_be(image: Path) -> None:
    with open(image, "r+b") as file:
        file.write(b"\xeb" + b"A disk read error occurred. " * 18)
        file.seek(510)
        file.write(b"\x55\xaa")

    assert partx(image) == ours(image) == []


def test_a_copy_is_found_the_same(image: Path, tmp_path: Path) -> None:
    """Names of partitions do not depend on the number of the disk, segments do."""
    run(*SFDISK, image, text="label: gpt\nsize=1000\n")
    copy = tmp_path / "copy"
    shutil.copyfile(image, copy)

    assert [7] == [volume.segments[0].disk for volume in find(FileDisk(copy), 7).volumes]

"""Logical volumes against LVM2's own tools, which need no device-mapper to write and to report metadata."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest

from qcowfs.inside.contents import Contents, Item, VolumeBytes, look
from tests.support import need
from tests.support.disks import FileDisk, run
from tests.support.lvm import Lvm, lvm_on

SIZE = 48 << 20
EXTENT = "1m"


def disks(directory: Path, count: int) -> list[Path]:
    need("lvm", "losetup", "mkfs.ext4")
    paths = [directory / f"disk{number}" for number in range(count)]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(SIZE)
    return paths


def group(lvm: Lvm, *words: str, name: str = "vg") -> None:
    lvm("pvcreate", "-q", *words, *lvm.devices)
    lvm("vgcreate", "-s", EXTENT, name, *lvm.devices)


def seen(paths: list[Path]) -> dict[str, Item]:
    contents = look([FileDisk(path) for path in paths])
    assert contents.notes == []
    return volumes(contents)


def volumes(contents: Contents) -> dict[str, Item]:
    return {item.volume.name.decode(): item for item in contents.items if item.volume.kind == "lv"}


def expected(lvm: Lvm) -> dict[str, tuple[str, int, list[tuple[int, int, int, int]]]]:
    """Return uuid, size and (start, length, disk, offset) of the segments of each linear volume that lvs reports."""
    physical = lvm.physical()
    found: dict[str, tuple[str, int, list[tuple[int, int, int, int]]]] = {}
    for one in lvm.segments():
        assert one["segtype"] == "linear"
        device, first = re.fullmatch(r"(.*):(\d+)-\d+", one["seg_pe_ranges"]).groups()  # type: ignore[union-attr]
        pv = physical[device]
        offset = int(pv["pe_start"]) + int(first) * int(pv["vg_extent_size"])
        name = f"{one['vg_name'].replace('-', '--')}-{one['lv_name'].replace('-', '--')}"
        segments = found.setdefault(name, (one["lv_uuid"], int(one["lv_size"]), []))[2]
        segments.append((int(one["seg_start"]), int(one["seg_size"]), lvm.devices.index(device), offset))
    return {name: (uuid, size, sorted(segments)) for name, (uuid, size, segments) in found.items()}


def ours(paths: list[Path]) -> dict[str, tuple[str, int, list[tuple[int, int, int, int]]]]:
    found = {}
    for name, item in seen(paths).items():
        assert item.volume.trouble == ""
        segments = [(one.start, one.length, one.disk, one.offset) for one in item.volume.segments]
        found[name] = (item.volume.uuid, item.volume.size, segments)
    return found


def on_first(found: dict[str, tuple[str, int, list[tuple[int, int, int, int]]]]) -> dict[str, object]:
    return {name: one for name, one in found.items() if any(segment[2] == 0 for segment in one[2])}


@pytest.mark.parametrize("seed", range(8))
def test_random_groups(tmp_path: Path, seed: int) -> None:
    """Volumes that grow, shrink and go, on one to three disks, with metadata areas of random number and place."""
    generator = random.Random(seed)
    paths = disks(tmp_path, generator.randrange(1, 4))
    with lvm_on(paths, tmp_path) as lvm:
        copies = str(generator.randrange(1, 3))
        group(lvm, "--metadatacopies", copies, "--dataalignment", generator.choice(["64k", "1m", "3m"]), name="a-b")
        names: list[str] = []
        for number in range(generator.randrange(4, 12)):
            name = generator.choice(["root", "var-log", "s.w+p_", "-"]).strip("-") + f"{number}"
            lvm.create("a-b", name, "-l", str(generator.randrange(1, 7)))
            names.append(name)
            if generator.random() < 0.4:
                lvm("lvextend", "-q", "-l", "+2", f"a-b/{generator.choice(names)}")
            if generator.random() < 0.2:
                lvm("lvremove", "-q", "-f", f"a-b/{names.pop(generator.randrange(len(names)))}")
        wanted = on_first(expected(lvm))

    assert wanted == ours(paths)
    assert wanted


def test_metadata_that_goes_round_the_end_of_its_area(tmp_path: Path) -> None:
    paths = disks(tmp_path, 1)
    with lvm_on(paths, tmp_path) as lvm:
        group(lvm, "--metadatasize", "32k", "--dataalignment", "4k")
        for number in range(20):
            lvm.create("vg", f"filler{number}", "-l", "1")
        lvm.create("vg", "one", "-l", "3")
        wrapped = 0
        for number in range(12):
            lvm("lvrename", "vg", *(("one", "two") if number % 2 == 0 else ("two", "one")))
            assert expected(lvm) == ours(paths)
            wrapped += goes_round(paths[0])

    assert wrapped > 2


def goes_round(path: Path) -> bool:
    """Look at the raw pointer in the metadata area at 4 KiB, as layout.h has it."""
    header = path.read_bytes()[4096 : 4096 + 64]
    size, offset, length = (int.from_bytes(header[place : place + 8], "little") for place in (32, 40, 48))
    return offset + length > size


def test_what_is_in_a_volume_is_read(tmp_path: Path) -> None:
    """An ext4 in a volume of three pieces on two disks: it is put there piece by piece, where lvs says they are."""
    paths = disks(tmp_path, 2)
    with lvm_on(paths, tmp_path) as lvm:
        group(lvm)
        lvm.create("vg", "root", "-l", "10", lvm.devices[0])
        lvm.create("vg", "other", "-l", "3", lvm.devices[0])
        lvm("lvextend", "-q", "-l", "+5", "vg/root", lvm.devices[0])
        lvm("lvextend", "-q", "-l", "+7", "vg/root", lvm.devices[1])
        _, size, segments = expected(lvm)["vg-root"]
    content = tmp_path / "content"
    with open(content, "wb") as file:
        file.truncate(size)
    run("mkfs.ext4", "-q", "-L", "in lvm", content)
    with open(content, "r+b") as file:
        file.seek(size - (3 << 20))
        file.write(random.Random(1).randbytes(3 << 20))
    data = content.read_bytes()
    for start, length, disk, offset in segments:
        with open(paths[disk], "r+b") as file:
            file.seek(offset)
            file.write(data[start : start + length])

    item = seen(paths)["vg-root"]
    reader = VolumeBytes(item.volume, [FileDisk(path) for path in paths])

    assert len(segments) == 3
    assert item.filesystem is not None
    assert ("ext4", "in lvm", size, "") == (
        item.filesystem.kind,
        item.filesystem.label,
        item.filesystem.size,
        item.filesystem.trouble,
    )
    assert data == reader.read(0, size + 1)
    assert data[(10 << 20) - 5 : (10 << 20) + 5] == reader.read((10 << 20) - 5, 10)


def test_physical_volumes_in_partitions_of_one_disk(tmp_path: Path) -> None:
    need("sfdisk")
    first, second, disk = *disks(tmp_path, 2), tmp_path / "whole"
    with lvm_on([first, second], tmp_path) as lvm:
        group(lvm)
        lvm.create("vg", "big", "-l", "60")
        wanted = expected(lvm)
        lvm.create("vg", "fast", "-i", "2", "-l", "2", "--alloc", "anywhere")
    with open(disk, "wb") as file:
        file.truncate(3 * SIZE)
    table = f"label: gpt\nstart=2048,size={SIZE >> 9}\nstart={4096 + (SIZE >> 9)},size={SIZE >> 9}\n"
    run("sfdisk", "-q", "--no-tell-kernel", "--no-reread", disk, text=table)
    starts = (1 << 20, (2 << 20) + SIZE)
    with open(disk, "r+b") as file:
        for path, start in zip((first, second), starts, strict=True):
            file.seek(start)
            file.write(path.read_bytes())

    contents = look([FileDisk(disk)])

    assert ([b"p1", b"p2", b"vg-big", b"vg-fast"], []) == (
        [item.volume.name for item in contents.items],
        contents.notes,
    )
    trouble = "a striped volume is not supported yet; its parts are in p1.raw, p2.raw"
    assert trouble == contents.items[3].volume.trouble
    moved = [(start, length, 0, starts[number] + offset) for start, length, number, offset in wanted["vg-big"][2]]
    assert moved == [(one.start, one.length, one.disk, one.offset) for one in contents.items[2].volume.segments]


def test_a_missing_disk(tmp_path: Path) -> None:
    paths = disks(tmp_path, 2)
    with lvm_on(paths, tmp_path) as lvm:
        group(lvm)
        for name, words in {"here": (lvm.devices[0],), "there": (lvm.devices[1],), "both": ()}.items():
            lvm.create("vg", name, "-l", "60" if name == "both" else "4", *words)
        missing = lvm.physical()[lvm.devices[1]]["pv_uuid"]

    found = seen(paths[:1])

    assert {"vg-here": "", "vg-both": f"the physical volume {missing} is missing"} == {
        name: item.volume.trouble for name, item in found.items() if name != "vg-there"
    }
    assert all((item.volume.segments == ()) == bool(item.volume.trouble) for item in found.values())


def test_a_disk_whose_metadata_is_older(tmp_path: Path) -> None:
    """As after a disk was away while the group was changed: the highest seqno counts, in whatever order."""
    paths = disks(tmp_path, 2)
    with lvm_on(paths, tmp_path) as lvm:
        group(lvm)
        lvm.create("vg", "old", "-l", "60")
        shutil.copyfile(paths[0], tmp_path / "old")
        lvm("lvrename", "vg", "old", "new")

    assert ["vg-new"] == list(seen([tmp_path / "old", paths[1]]))
    assert ["vg-new"] == list(seen([paths[1], tmp_path / "old"]))
    assert ["vg-old"] == list(volumes(look([FileDisk(tmp_path / "old")])))


def test_a_damaged_copy_of_two(tmp_path: Path) -> None:
    paths = disks(tmp_path, 1)
    with lvm_on(paths, tmp_path) as lvm:
        group(lvm, "--metadatacopies", "2")
        lvm.create("vg", "root", "-l", "4")
        wanted = expected(lvm)
    data = bytearray(paths[0].read_bytes())
    place = data.index(b"seqno = 2")
    data[place + 8 : place + 9] = b"9"
    paths[0].write_bytes(data)

    contents = look([FileDisk(paths[0])])

    assert list(wanted) == list(volumes(contents))
    assert ["the disk: a copy of the LVM metadata has a wrong checksum and is not used"] == contents.notes


def test_a_disk_without_metadata_copies(tmp_path: Path) -> None:
    paths = disks(tmp_path, 2)
    with lvm_on(paths, tmp_path) as lvm:
        lvm("pvcreate", "-q", "--metadatacopies", "0", lvm.devices[0])
        lvm("pvcreate", "-q", lvm.devices[1])
        lvm("vgcreate", "-s", EXTENT, "vg", *lvm.devices)
        lvm.create("vg", "all", "-l", "100%FREE")
        wanted = expected(lvm)

    assert wanted == ours(paths)
    assert {} == seen(paths[:1])


def test_a_cloned_disk(tmp_path: Path) -> None:
    paths = disks(tmp_path, 1)
    with lvm_on(paths, tmp_path) as lvm:
        group(lvm)
        lvm.create("vg", "root", "-l", "4")
    shutil.copyfile(paths[0], tmp_path / "clone")

    contents = look([FileDisk(paths[0]), FileDisk(tmp_path / "clone")])

    assert [0] == [one.disk for one in volumes(contents)["vg-root"].volume.segments]
    assert len(contents.notes) == 1 and "is there twice" in contents.notes[0]


def test_a_striped_volume_is_named_and_not_read(tmp_path: Path) -> None:
    paths = disks(tmp_path, 2)
    with lvm_on(paths, tmp_path) as lvm:
        group(lvm)
        lvm.create("vg", "fast", "-i", "2", "-l", "8")
        lvm.create("vg", "plain", "-l", "8")

    found = {name: item.volume for name, item in seen(paths).items()}

    trouble = "a striped volume is not supported yet; its parts are in the disk itself, the disk itself of another disk"
    assert {"vg-fast": trouble, "vg-plain": ""} == {name: volume.trouble for name, volume in found.items()}
    assert (8 << 20, ()) == (found["vg-fast"].size, found["vg-fast"].segments)

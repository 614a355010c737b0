"""What is inside a disk, from bytes made here: text of LVM, reads through segments, and how many reads a look costs."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import pytest

from qcowfs._crc32c import crc32c
from qcowfs.errors import ReadFault, TreeFault
from qcowfs.inside import lvmtext
from qcowfs.inside.contents import Contents, look
from qcowfs.inside.lvmlabel import checksum, dashed
from qcowfs.inside.partitionlist import PartitionList
from qcowfs.inside.probes import padded
from qcowfs.inside.volume import Segment, Volume
from qcowfs.inside.volumebytes import Blocks, VolumeBytes
from tests.support import need
from tests.support.disks import BytesDisk, FileDisk, run


def test_text_of_lvm() -> None:
    text = (
        rb"""
    # a comment = { not read
    vg-0 { seqno=3 status = ["READ", "VISIBLE",] # more
        description = "a \"quoted\" \\ {word}" empty = [] factor = -1.5
        s.1 { stripes = [
            "pv0", 7
        ] } }
    """
        + b"\0"
    )

    assert {
        "vg-0": {
            "seqno": 3,
            "status": ["READ", "VISIBLE"],
            "description": 'a "quoted" \\ {word}',
            "empty": [],
            "factor": -1,
            "s.1": {"stripes": ["pv0", 7]},
        }
    } == lvmtext.parse(text)


def test_of_two_with_one_name_the_first_counts() -> None:
    assert {"a": 1} == lvmtext.parse(b"a = 1 a = 2")


@pytest.mark.parametrize(
    "text",
    [b"a", b"a =", b"a = [1", b"a {", b"}", b"a = }", b'a = "x', b"= 1", b"a = b", b"a = /", b"a = [[1]]", b"1 2"],
)
def test_what_is_no_text_of_lvm(text: bytes) -> None:
    with pytest.raises(lvmtext.BadText):
        lvmtext.parse(text)


def test_checksums() -> None:
    """LVM's of nothing is its start; that of ext4 is CRC-32C, whose check value is published inverted."""
    assert 0xF597A6CF == checksum(b"")
    assert 0xE3069283 == crc32c(0xFFFFFFFF, b"123456789") ^ 0xFFFFFFFF


def test_a_uuid_of_lvm() -> None:
    assert "RIZpq1-y5XN-AWLY-rgbN-7pjB-csTd-o5ggwa" == dashed("RIZpq1y5XNAWLYrgbN7pjBcsTdo5ggwa")


def volume_on(segments: list[Segment]) -> Volume:
    return Volume(name=b"vg-lv", kind="lv", segments=segments, size=sum(one.length for one in segments))


def test_reads_go_through_the_segments() -> None:
    generator = random.Random(5)
    disks = [BytesDisk(generator.randbytes(10_000)) for _ in range(3)]
    segments, expected = [], b""
    for _ in range(20):
        disk, offset, length = generator.randrange(3), generator.randrange(9000), generator.randrange(1, 1000)
        segments.append(Segment(len(expected), length, disk, offset))
        expected += disks[disk].data[offset : offset + length]
    reader = VolumeBytes(volume_on(segments), disks)

    assert len(expected) == reader.size
    for _ in range(500):
        offset, length = generator.randrange(reader.size + 10), generator.randrange(3000)
        assert expected[offset : offset + length] == reader.read(offset, length)
    assert b"" == reader.read(1 << 70, 5)


def test_a_volume_with_trouble_is_not_read() -> None:
    volume = Volume(name=b"vg-lv", kind="lv", segments=(), size=10, trouble="a striped volume is not supported yet")

    with pytest.raises(TreeFault, match="vg-lv: a striped volume"):
        VolumeBytes(volume, []).read(0, 1)


def test_past_the_end_of_a_volume_a_probe_sees_zeros() -> None:
    read = padded(BytesDisk(b"abc").pread, 3)

    assert (b"bc\0\0", b"\0\0", b"\0\0", b"\0\0") == (read(1, 4), read(3, 2), read(1 << 80, 2), read(-5, 2))


@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_the_disk(seed: int) -> None:
    generator = random.Random(seed)
    disk = BytesDisk(generator.randbytes(300_001), broken=[(100_000, 100_100), (200_000, 200_001)])
    blocks = Blocks(disk)
    for _ in range(300):
        offset, length = generator.randrange(300_100), generator.choice([0, 1, 512, 5000, 70_000, 140_000])
        try:
            expected: bytes | None = disk.pread(offset, length)
        except ReadFault:
            expected = None
        if expected is None:
            with pytest.raises(ReadFault):
                blocks.pread(offset, length)
        else:
            assert expected == blocks.pread(offset, length)


def test_partitions_within_the_disk() -> None:
    found = PartitionList(disk=3, size=1000)
    found.add(1, 0, 1000, type="0x83", uuid="u", label="l")
    found.add(2, 999, 2, type="", uuid="")
    found.add(3, 1000, 1, type="", uuid="")

    assert [(b"p1", 1000), (b"p2", 1)] == [(volume.name, volume.size) for volume in found.volumes]
    assert Segment(0, 1, 3, 999) == found.volumes[1].segments[0]
    assert 2 == len(found.notes)


@pytest.mark.parametrize("tool", ["mkfs.ext4", "mkfs.vfat", "mkfs.ntfs"])
def test_a_look_at_one_file_system_costs_two_reads(tmp_path: Path, tool: str) -> None:
    """One more where the label is elsewhere. The start, and the end, where the superblock of a RAID could be."""
    need(tool)
    path = tmp_path / "disk"
    with open(path, "wb") as file:
        file.truncate(64 << 20)
    run(tool, *(["-F", "-Q"] if tool == "mkfs.ntfs" else []), path)
    disk = FileDisk(path)

    contents = look([disk])

    assert [b""] == [item.volume.name for item in contents.items]
    assert disk.reads <= (2 if tool == "mkfs.ext4" else 3)


def test_a_look_at_nothing() -> None:
    assert Contents([], []) == look([BytesDisk(b"")]) == look([BytesDisk(bytes(5))]) == look([BytesDisk(bytes(99_999))])


def test_what_is_in_an_unreadable_partition_is_not_known() -> None:
    entry = struct.pack("<BxxxBxxxII", 0, 0x83, 8, 8) + struct.pack("<BxxxBxxxII", 0, 0x83, 16, 8)
    disk = BytesDisk(bytes(446) + entry + bytes(32) + b"\x55\xaa", 1 << 20, broken=[(8 * 512, 8 * 512 + 100)])

    contents = look([disk])

    assert [(b"p1", None), (b"p2", None)] == [(item.volume.name, item.filesystem) for item in contents.items]
    assert len(contents.notes) == 1
    assert contents.notes[0].startswith("p1: what it holds is not known: disk: layer 0, guest offset 0x1000")

"""Volumes of LVM that are not plain pieces: those are listed that lvs lists, and each says why it has no bytes."""

from __future__ import annotations

import uuid
from pathlib import Path

from qcowfs.inside.contents import look
from tests.support import need
from tests.support.disks import FileDisk
from tests.support.lvm import lvm_on

LINEAR = 'type = "striped" stripe_count = 1 stripes = ["pv0", {}]'

# Name, whether it is visible, its segment; as lvcreate of LVM 2.03 writes them.
VOLUMES = [
    ("plain", True, LINEAR.format(0)),
    (
        "pool",
        True,
        'type = "thin-pool" metadata = "pool_tmeta" pool = "pool_tdata" transaction_id = 1 chunk_size = 128',
    ),
    ("thin", True, 'type = "thin" thin_pool = "pool" transaction_id = 0 device_id = 1'),
    ("pool_tmeta", False, LINEAR.format(2)),
    ("pool_tdata", False, LINEAR.format(4)),
    ("origin", True, LINEAR.format(6)),
    ("snap", True, LINEAR.format(8)),
    ("snapshot0", True, 'type = "snapshot" chunk_size = 8 origin = "origin" cow_store = "snap"'),
    (
        "mirrored",
        True,
        'type = "raid1" device_count = 2 region_size = 1024 raids = '
        '["mirrored_rmeta_0", "mirrored_rimage_0", "mirrored_rmeta_1", "mirrored_rimage_1"]',
    ),
    ("mirrored_rmeta_0", False, LINEAR.format(10)),
    ("mirrored_rimage_0", False, LINEAR.format(12)),
    ("mirrored_rmeta_1", False, LINEAR.format(14)),
    ("mirrored_rimage_1", False, LINEAR.format(16)),
    ("nothing", True, 'type = "error"'),
    ("zeros", True, 'type = "zero"'),
]
VISIBLE = ', "VISIBLE"'
UNSUPPORTED = "an LVM volume of the kind {} is not supported yet; its parts are in the disk itself"


def identity(number: int) -> str:
    digits = uuid.UUID(int=number + 1).hex
    return "-".join([digits[:6], *(digits[place : place + 4] for place in range(6, 26, 4)), digits[26:]])


def metadata(physical: str, volumes: list[tuple[str, bool, str]]) -> str:
    logical = "\n".join(
        f'{name} {{ id = "{identity(number)}" status = ["READ", "WRITE"{VISIBLE if visible else ""}]'
        f" flags = [] segment_count = 1 segment1 {{ start_extent = 0 extent_count = "
        f"{1 if 'rmeta' in name else 2} {segment} }} }}"
        for number, (name, visible, segment) in enumerate(volumes)
    )
    return f"""
        contents = "Text Format Volume Group"
        version = 1
        vg {{
            id = "{identity(99)}" seqno = 7 format = "lvm2" status = ["RESIZEABLE", "READ", "WRITE"] flags = []
            extent_size = 2048 max_lv = 0 max_pv = 0 metadata_copies = 0
            physical_volumes {{
                pv0 {{ id = "{physical}" device = "/dev/x" status = ["ALLOCATABLE"] flags = []
                       dev_size = 98304 pe_start = 2048 pe_count = 40 }}
            }}
            logical_volumes {{ {logical} }}
        }}
    """


def restored(directory: Path, volumes: list[tuple[str, bool, str]]) -> tuple[Path, list[str]]:
    """Return a disk with these volumes, and what lvs lists."""
    need("lvm", "losetup")
    disk, text = directory / "disk", directory / "text"
    with open(disk, "wb") as file:
        file.truncate(48 << 20)
    text.write_text(metadata(identity(500), volumes))
    with lvm_on([disk], directory) as lvm:
        lvm("pvcreate", "-q", "--norestorefile", "--uuid", identity(500), *lvm.devices)
        lvm("vgcfgrestore", "--force", "--yes", "-f", text, "vg")
        listed = lvm("lvs", "--noheadings", "-o", "lv_name").split()
    return disk, listed


def troubles(disk: Path) -> dict[str, str]:
    contents = look([FileDisk(disk)])
    assert contents.notes == []
    found = {item.volume.name.decode().removeprefix("vg-"): item.volume for item in contents.items[1:]}
    assert all(bool(volume.trouble) != bool(volume.segments) for volume in found.values())
    return {name: volume.trouble for name, volume in found.items()}


def test_what_is_listed_and_what_is_said_of_it(tmp_path: Path) -> None:
    disk, listed = restored(tmp_path, VOLUMES)

    found = troubles(disk)

    assert sorted(listed) == sorted(found)
    assert {
        "plain": "",
        "origin": "",
        "snap": "an LVM snapshot is not supported yet; its parts are in the disk itself",
        "pool": UNSUPPORTED.format("thin-pool"),
        "thin": UNSUPPORTED.format("thin"),
        "mirrored": UNSUPPORTED.format("raid1"),
        "nothing": UNSUPPORTED.format("error"),
        "zeros": UNSUPPORTED.format("zero"),
    } == found


def test_a_snapshot_that_is_being_merged(tmp_path: Path) -> None:
    """Until it is, some of the origin's bytes are in the snapshot."""
    tie = ("snapshot0", True, 'type = "snapshot" chunk_size = 8 origin = "origin" merging_store = "snap"')
    disk, listed = restored(tmp_path, [("origin", True, LINEAR.format(0)), ("snap", True, LINEAR.format(4)), tie])

    found = troubles(disk)

    assert ["origin"] == listed == list(found)
    assert found["origin"].startswith("an LVM volume into which a snapshot is merged is not supported yet")

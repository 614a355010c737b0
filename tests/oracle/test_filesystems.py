"""Recognising file systems against blkid, on what the real mkfs of each makes."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

import pytest

from qcowfs.inside.filesystems import Filesystem, probe
from tests.support import need
from tests.support.disks import FileDisk, run

UUID = "0fc63daf-8483-4772-8e79-3d69d8477de4"
EXT4 = ("mkfs.ext4", "-q", "-F", "-L", "root fs", "-U", UUID)

# What is made, the size in MiB.
MADE = {
    "ext4": (EXT4, 64),
    "ext4, no label": (("mkfs.ext4", "-q", "-F"), 64),
    "ext4 of 1 KiB blocks": ((*EXT4, "-b", "1024", "-O", "64bit,metadata_csum,meta_bg,^resize_inode"), 64),
    "ext4 with all": ((*EXT4, "-O", "inline_data,ea_inode,large_dir,mmp,bigalloc,encrypt,metadata_csum_seed"), 64),
    "ext4 without a journal": ((*EXT4, "-O", "^has_journal"), 64),
    "ext3": (("mkfs.ext3", "-q", "-F", "-L", "größer"), 64),
    "ext2": (("mkfs.ext2", "-q", "-F", "-L", "x" * 16, "-U", UUID), 64),
    "journal": (("mkfs.ext4", "-q", "-F", "-O", "journal_dev"), 64),
    "FAT12": (("mkfs.vfat", "-F", "12", "-n", "FLOPPY"), 4),
    "FAT16": (("mkfs.vfat", "-F", "16", "-n", "BOOT DISK", "-i", "1234abcd"), 64),
    "FAT32": (("mkfs.vfat", "-F", "32", "-n", "EFI"), 64),
    "FAT32, no label": (("mkfs.vfat", "-F", "32", "-s", "1"), 64),
    "exFAT": (("mkfs.exfat", "-L", "größer"), 64),
    "exFAT, no label": (("mkfs.exfat",), 64),
    "NTFS": (("mkfs.ntfs", "-F", "-Q", "-q", "-L", "größer System"), 64),
    "NTFS of 64 KiB clusters": (("mkfs.ntfs", "-F", "-Q", "-q", "-c", "65536"), 64),
    "XFS": (("mkfs.xfs", "-q", "-L", "data", "-m", f"uuid={UUID}"), 320),
    "btrfs": (("mkfs.btrfs", "-q", "-L", "pool one"), 128),
    "F2FS": (("mkfs.f2fs", "-q", "-l", "größer"), 128),
    "swap": (("mkswap", "-L", "swap one", "-U", UUID), 16),
    "swap of 64 KiB pages": (("mkswap", "-p", "65536"), 16),
    "LUKS1": (("cryptsetup", "luksFormat", "-q", "--type", "luks1", "--pbkdf-force-iterations", "1000"), 16),
    "LUKS2": (("cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--label", "secret"), 32),
}
TREES = {"ext2", "ext3", "ext4", "vfat", "exfat", "ntfs"}


def made(path: Path, words: tuple[str, ...], size: int) -> None:
    need(words[0], "blkid")
    with open(path, "wb") as file:
        file.truncate(size << 20)
    if words[0] == "cryptsetup":
        words = (*words, "--pbkdf-force-iterations", "1000") if "luks2" in words else words
        run(*words, path, "-", text="a passphrase of a test")
    else:
        run(*words, path)


def blkid(path: Path) -> tuple[str, str, str]:
    """Return TYPE, LABEL and UUID."""
    return tuple(  # type: ignore[return-value]
        run("blkid", "--probe", "--match-tag", tag, "--output", "value", path, check=False).removesuffix("\n")
        for tag in ("TYPE", "LABEL", "UUID")
    )


def ours(path: Path) -> Filesystem:
    disk = FileDisk(path)
    found = probe(disk.pread, disk.virtual_size)
    assert found is not None
    return found


@pytest.mark.parametrize("name", MADE)
def test_kind_label_and_uuid_are_those_of_blkid(tmp_path: Path, name: str) -> None:
    path = tmp_path / "volume"
    made(path, *MADE[name])

    found = ours(path)

    assert blkid(path) == (found.kind, found.label, found.uuid)
    assert (found.trouble == "") == (found.kind in TREES)
    assert found.clean in ((True,) if found.kind in TREES else (None, True))
    assert 0.8 * (MADE[name][1] << 20) < found.size <= MADE[name][1] << 20 or found.kind in ("swap", "crypto_LUKS")


@pytest.mark.parametrize("tool", ["mksquashfs", "genisoimage"])
def test_images_of_a_tree(tmp_path: Path, tool: str) -> None:
    need(tool)
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(random.Random(1).randbytes(300_000))
    path = tmp_path / "image"
    if tool == "mksquashfs":
        run(tool, tmp_path / "tree", path, "-quiet", "-no-progress")
    else:
        run(tool, "-quiet", "-R", "-V", "Debian 12 amd64 n", "-o", path, tmp_path / "tree")

    found = ours(path)

    assert blkid(path) == (found.kind, found.label, found.uuid)
    assert f"{found.kind} is not supported yet" == found.trouble
    assert 300_000 < found.size <= path.stat().st_size


def test_an_image_without_anything(tmp_path: Path) -> None:
    for data in (b"", b"x", bytes(1 << 20), random.Random(2).randbytes(1 << 20)):
        path = tmp_path / "nothing"
        path.write_bytes(data)

        assert probe(FileDisk(path).pread, len(data)) is None


def raid_superblock(version: int, size: int) -> tuple[int, bytes]:
    """Return place and bytes of a superblock of Linux RAID: 0 for 0.90, or 10, 11 and 12 for 1.x."""
    identity = bytes(range(16, 32))
    if not version:
        data = struct.pack("<7I", 0xA92B4EFC, 0, 90, 0, 0, int.from_bytes(identity[:4], "little"), 1)
        data = data.ljust(52, b"\0") + identity[4:]
        return (size & ~0xFFFF) - 0x10000, data
    place = {10: (size // 512 - 16) // 8 * 8 * 512, 11: 0, 12: 4096}[version]
    data = bytearray(struct.pack("<4I16s32s", 0xA92B4EFC, 1, 0, 0, identity, b"host:0").ljust(512, b"\0"))
    data[144:152] = (place // 512).to_bytes(8, "little")
    total = sum(struct.unpack("<64I", data[:256]))
    data[216:220] = ((total & 0xFFFFFFFF) + (total >> 32) & 0xFFFFFFFF).to_bytes(4, "little")
    return place, bytes(data)


@pytest.mark.parametrize("size", [(64 << 20), (64 << 20) - 512, (64 << 20) + 4096 + 1024])
@pytest.mark.parametrize("version", [0, 10, 11, 12])
def test_members_of_a_linux_raid(tmp_path: Path, version: int, size: int) -> None:
    """The superblock is made here, by md's rules, over an ext4 that shows through at 0.90 and 1.0; blkid agrees."""
    path = tmp_path / "member"
    made(path, EXT4, 60)
    place, data = raid_superblock(version, size)
    with open(path, "r+b") as file:
        file.truncate(size)
        file.seek(place)
        file.write(data)

    found = ours(path)

    assert blkid(path) == (found.kind, found.label, found.uuid)
    assert "linux_raid_member" == found.kind


@pytest.mark.parametrize(
    ("place", "data", "kind"),
    [
        (3, b"-FVE-FS-", "BitLocker"),
        (4096 + 24, bytes.fromhex("c68573f666ce90a9d96a60cf803df7ef"), "bcachefs"),
        (4096 + 24, bytes.fromhex("c68573f64e1a45ca8265f57f48ba6d81"), "bcache"),
        (16384, bytes.fromhex("010100000000000000000001") + bytes(20) + b"pool_guid", "zfs_member"),
        (4096 - 10, b"S1SUSPEND\0", "swsuspend"),
    ],
)
def test_what_no_tool_here_makes_is_known_by_its_magic(tmp_path: Path, place: int, data: bytes, kind: str) -> None:
    path = tmp_path / "volume"
    path.write_bytes((bytes(place) + data).ljust(1 << 20, b"\0"))

    assert kind == ours(path).kind
    assert ours(path).trouble


@pytest.fixture
def ext4(tmp_path: Path) -> Path:
    path = tmp_path / "ext4"
    made(path, (*EXT4, "-O", "^metadata_csum"), 64)
    return path


def patch(path: Path, place: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        file.write(data)


@pytest.mark.parametrize(
    ("bit", "trouble"),
    [
        (0x1, "it has features that are not known: compression"),
        (0x1000, "it has features that are not known: dirdata"),
        (0x40000000, "it has features that are not known: FEATURE_I30"),
        (0x10, ""),
        (0x20000, ""),
    ],
)
def test_incompatible_features_of_ext4(ext4: Path, bit: int, trouble: str) -> None:
    """debugfs names the unknown one FEATURE_I30 too."""
    known = int.from_bytes(ext4.read_bytes()[1024 + 0x60 : 1024 + 0x64], "little")
    patch(ext4, 1024 + 0x60, (known | bit).to_bytes(4, "little"))

    assert ("ext4", trouble) == (ours(ext4).kind, ours(ext4).trouble)


@pytest.mark.parametrize(
    ("place", "data", "trouble"),
    [
        (0x18, b"\7", "its block size, 2 ** 17, is more than 64 KiB"),
        (0x18, b"\xff\xff\xff\xff", "its block size, 2 ** 4294967305, is more than 64 KiB"),
        (0x04, b"\1\x40\0\0", "it is of 67112960 bytes, on a volume of 67108864"),
    ],
)
def test_geometry_of_ext4(ext4: Path, place: int, data: bytes, trouble: str) -> None:
    patch(ext4, 1024 + 4, (64 << 20 >> 12).to_bytes(4, "little"))
    patch(ext4, 1024 + 0x18, (2).to_bytes(4, "little"))
    assert ours(ext4).trouble == ""
    patch(ext4, 1024 + place, data)

    assert trouble == ours(ext4).trouble


def test_the_checksum_of_the_superblock(tmp_path: Path) -> None:
    """The kernel refuses it too."""
    need("mount")
    path = tmp_path / "ext4"
    made(path, (*EXT4, "-O", "metadata_csum"), 64)
    assert ours(path).trouble == ""
    patch(path, 1024 + 0x34, b"\x7f")

    assert "the checksum of its superblock is wrong" == ours(path).trouble
    with pytest.raises(AssertionError, match="mount"):
        run("mount", "-o", "ro,loop", path, tmp_path)

    patch(path, 1024 + 0x175, b"\2")
    assert "its checksums are of an unknown kind, 2" == ours(path).trouble


def test_whether_it_is_clean(ext4: Path, tmp_path: Path) -> None:
    need("mount", "umount")
    point = tmp_path / "point"
    point.mkdir()
    run("mount", "-o", "loop", ext4, point)
    try:
        (point / "file").write_text("x")
        run("sync", "-f", point)
        shutil.copyfile(ext4, tmp_path / "crashed")
    finally:
        run("umount", point)

    assert ours(ext4).clean is True
    assert ours(tmp_path / "crashed").clean is False


@pytest.mark.parametrize(
    ("words", "place"),
    [(("mkfs.vfat", "-F", "16"), 0x25), (("mkfs.vfat", "-F", "32"), 0x41), (("mkfs.exfat",), 106)],
    ids=str,
)
def test_windows_file_systems_that_were_not_unmounted(tmp_path: Path, words: tuple[str, ...], place: int) -> None:
    path = tmp_path / "volume"
    made(path, words, 64)
    assert ours(path).clean is True
    patch(path, place, b"\3")

    assert ours(path).clean is False


def test_the_label_of_fat_is_that_in_its_root_directory(tmp_path: Path) -> None:
    """Windows changes only that one; blkid calls the other LABEL_FATBOOT."""
    path = tmp_path / "volume"
    made(path, ("mkfs.vfat", "-F", "32", "-n", "BEFORE"), 64)
    run("fatlabel", path, "AFTER")
    patch(path, 0x47, b"BEFORE     ")

    assert "AFTER" == ours(path).label == blkid(path)[1]

"""FAT, exFAT and NTFS in a real mount: an EFI partition, a stick's and Windows's own, beside each other on one disk."""

from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import pytest

from tests.oracle.test_ntfs import OPTIONS
from tests.oracle.test_ntfs import mounted as ntfs_mounted
from tests.support import need
from tests.support.disks import run
from tests.support.forgefat import Exfat, Fat
from tests.support.mounts import mounted, qemu
from tests.support.sparse import digest, pieces_of

MIB = 1 << 20
LOADER = random.Random(1).randbytes(100_000)
FAT = {"EFI": {"BOOT": {"BOOTX64.EFI": LOADER, "a long name, größer.txt": b"text"}}, "empty": b""}
EXFAT = {"photos": {"日本.jpg": LOADER[:70_000]}, "note": b"x" * 600}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("mkntfs", "ntfs-3g", "sfdisk", "qemu-img")
    folder = tmp_path_factory.mktemp("windows")
    ntfs, disk, image = folder / "ntfs", folder / "disk", folder / "disk.qcow2"
    run("truncate", "-s", "20M", ntfs)
    run("mkntfs", "-F", "-Q", "-q", ntfs)
    with ntfs_mounted(ntfs, OPTIONS, "ntfs-3g") as root:
        fill(root)
    run("truncate", "-s", "64M", disk)
    run("sfdisk", "-q", disk, text="label: gpt\nsize=8M\nsize=8M\nsize=20M\n")
    parts = [bytes(Fat(32, FAT, clusters=2000).data), bytes(Exfat(EXFAT).data), ntfs.read_bytes()]
    with disk.open("r+b") as file:
        for start, data in zip((1, 9, 17), parts, strict=True):
            file.seek(start * MIB)
            file.write(data)
    qemu("qemu-img", "convert", "-O", "qcow2", disk, image)
    return image


def fill(root: Path) -> None:
    (root / "Users/me").mkdir(parents=True)
    (root / "Users/me/small").write_bytes(b"in its record")
    (root / "Users/me/large").write_bytes(LOADER)
    os.setxattr(root / "Users/me/small", "user.Zone.Identifier", b"[ZoneTransfer]")
    os.link(root / "Users/me/small", root / "hard")
    with (root / "sparse").open("wb") as file:
        file.seek(3 * MIB)
        file.write(b"end")


@pytest.mark.parametrize("more", [[], ["--no-data-plane"]], ids=["data plane", "plain"])
def test_their_files_are_shown(image: Path, target: Path, more: list[str]) -> None:
    with mounted(image, target, *more):
        assert sorted(os.listdir(target / "current")) == ["p1", "p1.raw", "p2", "p2.raw", "p3", "p3.raw"]
        fat, exfat, ntfs = (target / "current" / name for name in ("p1", "p2", "p3"))
        assert contents(fat) == flat(FAT)
        assert contents(exfat) == flat(EXFAT)
        assert {"Users/me/small": b"in its record", "Users/me/large": LOADER}.items() <= contents(ntfs).items()
        assert os.getxattr(ntfs / "Users/me/small", "user.Zone.Identifier") == b"[ZoneTransfer]"
        assert os.stat(ntfs / "hard").st_ino == os.stat(ntfs / "Users/me/small").st_ino
        assert digest(pieces_of(os.fsencode(ntfs / "sparse"))) == digest([(3 * MIB, b"end")])
        for root in (fat, exfat, ntfs):
            assert os.statvfs(root).f_flag & os.ST_RDONLY
            assert stat.S_IMODE(os.stat(root).st_mode) == 0o755


def test_their_modes_can_be_mapped(image: Path, target: Path) -> None:
    with mounted(image, target, "-o", "uid=1000,umask=077"):
        found = os.stat(target / "current" / "p1" / "EFI" / "BOOT" / "BOOTX64.EFI")
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (1000, 0o700)


def contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files if path.name != "sparse"}


def flat(tree: dict, path: str = "") -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, content in tree.items():
        found |= flat(content, f"{path}{name}/") if isinstance(content, dict) else {path + name: content}
    return found

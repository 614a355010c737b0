"""Which volumes need recovery, and where the journal is looked for. Evidence: chosen scenarios."""

from __future__ import annotations

import struct
import subprocess
from pathlib import Path

import pytest

from qcowfs.inside.extsuper import read_super, without_recover
from qcowfs.inside.jbd2 import recover
from qcowfs.inside.reader import Unreadable
from tests.support import need
from tests.support.crash import FileDevice
from tests.support.forgejournal import BLOCK, Journal, make_file_system, target

need("mkfs.ext4", "dumpe2fs")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a file system with one transaction in its journal."""
    path = make_file_system(tmp_path / "it.img")
    journal = Journal()
    journal.descriptor([(target(0), b"\1" * BLOCK)])
    journal.commit()
    journal.write(path)
    return path


def change(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def test_the_summary_counts(image: Path) -> None:
    recovery = recover(FileDevice(image))

    assert recovery is not None
    assert "jbd2: 1 transactions, 1 blocks" == recovery.summary


def test_without_the_flag_the_journal_is_not_looked_at(image: Path) -> None:
    """The kernel throws such a journal away."""
    superblock = read_super(FileDevice(image))
    assert superblock is not None
    change(image, 1024, without_recover(superblock.raw))

    assert recover(FileDevice(image)) is None


def test_the_recovered_superblock_says_that_it_is(image: Path) -> None:
    recovery = recover(FileDevice(image))
    assert recovery is not None
    before, after = read_super(FileDevice(image)), read_super(recovery.overlay)

    assert before is not None
    assert after is not None
    assert (True, False) == (before.needs_recovery, after.needs_recovery)
    assert after == before._replace(needs_recovery=False, raw=after.raw)


def test_the_checksum_of_the_superblock_is_right_again(tmp_path: Path) -> None:
    path = tmp_path / "it.img"
    path.touch()
    with path.open("r+b") as file:
        file.truncate(8 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-O", "metadata_csum", str(path)], check=True, capture_output=True)
    superblock = read_super(FileDevice(path))
    assert superblock is not None
    with_recover = bytearray(superblock.raw)
    struct.pack_into("<I", with_recover, 0x60, struct.unpack_from("<I", superblock.raw, 0x60)[0] | 4)

    assert superblock.raw == without_recover(bytes(with_recover))


def test_a_journal_elsewhere_is_not_replayed(image: Path) -> None:
    change(image, 1024 + 0xE0, struct.pack("<II", 0, 0x801))

    with pytest.raises(Unreadable, match=r"on another device, and not replayed.*-o norecovery"):
        recover(FileDevice(image))


@pytest.mark.parametrize("number", (0, 1 << 31, 0xFFFFFFFF))
def test_an_impossible_journal_inode_is_refused(image: Path, number: int) -> None:
    change(image, 1024 + 0xE0, struct.pack("<I", number))

    with pytest.raises(Unreadable):
        recover(FileDevice(image))


def test_other_volumes_need_none(tmp_path: Path) -> None:
    path = tmp_path / "it.img"
    for content in (b"", bytes(2047), bytes(4096)):
        path.write_bytes(content)

        assert recover(FileDevice(path)) is None

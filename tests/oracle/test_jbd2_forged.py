"""Logs that kernels write no more, broken logs, and logs that lie: the kernel's mount is the judge of each.

Evidence: chosen scenarios with the kernel's answer. What it mounts has to be recovered to the same bytes; what it
refuses has to be refused.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowfs.inside.extsuper import read_super
from qcowfs.inside.jbd2 import recover
from qcowfs.inside.reader import Unreadable
from tests.support import lacking, need
from tests.support.crash import MAGIC, FileDevice, mounted
from tests.support.forgejournal import (
    ASYNC_COMMIT,
    BLOCK,
    CSUM_V2,
    CSUM_V3,
    FEATURE_64BIT,
    Journal,
    make_file_system,
    target,
)

need("mkfs.ext4", "mount", "losetup")
if os.geteuid() != 0:
    lacking("loop devices and mounts need root")

TARGETS = 40
ONE, TWO, THREE = (bytes([number]) * BLOCK for number in (1, 2, 3))

Build = Callable[[Journal], object]


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_file_system(tmp_path_factory.mktemp("forged") / "empty.img")


def two_transactions(journal: Journal) -> None:
    journal.descriptor([(target(0), ONE), (target(1), MAGIC + ONE[4:])])
    journal.commit()
    journal.descriptor([(target(0), TWO), (target(2), TWO)])
    journal.descriptor([(target(3), THREE)])
    journal.commit()


def revoked_later(journal: Journal) -> None:
    journal.descriptor([(target(0), ONE), (target(1), ONE)])
    journal.commit()
    journal.revoke([target(0)])
    journal.commit()


def revoked_in_the_same(journal: Journal) -> None:
    journal.revoke([target(0)])
    journal.descriptor([(target(0), ONE), (target(1), ONE)])
    journal.commit()


def revoked_and_written_again(journal: Journal) -> None:
    revoked_later(journal)
    journal.descriptor([(target(0), TWO)])
    journal.commit()
    journal.revoke([target(9)])
    journal.commit()


def revoked_in_a_torn_transaction(journal: Journal) -> None:
    two_transactions(journal)
    journal.revoke([target(0)])


def torn(journal: Journal) -> None:
    two_transactions(journal)
    journal.descriptor([(target(4), ONE)])


def deleted_tag(journal: Journal) -> None:
    journal.descriptor([(target(0), ONE)], flags=4)
    journal.commit()


def wrong_descriptor(journal: Journal) -> None:
    two_transactions(journal)
    journal.blocks[journal.descriptor([(target(4), ONE)])][900] ^= 1
    journal.commit()


def wrong_descriptor_of_an_old_journal(journal: Journal) -> None:
    two_transactions(journal)
    journal.blocks[journal.descriptor([(target(4), ONE)])][900] ^= 1
    journal.commit(time=5)


def wrong_revoke(journal: Journal) -> None:
    two_transactions(journal)
    journal.blocks[journal.revoke([target(0)])][900] ^= 1
    journal.commit()


def wrong_commit(journal: Journal) -> None:
    two_transactions(journal)
    journal.descriptor([(target(4), ONE)])
    journal.commit(wrong=True)


def wrong_commit_of_an_old_journal(journal: Journal) -> None:
    two_transactions(journal)
    journal.descriptor([(target(4), ONE)])
    journal.commit(wrong=True, time=5)


def wrong_commit_and_one_after_it(journal: Journal) -> None:
    wrong_commit(journal)
    journal.descriptor([(target(5), ONE)])
    journal.commit()


def wrong_image(journal: Journal) -> None:
    number = journal.descriptor([(target(0), ONE), (target(1), ONE)])
    journal.commit()
    journal.blocks[number + 1][77] ^= 1


def wrong_image_that_is_revoked(journal: Journal) -> None:
    wrong_image(journal)
    journal.revoke([target(0)])
    journal.commit()


def commit_of_the_header_alone(journal: Journal) -> None:
    journal.descriptor([(target(0), ONE)])
    journal.blocks[journal.commit()][200:300] = bytes(range(100))


def revoke_that_is_too_long(journal: Journal) -> None:
    two_transactions(journal)
    journal.revoke([target(0)], used=1025)
    journal.commit()


def revoke_that_is_too_short(journal: Journal) -> None:
    two_transactions(journal)
    journal.revoke([target(0)], used=3)
    journal.commit()


def outside(journal: Journal) -> None:
    journal.descriptor([(4096, ONE)])
    journal.commit()


def far_outside(journal: Journal) -> None:
    journal.descriptor([(1 << 40, ONE)])
    journal.commit()


def whole_descriptor(journal: Journal) -> None:
    journal.descriptor([(target(number % TARGETS), bytes([number]) * BLOCK) for number in range(50)])
    journal.commit()


BUILDS = (
    two_transactions,
    revoked_later,
    revoked_in_the_same,
    revoked_and_written_again,
    revoked_in_a_torn_transaction,
    torn,
    deleted_tag,
    wrong_descriptor,
    wrong_descriptor_of_an_old_journal,
    wrong_revoke,
    wrong_commit,
    wrong_commit_of_an_old_journal,
    wrong_commit_and_one_after_it,
    wrong_image,
    wrong_image_that_is_revoked,
    commit_of_the_header_alone,
    revoke_that_is_too_long,
    revoke_that_is_too_short,
    outside,
    far_outside,
    whole_descriptor,
)
FEATURES = {
    "plain": {},
    "64bit": {"incompat": 1 | FEATURE_64BIT},
    "v2": {"incompat": 1 | CSUM_V2},
    "v3-64bit-async": {"incompat": 1 | CSUM_V3 | FEATURE_64BIT | ASYNC_COMMIT},
    "v3": {"incompat": 1 | CSUM_V3},
    "v1": {"compat": 1},
    "v1-async": {"compat": 1, "incompat": 1 | ASYNC_COMMIT},
}
SUPERS = {
    "v2-64bit": {"incompat": 1 | CSUM_V2 | FEATURE_64BIT},
    "sequence-runs-over": {"sequence": 0xFFFFFFFF},
    "wrapped": {"start": 1021},
    "version-1": {"kind": 3, "incompat": 0},
    "start-is-outside": {"start": 1024},
    "start-is-far-outside": {"start": 1 << 31},
    "too-long": {"length": 1025},
    "too-short": {"length": 600},
    "first-is-0": {"first": 0},
    "unknown-feature": {"incompat": 0x41},
    "two-kinds-of-checksums": {"incompat": 1 | CSUM_V2 | CSUM_V3},
    "old-and-new-checksums": {"incompat": 1 | CSUM_V3, "compat": 1},
    "no-superblock": {"kind": 2},
}


def contents(image: Path) -> bytes:
    with image.open("rb") as file:
        file.seek(target(0) * BLOCK)
        return file.read(TARGETS * BLOCK)


def kernels_answer(image: Path) -> bytes | None:
    """Return what the kernel's recovery makes of the targets; None if it does not mount."""
    try:
        with mounted(image):
            pass
    except subprocess.CalledProcessError:
        return None
    return contents(image)


def our_answer(image: Path) -> bytes | None:
    try:
        recovery = recover(FileDevice(image))
    except Unreadable as error:
        assert "-o norecovery" in str(error)
        return None
    if recovery is None:
        return contents(image)
    return recovery.overlay.read(target(0) * BLOCK, TARGETS * BLOCK)


def check(empty: Path, directory: Path, journal: Journal) -> None:
    image = directory / "forged.img"
    shutil.copy(empty, image)
    journal.write(image)
    ours = our_answer(image)

    assert kernels_answer(image) == ours


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: build.__name__)
def test_a_log_is_judged_as_the_kernel_judges_it(empty: Path, tmp_path: Path, build: Build, features: str) -> None:
    journal = Journal(**FEATURES[features])
    build(journal)

    check(empty, tmp_path, journal)


@pytest.mark.parametrize("fields", SUPERS)
def test_a_superblock_is_judged_as_the_kernel_judges_it(empty: Path, tmp_path: Path, fields: str) -> None:
    journal = Journal(**SUPERS[fields])
    two_transactions(journal)

    check(empty, tmp_path, journal)


@pytest.mark.parametrize(("place", "content"), (("mode", b"\0\0"), ("mode", b"\xff\x41"), ("links", b"\0\0")))
def test_a_lost_inode_is_judged_as_the_kernel_judges_it(
    empty: Path, tmp_path: Path, place: str, content: bytes
) -> None:
    """The superblock has a copy of the journal's map, but the kernel does not use it."""
    image = tmp_path / "forged.img"
    shutil.copy(empty, image)
    journal = Journal()
    two_transactions(journal)
    journal.write(image)
    device = FileDevice(image)
    superblock = read_super(device)
    assert superblock is not None
    table = int.from_bytes(device.read(2 * BLOCK + 8, 4), "little")
    with image.open("r+b") as file:
        file.seek(table * BLOCK + 7 * superblock.inode_size + {"mode": 0, "links": 26}[place])
        file.write(content)

    assert our_answer(image) is None
    assert kernels_answer(image) is None


def test_the_kernel_both_mounts_and_refuses(empty: Path, tmp_path: Path) -> None:
    """Were all of them refused, or changed none anything, the comparisons would prove nothing."""
    image = tmp_path / "forged.img"
    journal, broken = Journal(), Journal(incompat=1 | CSUM_V3)
    two_transactions(journal)
    wrong_image(broken)
    answers = []
    for each in (journal, broken):
        shutil.copy(empty, image)
        each.write(image)
        answers.append(kernels_answer(image))
    expected = TWO + MAGIC + ONE[4:] + TWO + THREE

    assert expected == (answers[0] or b"")[: len(expected)]
    assert answers[1] is None

"""Damaged journals of ext3/ext4: each is recovered or refused, in little time and memory, and nothing else happens."""

from __future__ import annotations

import random
import struct
import time
from pathlib import Path

import pytest

from qcowfs.inside import extsuper, jbd2
from qcowfs.inside.journalmap import JournalMap
from qcowfs.inside.reader import Unreadable
from tests.support import need
from tests.support.crash import FileDevice
from tests.support.forgejournal import (
    BLOCK,
    CSUM_V3,
    FEATURE_64BIT,
    JOURNAL_BLOCKS,
    Journal,
    make_file_system,
    target,
)

need("mkfs.ext4")
pytestmark = pytest.mark.timeout(60)

MUTATIONS = 700  # of each kind of journal
KINDS = ({}, {"compat": 1}, {"incompat": 1 | CSUM_V3 | FEATURE_64BIT})
ENOUGH_READS = 4 * JOURNAL_BLOCKS * BLOCK  # bytes: each block of the journal a few times


class Memory:
    """A Device in memory, which counts the bytes that are read."""

    def __init__(self, content: bytearray) -> None:
        self.content = content
        self.size = len(content)
        self.bytes_read = 0

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or length < 0 or offset + length > self.size:
            raise OSError(5, "a read past the end of the volume")
        self.bytes_read += length
        return bytes(self.content[offset : offset + length])


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_file_system(tmp_path_factory.mktemp("forged") / "empty.img")


@pytest.fixture(scope="module")
def ext3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_file_system(tmp_path_factory.mktemp("forged") / "ext3.img", "-t", "ext3")


def busy(journal: Journal) -> Journal:
    """Write a few transactions of all kinds of blocks."""
    rng = random.Random(1)
    for _ in range(4):
        journal.descriptor([(target(rng.randrange(40)), rng.randbytes(BLOCK)) for _ in range(6)])
        journal.revoke([target(rng.randrange(40)) for _ in range(5)])
        journal.descriptor([(target(rng.randrange(40)), rng.randbytes(BLOCK))])
        journal.commit()
    return journal


def image(path: Path, journal: Journal) -> bytearray:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    journal.write(copy)
    return bytearray(copy.read_bytes())


def metadata(content: bytearray) -> list[tuple[int, int]]:
    """Return the ranges that recovery reads: the log, the superblock, descriptors, the journal's inode (the last)."""
    device = Memory(content)
    superblock = extsuper.read_super(device)
    assert superblock is not None
    inode = extsuper.read_inode(device, superblock, 8)
    journal = JournalMap(device, BLOCK, inode.flags, inode.block, inode.size)
    ranges = [(journal.run(number)[0] * BLOCK, BLOCK) for number in range(60)]
    table = struct.unpack_from("<I", content, 2 * BLOCK + 8)[0]
    ranges += [(1024, 1024), (2 * BLOCK, 32), (table * BLOCK + 7 * superblock.inode_size, 128)] * 8
    return ranges


def survives(content: bytearray) -> str:
    """Recover `content`, and read all of it; return what came of it."""
    device = Memory(content)
    start = time.process_time()
    try:
        recovery = jbd2.recover(device)
        assert device.bytes_read < ENOUGH_READS
        if recovery is None:
            return "clean"
        assert device.size == len(recovery.overlay.read(0, device.size))
    except Unreadable:
        return "refused"
    except OSError:
        return "unreadable"
    finally:
        assert time.process_time() - start < 5
    return "recovered"


@pytest.mark.parametrize("fields", KINDS)
def test_mutations_are_recovered_or_refused(empty: Path, fields: dict[str, int]) -> None:
    content = image(empty, busy(Journal(**fields)))

    assert {"recovered", "refused"} <= set(mutations(content))


def test_mutations_of_an_indirect_map_are_recovered_or_refused(ext3: Path) -> None:
    content = image(ext3, busy(Journal()))

    assert {"recovered", "refused"} <= set(mutations(content))


def mutations(content: bytearray) -> list[str]:
    ranges = metadata(content)
    rng = random.Random(20)
    found = []
    for number in range(MUTATIONS):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8))):
            start, length = rng.choice(ranges)
            place = start + min(rng.randrange(length), rng.randrange(length))
            changed[place] = rng.choice((0, 1, 0xFF, rng.randrange(256), changed[place] ^ 1 << rng.randrange(8)))
        try:
            found.append(survives(changed))
        except Exception as error:
            raise AssertionError(f"mutation {number}") from error
    return found


def test_a_log_that_covers_itself_ends(empty: Path) -> None:
    """Descriptors of one transaction all round the ring, and no commit: the kernel would never come to an end."""
    journal = Journal()
    for _ in range((JOURNAL_BLOCKS - 1) // 3):
        journal.descriptor([(target(0), bytes(BLOCK)), (target(1), bytes(BLOCK))])

    assert journal.next == journal.start
    assert survives(image(empty, journal)) == "refused"


def test_a_log_of_nothing_but_revokes_ends(empty: Path) -> None:
    journal = Journal()
    for _ in range(JOURNAL_BLOCKS):
        journal.revoke([target(0)] * 200)

    assert survives(image(empty, journal)) == "refused"


def test_an_inode_that_is_not_in_order_is_refused(empty: Path) -> None:
    content = image(empty, busy(Journal()))
    place = metadata(content)[-1][0] + 0x28
    struct.pack_into("<HHHHI", content, place, 0xF30A, 2, 4, 0, 0)
    struct.pack_into("<IHHI", content, place + 12, 0, 500, 0, 100)
    struct.pack_into("<IHHI", content, place + 24, 0, 524, 0, 700)

    assert survives(content) == "refused"


def test_a_tree_of_extents_that_holds_itself_is_refused(empty: Path) -> None:
    content = image(empty, busy(Journal()))
    place = metadata(content)[-1][0] + 0x28
    for node, depth in ((place, 2), (target(50) * BLOCK, 1)):
        struct.pack_into("<HHHHI", content, node, 0xF30A, 4, 4, depth, 0)
        for index in range(4):
            struct.pack_into("<IIHH", content, node + 12 + index * 12, index, target(50), 0, 0)

    assert survives(content) == "refused"


def test_an_endless_map_of_nothing_is_refused(ext3: Path) -> None:
    """All indirect blocks are one block, which names itself, and the file is as long as it can be."""
    content = image(ext3, busy(Journal()))
    place = metadata(content)[-1][0]
    itself = target(50)
    struct.pack_into("<256I", content, itself * BLOCK, *[itself] * 256)
    struct.pack_into("<15I", content, place + 0x28, *[itself] * 15)
    struct.pack_into("<I", content, place + 4, 0xFFFFFFFF)
    struct.pack_into("<I", content, place + 0x6C, 0xFFFF)

    assert survives(content) == "refused"


def test_a_clean_volume_costs_one_read(empty: Path) -> None:
    device = FileDevice(empty)

    assert jbd2.recover(device) is None
    assert (1, 1024) == (device.reads, device.bytes_read)

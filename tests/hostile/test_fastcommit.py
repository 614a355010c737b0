"""Fast commits that lie: each is replayed, or is not, in little time, and nothing else happens."""

from __future__ import annotations

import os
import random
import time
from array import array

import pytest

from qcowfs.inside import fastcommit, jbd2
from qcowfs.inside.draft import Draft, NotReplayed
from qcowfs.inside.extsuper import Super, read_super
from qcowfs.inside.fastcommit import Operation
from qcowfs.inside.fastreplay import replay
from qcowfs.inside.overlay import Overlay
from tests.support import lacking, need
from tests.support.crash import NOLOGFLUSH, FileDevice, Kind, Storm, crash

need("mkfs.ext4", "mount", "losetup")
if os.geteuid() != 0:
    lacking("loop devices and mounts need root")
pytestmark = pytest.mark.timeout(60)

MUTATIONS = 1000


def fast(storm: Storm, kind: Kind) -> None:
    storm.run(10)
    os.sync()
    storm.run_fast(kind.steps)


@pytest.fixture(scope="module")
def commits(tmp_path_factory: pytest.TempPathFactory) -> tuple[FileDevice, Super, list[Operation]]:
    """Return a volume with fast commits, and what they say."""
    kind = Kind("fast", ("-b", "2048", "-O", "fast_commit"), steps=14, change=fast, stops=(NOLOGFLUSH,), size=16 << 20)
    seen: list[Operation] = []
    for seed in range(20):
        device = FileDevice(crash(tmp_path_factory.mktemp("fast"), kind, seed))
        with pytest.MonkeyPatch.context() as patch:
            scan = fastcommit.scan
            patch.setattr(fastcommit, "scan", lambda *at, scan=scan: seen.extend(found := scan(*at)) or found)
            jbd2.recover(device)
        if len(seen) > 10:
            break
        seen.clear()
    superblock = read_super(device)
    assert superblock is not None
    assert {fastcommit.INODE, fastcommit.CREAT} <= {operation.tag for operation in seen}
    return device, superblock, seen


def attempt(device: FileDevice, superblock: Super, operations: list[Operation]) -> bool:
    overlay = Overlay(device, superblock.block_size, array("Q"), array("Q"))
    start = time.process_time()
    try:
        draft = Draft(overlay, list(range(4000, 4100)))
        replay(draft, superblock, operations)
    except NotReplayed:
        return False
    finally:
        assert time.process_time() - start < 8
    draft.apply()
    return True


def mutated(rng: random.Random, operation: Operation) -> Operation:
    value = bytearray(operation.value)
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.choice((rng.randrange(len(value)), rng.randrange(min(len(value), 12))))
        value[place] = rng.choice((0, 1, 2, 0xFF, rng.randrange(256)))
    if operation.tag in (fastcommit.CREAT, fastcommit.LINK, fastcommit.UNLINK):
        return Operation(rng.choice((fastcommit.CREAT, fastcommit.LINK, fastcommit.UNLINK)), bytes(value))
    return Operation(operation.tag, bytes(value))


def test_mutations_are_replayed_or_not(commits: tuple[FileDevice, Super, list[Operation]]) -> None:
    device, superblock, operations = commits
    rng = random.Random(3)
    found = set()
    for number in range(MUTATIONS):
        changed = [mutated(rng, each) if rng.random() < 0.1 else each for each in operations]
        if number % 3 == 0:
            rng.shuffle(changed)
        try:
            found.add(attempt(device, superblock, changed))
        except Exception as error:
            raise AssertionError(f"mutation {number}") from error

    assert {True, False} == found


def test_endless_work_is_not_done(commits: tuple[FileDevice, Super, list[Operation]]) -> None:
    """Six hundred thousand names that are looked for, in a directory in which there is none of them."""
    device, superblock, _ = commits
    operations = [Operation(fastcommit.UNLINK, bytes((2, 0, 0, 0, 2, 0, 0, 0)) + b"%d" % n) for n in range(60_000)]

    assert not attempt(device, superblock, operations * 10)


def test_an_inode_without_links_is_not_replayed(commits: tuple[FileDevice, Super, list[Operation]]) -> None:
    device, superblock, operations = commits
    place, found = next((place, one) for place, one in enumerate(operations) if one.tag == fastcommit.INODE)
    value = bytearray(found.value)
    value[4 + 0x1A : 4 + 0x1C] = bytes(2)

    assert attempt(device, superblock, operations[: place + 1])
    assert not attempt(device, superblock, [*operations[:place], Operation(found.tag, bytes(value))])

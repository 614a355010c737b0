"""A machine that is snapshotted ten times while it writes: each tree is what its guest would find after a restart.

Evidence: a real virtual machine with ext4; the kernel's mount of a copy, whose journal it recovers, is the judge.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qcowfs._cache import Cache
from qcowfs._mapped import Mapped
from qcowfs.chain import open_chain
from qcowfs.gate import Policy
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from qcowfs.inside.opened import open_disks
from qcowfs.snapshot import open_disk, points
from tests.support.crash import mounted
from tests.support.mounts import qemu
from tests.support.readertree import describe_reader
from tests.support.trees import describe
from tests.support.vm import Machine

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("root")]

SNAPSHOTS = 10
SHELLS = 3  # of the guest, that write; each cuts one file at a time
RESOLUTION = 20_000_000  # nanoseconds: the kernel's clock for the times of files may be late by so much
PAUSE = 1.0  # seconds between two of them: the guest commits each second, and by itself when it calls fsync

# What three shells in the guest do, each in a directory of its own, until the mains fail. Files are made, grown, cut,
# renamed into another directory and over one another, linked and removed; directories come and go.
STORM = """\
mkdir -p /mnt/$1/a /mnt/$1/b; cd /mnt/$1; n=0; text=$(head -c 2500 /dev/urandom | base64 | tr -d "\\n")
while true; do
    n=$((n + 1)); old=$((n - 20))
    for i in 1 2 3 4 5 6 7 8; do echo $n-$text$i$text >a/file-$n-$i; done
    echo $n-$1-$text >>b/log
    [ $((n % 2)) = 0 ] && mkdir -p b/dir-$n/deeper && mv a/file-$n-[12] b/dir-$n/deeper/
    [ $((n % 3)) = 0 ] && mv a/file-$n-3 a/file-$n-4 && chown 70000:3 a/file-$n-4
    [ $((n % 5)) = 0 ] && ln b/log b/link-$n && ln -s /somewhere/far/away/$n-$text a/symlink-$n
    [ $((n % 7)) = 0 ] && truncate -s 1000000 a/file-$n-5 && truncate -s 7 a/file-$n-6 && chmod 640 a/file-$n-6
    [ $((n % 9)) = 0 ] && dd if=/dev/urandom of=a/synced-$n bs=3000 count=30 conv=fsync
    [ $((n % 11)) = 0 ] && sync
    rm -rf a/file-$old-* b/dir-$old b/link-$old a/symlink-$old
done
"""


@dataclass(frozen=True)
class Frozen:
    """One point: what its tree says of its recovery, and what it holds as we and as the kernel see it.

    `judged` is the time, in nanoseconds, at which the kernel was asked.
    """

    recovery: str
    found: dict[bytes, Any]
    expected: dict[bytes, Any]
    judged: int


class Volume:
    """A reader.Device for the bytes of files."""

    def __init__(self, mapped: Mapped) -> None:
        self.size = mapped.virtual_size
        self.read = mapped.pread


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the active image of a machine that was snapshotted while it wrote, and at last lost its power."""
    directory = tmp_path_factory.mktemp("storm")
    image = directory / "data.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "192M")
    with Machine([image], directory=directory) as machine:
        machine.run("mkfs.ext4 -q -b 1024 -J size=4 /dev/vda && mount -o commit=1 /dev/vda /mnt")
        for name in ("expire", "writeback"):  # data that waits for half a minute would never get into an image
            machine.run(f"echo 50 >/proc/sys/vm/dirty_{name}_centisecs")
        for number, line in enumerate(STORM.splitlines()):
            machine.run(f"echo '{line}' {'>>' if number else '>'}/storm")
        for name in "xyz"[:SHELLS]:
            machine.run(f"sh /storm {name} >/dev/null 2>&1 &")
        for number in range(SNAPSHOTS):
            time.sleep(PAUSE)
            image = directory / f"overlay-{number}.qcow2"
            machine.qmp("blockdev-snapshot-sync", device="disk0", snapshot_file=str(image), format="qcow2")
        time.sleep(PAUSE)
        machine.quit()
    return image


@contextmanager
def launched() -> Iterator[Launcher]:
    launcher = Launcher()
    try:
        yield launcher
    finally:
        launcher.close()


def as_the_kernel_sees_it(layer: str, directory: Path) -> dict[bytes, Any]:
    copy = directory / "copy.raw"
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", layer, copy)
    with mounted(copy, "ro,noatime") as point:
        told = describe(point)
    copy.unlink()
    return told


@pytest.fixture(scope="module")
def frozen(image: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Frozen]:
    """Return what there is at each point, the first one first."""
    seen = []
    directory = tmp_path_factory.mktemp("copies")
    with open_chain(str(image), Policy()) as chain, launched() as launcher:
        for point in reversed(points(chain)):
            contents, (mapped,) = open_disks([open_disk(chain, point, Cache(8 << 20))])
            assert mapped is not None
            (item,) = contents.items
            assert item.filesystem is not None
            tree = Tree(launcher, "data", item.filesystem.kind, item.volume.size, mapped.pread, True)
            facts, found = tree.facts(), describe_reader(tree, Volume(mapped))
            now = time.time_ns()
            expected = as_the_kernel_sees_it(point.layer.path, directory)
            seen.append(Frozen(facts.get("recovery", ""), found, expected, now))
    return seen


def is_cut_by_recovery(expected: Any, found: Any, judged: int) -> bool:
    """Tell whether two descriptions differ only in what the kernel does to a file whose truncation it finds begun.

    It frees the blocks that are left, and the file has the time of the recovery from then on. Nobody can foretell that.
    """
    *kept, blocks, (modified, changed, accessed), xattrs, content = expected
    *ours, more, times, our_xattrs, our_content = found
    same = (kept, accessed, xattrs, content) == (ours, times[2], our_xattrs, our_content)
    return bool(same and blocks <= more and modified == changed and modified + RESOLUTION >= judged)


def test_each_tree_is_what_the_kernel_recovers(frozen: list[Frozen]) -> None:
    assert SNAPSHOTS + 1 == len(frozen)
    for number, point in enumerate(frozen):
        assert point.expected.keys() == point.found.keys(), f"point {number}"
        different = {name for name, told in point.expected.items() if told != point.found[name]}
        cut = {name for name in different if is_cut_by_recovery(point.expected[name], point.found[name], point.judged)}
        assert set() == different - cut, f"point {number}"
        assert len(cut) <= SHELLS, f"point {number}"


def test_the_guest_was_writing_all_the_time(frozen: list[Frozen]) -> None:
    """Otherwise the comparison would be of clean file systems, or of one tree eleven times."""
    recovered = [point for point in frozen if point.recovery]
    counts = [len(point.found) for point in frozen]

    assert len(recovered) >= SNAPSHOTS // 2
    assert len({repr(sorted(point.found.items())) for point in frozen}) > SNAPSHOTS // 2
    assert len({point.found[b"x/b/log"][-1] for point in frozen if b"x/b/log" in point.found}) > SNAPSHOTS // 2
    assert max(counts) > 300

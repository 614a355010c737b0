"""Each bit of each kind of table entry, flipped alone: qcowfs reads what QEMU reads, or says EIO where QEMU does.

Forged images with QEMU's answer, cluster by cluster: the one whose entry is changed and its two neighbours. What
qcowfs does otherwise on purpose is in `deviation`, with its reason.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qcowfs.chain import open_chain
from qcowfs.gate import Policy
from tests.support import need
from tests.support.content import EIO
from tests.support.qemu import qemu, qemu_reads
from tests.support.tables import active_disk, qcowfs_says

# A bit that moves a host offset past the end of the file makes it read as zeros, with a warning.
pytestmark = [pytest.mark.timeout(5, method="signal"), pytest.mark.expect_warnings]

CLUSTER = 16384  # the smallest that extended L2 entries can have
QCOW1_CLUSTER = 4096  # QEMU makes no other
SIZE = "1G"
OFFSET_BITS = 0x00FFFFFFFFFFFE00

EDGES = ("write -P 1 {first} {all}", "write -P 3 {third} {all}")
DATA = (*EDGES, "write -P 2 {second} {all}")
ZERO = (*EDGES, "write -z {second} {all}")
HALF = (*EDGES, "write -P 2 {second} {half}", "write -z {second} 2k")
COMPRESSED = tuple(command.replace("write", "write -c") for command in DATA)


def word(data: bytes, place: int) -> int:
    return int(struct.unpack_from(">Q", data, place)[0])


def l1_entry(data: bytes) -> int:
    return word(data, 40)  # in version 1 too


def l2_entry(data: bytes) -> int:
    """The entry of guest cluster 1."""
    return (word(data, l1_entry(data)) & OFFSET_BITS) + 8


def extended_entry(data: bytes) -> int:
    return (word(data, l1_entry(data)) & OFFSET_BITS) + 16


def subcluster_bits(data: bytes) -> int:
    """The second word of an extended entry."""
    return extended_entry(data) + 8


@dataclass(frozen=True)
class Kind:
    """A kind of entry: an image that holds it, and where in the file it is; no options: version 1."""

    options: str
    commands: tuple[str, ...]
    place: Callable[[bytes], int]

    @property
    def format(self) -> str:
        return "qcow2" if self.options else "qcow"

    @property
    def cluster(self) -> int:
        return CLUSTER if self.options else QCOW1_CLUSTER

    @property
    def is_l1(self) -> bool:
        return self.place is l1_entry

    def make(self, directory: Path) -> Path:
        """Make the image, before a bit of it is flipped."""
        image = directory / "image"
        options = ["-o", f"{self.options},cluster_size={CLUSTER}".format(directory=directory)] if self.options else []
        places = {"first": 0, "second": self.cluster, "third": 2 * self.cluster}
        lengths = {"all": self.cluster, "half": self.cluster // 2}
        commands = [command.format(**places, **lengths) for command in self.commands]
        qemu("qemu-img", "create", "-q", "-f", self.format, *options, image, SIZE)
        qemu("qemu-io", "-f", self.format, *[part for command in commands for part in ("-c", command)], image)
        return image


KINDS = {
    "version-2": Kind("compat=0.10", DATA, l2_entry),
    "version-3": Kind("compat=1.1", DATA, l2_entry),
    "zero": Kind("compat=1.1", ZERO, l2_entry),
    "unallocated": Kind("compat=1.1", EDGES, l2_entry),
    "deflate": Kind("compat=1.1", COMPRESSED, l2_entry),
    "zstd": Kind("compression_type=zstd", COMPRESSED, l2_entry),
    "data-file": Kind("data_file={directory}/data.raw", DATA, l2_entry),
    "extended": Kind("extended_l2=on", DATA, extended_entry),
    "extended-zero": Kind("extended_l2=on", ZERO, extended_entry),
    "extended-compressed": Kind("extended_l2=on", COMPRESSED, extended_entry),
    "extended-data-file": Kind("extended_l2=on,data_file={directory}/data.raw", HALF, extended_entry),
    "subclusters": Kind("extended_l2=on", DATA, subcluster_bits),
    "subclusters-of-each-kind": Kind("extended_l2=on", HALF, subcluster_bits),
    "subclusters-without-a-cluster": Kind("extended_l2=on", EDGES, subcluster_bits),
    "subclusters-of-a-compressed-cluster": Kind("extended_l2=on", COMPRESSED, subcluster_bits),
    "l1": Kind("compat=1.1", DATA, l1_entry),
    "l1-extended": Kind("extended_l2=on", DATA, l1_entry),
    "version-1-l1": Kind("", DATA, l1_entry),
    "version-1": Kind("", DATA, l2_entry),
    "version-1-unallocated": Kind("", EDGES, l2_entry),
    "version-1-deflate": Kind("", COMPRESSED, l2_entry),
}


@pytest.fixture(scope="module")
def originals() -> dict[str, Path]:
    """The image of each kind, made when its first test asks."""
    return {}


@pytest.fixture
def original(name: str, originals: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("qemu-img", "qemu-io")
    if name not in originals:
        originals[name] = KINDS[name].make(tmp_path_factory.mktemp(name))
    return originals[name]


def deviation(kind: Kind, entry: int, file_size: int) -> str | None:
    """What qcowfs says instead of QEMU, on purpose."""
    table = entry if kind.format == "qcow" else entry & OFFSET_BITS
    if kind.is_l1 and table >= file_size:
        return EIO  # QEMU takes a table that is not there for one without entries, and the disk for empty
    return None


@pytest.mark.parametrize("bit", range(64))
@pytest.mark.parametrize("name", KINDS)
def test_one_bit_of_an_entry(name: str, bit: int, original: Path) -> None:
    """The mapping of qcow2 and of version 1; each rule by itself is in test_table_entries.py."""
    kind = KINDS[name]
    before = original.read_bytes()
    place = kind.place(before)
    entry = word(before, place) ^ 1 << bit
    changed = original.with_name("changed")
    changed.write_bytes(before[:place] + struct.pack(">Q", entry) + before[place + 8 :])
    ranges = [(number * kind.cluster, kind.cluster) for number in range(3)]

    with open_chain(str(changed), Policy()) as chain:
        disk = active_disk(chain)
        said = [qcowfs_says(disk, *piece) for piece in ranges]

    otherwise = deviation(kind, entry, len(before))
    expected = [otherwise] * 3 if otherwise else qemu_reads(changed, ranges, kind.format)
    assert expected == said, f"{entry:#018x}"

"""A file that is cut anywhere: what is left is right, lost tables are EIO, and only lost data reads as zeros.

Chosen scenario: an image with data, zeros, compressed clusters and maybe a snapshot, cut at every 509th byte.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from qcowfs._core import Disk
from qcowfs.chain import open_chain
from qcowfs.errors import CorruptImage, NotAnImage
from qcowfs.gate import Policy
from qcowfs.snapshot import points
from tests.support import need
from tests.support.content import EIO
from tests.support.qemu import qemu
from tests.support.reader import open_point, read_all
from tests.support.tables import qcowfs_says

# A warning is due for each cut that loses data; with the cuts in one test, it is not looked for here.
pytestmark = [pytest.mark.timeout(5, method="signal"), pytest.mark.expect_warnings]

CLUSTER = 1024
SIZE = 256 * CLUSTER  # two L2 tables
STEP = 509


@pytest.fixture(scope="module", params=[("zlib", True), ("zstd", True), ("zlib", False)], ids=str)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("qemu-img", "qemu-io")
    compression, with_snapshot = request.param
    image = tmp_path_factory.mktemp("cut") / "whole.qcow2"
    options = f"compression_type={compression},cluster_size={CLUSTER}"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, image, str(SIZE))
    first = ["write -P 1 0 8k", "write -c -P 2 8k 1k", "write -c -P 3 9k 1k", "write -z 10k 2k", "write -P 4 200k 4k"]
    second = ["write -P 5 2k 3k", "write -c -P 6 206k 1k", "discard 202k 1k", "write -P 7 250k 6k"]
    qemu("qemu-io", "-f", "qcow2", *[word for command in first for word in ("-c", command)], image)
    if with_snapshot:  # its table is in the middle of the file: cuts before it are refused
        qemu("qemu-img", "snapshot", "-c", "one", image)
    qemu("qemu-io", "-f", "qcow2", *[word for command in second for word in ("-c", command)], image)
    return image


def contents(image: Path) -> list[tuple[bytes, dict[int, int]]]:
    """Return of each point its bytes, and where in the file the data of each cluster ends."""
    with open_chain(str(image), Policy()) as chain:
        disks = [open_point(chain, point) for point in points(chain)]
        return [(read_all(disk), data_ends(disk)) for disk in disks]


def data_ends(disk: Disk) -> dict[int, int]:
    return {
        start: extent.offset + start - extent.start + CLUSTER
        for extent in disk.extents(0, SIZE, 1000)
        if extent.data and extent.offset is not None
        for start in range(extent.start, extent.start + extent.length, CLUSTER)
    }


def check_cut(image: Path, cut: int, known: list[tuple[bytes, dict[int, int]]]) -> str:
    """Return what the cut led to, after checking each cluster of each point that is left."""
    try:
        chain = open_chain(str(image), Policy())
    except (CorruptImage, NotAnImage):
        return "refused"
    outcomes = {"whole"}
    with chain:
        for point, (content, ends) in zip(points(chain), known, strict=True):
            disk = open_point(chain, point)
            for start in range(0, SIZE, CLUSTER):
                said = qcowfs_says(disk, start, CLUSTER)
                left = min(CLUSTER, max(0, cut - ends.get(start, cut) + CLUSTER))
                if said == EIO:
                    outcomes.add(EIO)
                else:
                    assert content[start : start + left].ljust(CLUSTER, b"\0") == said, f"cut at {cut}, {start:#x}"
    return EIO if EIO in outcomes else "whole"


def test_r30_a_cut_loses_nothing_silently_but_data_past_the_end(whole: Path) -> None:
    data = whole.read_bytes()
    known = contents(whole)
    cut_image = whole.with_name("cut.qcow2")

    outcomes = set()
    for cut in range(0, len(data), STEP):
        cut_image.write_bytes(data[:cut])
        outcomes.add(check_cut(cut_image, cut, known))

    assert outcomes == {"refused", EIO, "whole"}

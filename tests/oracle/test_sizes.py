"""R58, sizes against QEMU: what deleting a snapshot frees, by the refcounts before and after."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from qcowfs.chain import open_chain
from qcowfs.gate import Policy
from qcowfs.sizes import Sizes
from qcowfs.snapshot import Point, points
from tests.support import forge, need


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def referenced_clusters(image: Path) -> int:
    """Host clusters with a refcount > 0, read without any code of qcowfs."""
    data = image.read_bytes()
    cluster_bits = struct.unpack_from(">I", data, 20)[0]
    table_offset, table_clusters = struct.unpack_from(">QI", data, 48)
    order = struct.unpack_from(">I", data, 96)[0] if struct.unpack_from(">I", data, 4)[0] == 3 else 4
    cluster = 1 << cluster_bits
    found = 0
    for (block,) in struct.iter_unpack(">Q", data[table_offset : table_offset + table_clusters * cluster]):
        if block:
            number = int.from_bytes(data[block : block + cluster], "big")
            digits = f"{number:0{cluster * 8}b}"
            width = 1 << order
            found += sum("1" in digits[place : place + width] for place in range(0, len(digits), width))
    return found


def make_image(directory: Path, seed: int) -> Path:
    generator = random.Random(seed)
    cluster_size = generator.choice([1024, 4096, 65536])
    extended = cluster_size == 65536 and generator.random() < 0.5
    options = f"cluster_size={cluster_size},refcount_bits={generator.choice([8, 16, 32, 64])}"
    if extended:
        options += ",extended_l2=on"
    image = directory / "sizes.qcow2"
    size = 64 * cluster_size
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, str(image), str(size))
    for number in range(5):
        commands = []
        for _ in range(8):
            start = generator.randrange(64) * cluster_size
            kind = generator.choice(["write -P 7", "write -c -P 9", "write -z", "discard"])
            commands += ["-c", f"{kind} {start} {cluster_size}"]
        # Compressing over an allocated cluster is refused, which is as good as any other write here.
        subprocess.run(["qemu-io", "-f", "qcow2", *commands, str(image)], capture_output=True, timeout=60)
        run("qemu-img", "snapshot", "-c", f"s{number}", str(image))
    return image


def snapshot_points(image: Path) -> list[tuple[Point, int | None, int]]:
    with open_chain(str(image), Policy()) as chain:
        sizes = Sizes(chain)
        return [(point, sizes.own(point), sizes.allocated(point)) for point in points(chain)]


@pytest.mark.parametrize("seed", range(12))
def test_own_size_is_what_deleting_the_snapshot_frees(tmp_path: Path, seed: int) -> None:
    need("qemu-img", "qemu-io")
    image = make_image(tmp_path, seed)
    cluster_size = 1 << struct.unpack_from(">I", image.read_bytes(), 20)[0]

    found = snapshot_points(image)

    before = referenced_clusters(image)
    kinds = [point.kind for point, _, _ in found]
    assert ["active", *["snapshot"] * 5] == kinds
    for point, own, _ in found[1:]:
        copy = tmp_path / "copy.qcow2"
        shutil.copyfile(image, copy)
        run("qemu-img", "snapshot", "-d", (point.snapshot_name or b"").decode(), str(copy))
        freed = (before - referenced_clusters(copy)) * cluster_size
        # The table of snapshots is written anew in both directions: it costs the same number of clusters.
        assert freed == own, f"seed {seed}, snapshot {point.snapshot_id!r}"


def test_allocated_counts_clusters_of_the_point_alone(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    image = tmp_path / "allocated.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", str(image), "16M")
    run("qemu-io", "-f", "qcow2", "-c", "write 0 1M", str(image))
    run("qemu-img", "snapshot", "-c", "one", str(image))
    run("qemu-io", "-f", "qcow2", "-c", "write 4M 2M", str(image))

    found = snapshot_points(image)

    assert [allocated for _, _, allocated in found] == [3 << 20, 1 << 20]


def test_a_dirty_image_has_no_own_sizes(tmp_path: Path) -> None:
    need("qemu-img", "qemu-io")
    image = tmp_path / "dirty.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", str(image), "4M")
    subprocess.run(
        ["qemu-io", "-f", "qcow2", "-c", "write 0 1M", "-c", "abort", str(image)], capture_output=True, timeout=60
    )

    [(_, own, allocated)] = snapshot_points(image)

    assert own is None
    assert allocated == 1 << 20


@pytest.mark.timeout(30)
def test_own_sizes_end_with_the_budget(tmp_path: Path) -> None:
    """4,096 snapshots that name an L1 table of 32 MiB, all of it a hole in the file: 128 GiB to read."""
    l1 = {"l1_table_offset": 32 << 20, "l1_size": 4 << 20}
    snapshots = [forge.Snapshot(id=b"%d" % number, fields=l1) for number in range(4096)]
    image = tmp_path / "huge.qcow2"
    image.write_bytes(forge.qcow2(cluster_bits=9, snapshots=snapshots))
    os.truncate(image, 64 << 20)

    found = snapshot_points(image)

    assert found[1][1] == 0
    assert found[-1][1] is None


@pytest.mark.parametrize("verb", ["own", "allocated"])
def test_a_table_that_cannot_be_read_has_no_size_and_stops_no_other(tmp_path: Path, verb: str) -> None:
    image = tmp_path / "unreadable.qcow2"
    image.write_bytes(forge.qcow2(data={0: 1}))

    with open_chain(str(image), Policy()) as chain:
        sizes = Sizes(chain)
        chain.layers[0].source.close()  # from now on every read fails
        found = getattr(sizes, verb)(points(chain)[0])

    assert found == {"own": None, "allocated": 512}[verb]


def test_a_disk_never_allocates_nothing(tmp_path: Path) -> None:
    """A new overlay holds no cluster, but tar -S would take a file without blocks for one hole."""
    base, image = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    base.write_bytes(forge.qcow2(data={0: 1}))
    image.write_bytes(forge.qcow2(backing_name=b"base.qcow2", extensions=[(0xE2792ACA, b"qcow2")]))

    found = snapshot_points(image)

    assert [allocated for _, _, allocated in found] == [512, 1 << 16]


def test_a_disk_without_bytes_allocates_none(tmp_path: Path) -> None:
    image = tmp_path / "empty.qcow2"
    image.write_bytes(forge.qcow2(size=0))

    [(_, _, allocated)] = snapshot_points(image)

    assert allocated == 0

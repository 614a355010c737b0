"""The oracle: what `export` writes of seeded random images is what QEMU reads of the points, and QEMU finds it whole.

Left out is what test_random.py leaves out: points that QEMU does not read.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from qcowfs import cli
from qcowfs.chain import open_chain
from qcowfs.cli.points import named_points
from qcowfs.errors import QcowfsError, ReadFault
from qcowfs.export import qcow2file
from qcowfs.export.kinds import DATA
from qcowfs.gate import Policy
from qcowfs.snapshot import Point, by_age
from tests.support import need
from tests.support.content import Content
from tests.support.images import MadeImage, MadeLayer, make
from tests.support.qemu import CannotRevert, convert, qemu, qemu_io, reverted

SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else range(1000, 1020)
FORMS: Sequence[Sequence[str]] = (
    ("-O", "qcow2"),
    ("-O", "qcow2", "-c"),
    ("-O", "qcow2", "--compression", "zstd"),
)
BLOCK, SECTOR = 4096, 512
CLUSTER, MIB = 1 << 16, 1 << 20
SLACK = 64 * SECTOR  # a file system's own blocks for a file in many pieces


class Unknown(Exception):
    """QEMU does not tell."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.expect_warnings
def test_every_file_is_the_point(tmp_path: Path, seed: int) -> None:
    """Scenarios by seed, with QEMU's answer."""
    need("qemu-img", "qemu-io")
    (tmp_path / "made").mkdir()
    made = make(seed, tmp_path / "made")
    replay = f"again: SEED={seed} make test TESTS=tests/oracle/test_export.py; commands:\n" + "\n".join(made.commands)

    with open_chain(str(made.top), Policy(allow=(os.path.realpath(tmp_path),))) as chain:
        named = named_points(chain)
    expected = {}
    for name, point in named:
        try:
            expected[name] = _qemus_word(made.layers[point.depth], point)
        except Unknown:
            continue
        _export_alone(tmp_path, made, name, expected[name], f"{name}, {replay}")
    _export_chain(tmp_path, made, named, expected, replay)


def _qemus_word(layer: MadeLayer, point: Point) -> bytes | None:
    """Return the bytes of `point`, None where QEMU cannot read all of it."""
    if point.entry is None:
        return convert(layer.path, layer.format)
    try:
        with reverted(layer.path, point.entry.id.decode()) as copy:
            return convert(copy, "qcow2")
    except CannotRevert:
        raise Unknown from None


def _export_alone(tmp_path: Path, made: MadeImage, name: str, expected: bytes | None, told: str) -> None:
    out = tmp_path / "out"
    words = [str(made.top), name, str(out), "--allow-backing", str(tmp_path)]
    if expected is None:
        assert ReadFault.exit_code == cli.main(["export", *words]), told
        assert not out.exists(), told
        return
    assert 0 == cli.main(["export", *words]), told
    assert Content(expected) == Content(out.read_bytes()), told
    assert out.stat().st_blocks * SECTOR <= _stored(expected) + SLACK, told
    out.unlink()
    for form in FORMS:
        assert 0 == cli.main(["export", *form, *words]), told
        assert_is(out, expected, f"{form}, {told}")
        out.unlink()


def _export_chain(
    tmp_path: Path,
    made: MadeImage,
    named: Sequence[tuple[str, Point]],
    expected: dict[str, bytes | None],
    told: str,
) -> None:
    directory = tmp_path / "chain"
    words = ["export", "--all", str(directory), str(made.top), "--allow-backing", str(tmp_path)]
    if None in expected.values():
        assert ReadFault.exit_code == cli.main(words), told
        return
    if len(expected) < len(named):  # nobody knows whether all of them can be read
        return
    names = {id(point): name for name, point in named}
    assert 0 == cli.main([*words, *([], ["-c"])[made.seed % 2]]), told
    assert len(named) == len(os.listdir(directory)), told
    for point in by_age([point for _, point in named]):
        name = names[id(point)]
        assert_is(directory / f"{name}.qcow2", expected[name] or b"", f"chain, {name}, {told}")


def test_a_chain_of_points_that_shrink_and_grow(tmp_path: Path) -> None:
    """Own fixture: what was cut off and comes back reads as zeros, though a file below the short one has data there."""
    need("qemu-img", "qemu-io")
    image, directory = tmp_path / "image.qcow2", tmp_path / "chain"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, str(4 * MIB))
    qemu_io(image, f"write -P 1 0 {4 * MIB}")
    expected = {"long": b"\1" * 4 * MIB}
    qemu("qemu-img", "snapshot", "-c", "long", image)
    short = MIB + 5 * SECTOR  # it ends within a cluster
    qemu("qemu-img", "resize", "-q", "--shrink", image, str(short))
    expected["short"] = b"\1" * short
    qemu("qemu-img", "snapshot", "-c", "short", image)
    qemu("qemu-img", "resize", "-q", image, str(4 * MIB))
    qemu_io(image, f"write -P 2 {3 * MIB} 64k")
    expected["current"] = convert(image, "qcow2") or b""
    assert bytes(MIB) + b"\2" * CLUSTER == expected["current"][2 * MIB : 3 * MIB + CLUSTER]

    assert 0 == cli.main(["export", "--all", str(directory), str(image)])
    for name, content in expected.items():
        assert_is(directory / f"{name}.qcow2", content, name)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_compressed_clusters_of_every_length(tmp_path: Path, compression: str) -> None:
    """Own fixture: streams that lie in two clusters, clusters that do not shrink."""
    need("qemu-img")
    image, out = tmp_path / "image.raw", tmp_path / "out"
    generator = random.Random(1)
    clusters = [generator.randbytes(length).ljust(CLUSTER, b"\1") for length in range(0, CLUSTER + 1, 3 * SECTOR)]
    clusters.append(generator.randbytes(CLUSTER))
    image.write_bytes(b"".join(clusters))
    words = ["export", "--image-format", "raw", "-O", "qcow2", "--compression", compression]

    assert 0 == cli.main([*words, str(image), "current", str(out)])
    assert_is(out, image.read_bytes(), compression)
    said = json.loads(qemu("qemu-img", "check", "--output=json", "-f", "qcow2", out).stdout)
    assert len(clusters) // 2 < said["compressed-clusters"] < len(clusters)


def test_beside_a_writer_only_what_stays_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Own fixture, QEMU writes."""
    need("qemu-img", "qemu-io")
    image, directory, out = tmp_path / "image.qcow2", tmp_path / "chain", tmp_path / "out"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, str(MIB))
    qemu_io(image, "write -P 1 0 64k")
    qemu("qemu-img", "snapshot", "-c", "before", image)
    with subprocess.Popen(["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write(b"write -P 2 0 64k\nflush\n")
        writer.stdin.flush()
        assert b"wrote 65536" in writer.stdout.readline()

        assert QcowfsError.exit_code == cli.main(["export", str(image), "current", str(out)])
        assert "another process is writing this point" in capsys.readouterr().err
        assert 0 == cli.main(["export", "--all", str(directory), str(image)])
        assert ["before.qcow2"] == os.listdir(directory)
        assert_is(directory / "before.qcow2", b"\1" * CLUSTER + bytes(MIB - CLUSTER), "before")
        writer.communicate(b"quit\n", timeout=60)


def test_refcounts_of_more_than_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Own fixture, QEMU counts: 2.5 GiB of clusters, which are not written, and their tables, which are."""
    need("qemu-img")
    path = tmp_path / "large.qcow2"
    write_all = qcow2file.write_all

    def write_tables(descriptor: int, data: memoryview | bytes, offset: int) -> None:
        if len(data) < MIB:
            write_all(descriptor, data, offset)

    monkeypatch.setattr(qcow2file, "write_all", write_tables)
    with path.open("wb") as file:
        writer = qcow2file.Qcow2Writer(file.fileno(), 3 << 30)
        for offset in range(0, 5 << 29, MIB):
            writer.write(offset, memoryview(bytes(MIB)), bytes([DATA]) * (MIB // CLUSTER))
        writer.finish()

    said = json.loads(qemu("qemu-img", "check", "--output=json", "-f", "qcow2", path).stdout)
    assert (5 << 29) // CLUSTER == said["allocated-clusters"]
    assert 0 == said["check-errors"]


def assert_is(path: Path, expected: bytes, told: str) -> None:
    """QEMU reads `expected` of the image at `path`, and finds nothing wrong with its structures."""
    checked = qemu("qemu-img", "check", "-f", "qcow2", path, check=False)
    assert checked.returncode == 0, f"{checked.stdout.decode()}{checked.stderr.decode()}{told}"
    assert Content(convert(path, "qcow2") or b"") == Content(expected), told


def _stored(data: bytes) -> int:
    """Return how many bytes a sparse file of `data` has to have."""
    return BLOCK * sum(data[start : start + BLOCK].strip(b"\0") != b"" for start in range(0, len(data), BLOCK))

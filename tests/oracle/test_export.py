"""The oracle: what `export` writes of seeded random images is what QEMU reads of the points, and QEMU finds it whole.

Left out is what test_random.py leaves out: points that QEMU does not read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from qcowfs import cli
from qcowfs.chain import open_chain
from qcowfs.cli.points import named_points
from qcowfs.errors import ReadFault
from qcowfs.gate import Policy
from qcowfs.snapshot import Point, by_age
from tests.support import need
from tests.support.content import Content
from tests.support.images import MadeImage, MadeLayer, make
from tests.support.qemu import CannotRevert, convert, qemu, reverted

SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else range(1000, 1060)
FORMS: Sequence[Sequence[str]] = (
    ("-O", "qcow2"),
    ("-O", "qcow2", "-c"),
    ("-O", "qcow2", "--compression", "zstd"),
)
BLOCK, SECTOR = 4096, 512
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


def assert_is(path: Path, expected: bytes, told: str) -> None:
    """QEMU reads `expected` of the image at `path`, and finds nothing wrong with its structures."""
    checked = qemu("qemu-img", "check", "-f", "qcow2", path, check=False)
    assert checked.returncode == 0, f"{checked.stdout.decode()}{checked.stderr.decode()}{told}"
    assert Content(convert(path, "qcow2") or b"") == Content(expected), told


def _stored(data: bytes) -> int:
    """Return how many bytes a sparse file of `data` has to have."""
    return BLOCK * sum(data[start : start + BLOCK].strip(b"\0") != b"" for start in range(0, len(data), BLOCK))

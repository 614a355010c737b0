"""`export` within a file system whose files may share blocks: what is shared, what is copied, and that nobody can tell.

Evidence: own fixtures and seeded images on XFS, with QEMU's answers; how full the file system is says what was shared.
"""

from __future__ import annotations

import filecmp
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcowfs import cli
from qcowfs.chain import open_chain
from qcowfs.cli.points import named_points
from qcowfs.errors import ReadFault
from qcowfs.export import copying
from qcowfs.gate import Policy
from tests.support import lacking, need
from tests.support.guests import loop_mounted
from tests.support.images import make, qemu

MIB = 1 << 20
DATA = 8 * MIB
SLACK = MIB  # of the file system's own: the tables that say what is where
SEEDS = range(6)


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0:
        lacking("a loop mount needs root")
    need("mkfs.xfs", "qemu-img", "qemu-io")
    image = tmp_path_factory.mktemp("v") / "xfs"
    with image.open("wb") as file:
        file.truncate(320 * MIB)
    subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True, timeout=60)
    with loop_mounted(image, "rw") as at:
        yield at


@pytest.fixture
def place(xfs: Path, request: pytest.FixtureRequest) -> Path:
    path = xfs / request.node.name.replace("/", "-")
    path.mkdir()
    return path


def used(place: Path) -> int:
    os.sync()
    status = os.statvfs(place)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def filled(path: Path, *options: str, size: int = DATA) -> Path:
    """Make an image full of data that differs from MiB to MiB."""
    qemu("qemu-img", "create", "-q", "-f", "qcow2", *options, path, str(size))
    writes = [f"write -P {start // MIB + 1} {start} {min(MIB, size - start)}" for start in range(0, size, MIB)]
    qemu("qemu-io", "-f", "qcow2", *[word for write in writes for word in ("-c", write)], path)
    return path


def export(*words: str | Path) -> int:
    return cli.main(["export", *map(str, words)])


def assert_is(out: Path, expected: Path, file_format: str) -> None:
    """QEMU reads of `out` what is in the raw disk `expected`, and finds nothing wrong with it."""
    if file_format == "raw":
        assert filecmp.cmp(out, expected, shallow=False)
        return
    qemu("qemu-img", "check", "-q", "-f", "qcow2", out)
    qemu("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw", out, expected)


@pytest.mark.parametrize("file_format", ["raw", "qcow2"])
def test_data_is_shared_with_all_layers(place: Path, tmp_path: Path, file_format: str) -> None:
    base, top, truth = filled(place / "base.qcow2"), place / "top.qcow2", tmp_path / "truth"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    qemu("qemu-io", "-f", "qcow2", "-c", f"write -P 99 {MIB + 65536} 3M", top)
    qemu("qemu-img", "convert", "-O", "raw", top, truth)
    before = used(place)

    assert 0 == export("-O", file_format, top, "current", place / "out")
    assert used(place) - before < SLACK
    assert_is(place / "out", truth, file_format)


@pytest.mark.parametrize("file_format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "options",
    [("-o", "cluster_size=512"), ("-o", "data_file=data,data_file_raw=on"), ("-o", "extended_l2=on,cluster_size=16k")],
    ids=["512", "data-file", "subclusters"],
)
def test_an_image_of_any_kind_reads_the_same(
    place: Path, tmp_path: Path, options: tuple[str, ...], file_format: str
) -> None:
    """Clusters of 512 bytes are no blocks; the disk ends within one."""
    options = tuple(word.replace("data_file=data", f"data_file={place / 'data'}") for word in options)
    image, truth = filled(place / "image.qcow2", *options, size=3 * MIB + 512), tmp_path / "truth"
    qemu("qemu-img", "convert", "-O", "raw", image, truth)

    assert 0 == export("-O", file_format, image, "current", place / "out")
    assert_is(place / "out", truth, file_format)


@pytest.mark.expect_warnings
def test_what_lies_past_the_end_of_a_file_is_zeros(place: Path, tmp_path: Path) -> None:
    """As QEMU reads it; no such blocks can be shared, and the clusters that were meant for them are no leak."""
    image, truth = filled(place / "image.qcow2"), tmp_path / "truth"
    os.truncate(image, image.stat().st_size - MIB - 1000)
    qemu("qemu-img", "convert", "-O", "raw", image, truth)

    for file_format in ("raw", "qcow2"):
        assert 0 == export("--force", "-O", file_format, image, "current", place / "out")
        assert_is(place / "out", truth, file_format)


def test_a_running_machines_image_is_copied(place: Path, tmp_path: Path) -> None:
    """Its next write to a block that is shared would need a new one, and there may be none."""
    image, truth = filled(place / "image.qcow2"), tmp_path / "truth"
    qemu("qemu-img", "snapshot", "-c", "before", image)
    qemu("qemu-img", "convert", "-l", "before", "-O", "raw", image, truth)
    with subprocess.Popen(["qemu-io", "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        writer.stdin.write(b"write -P 9 0 64k\nflush\n")
        writer.stdin.flush()
        assert b"wrote 65536" in writer.stdout.readline()
        before = used(place)

        assert 0 == export(image, "before", place / "out")
        assert used(place) - before >= DATA
        writer.communicate(b"quit\n", timeout=60)
    assert_is(place / "out", truth, "raw")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.expect_warnings
def test_exports_are_what_they_are_elsewhere(place: Path, tmp_path: Path, seed: int) -> None:
    """Seeded chains of all formats; oracle/test_export.py holds the exports elsewhere to QEMU's answers."""
    made = make(seed, place)
    policy = Policy(allow=(os.path.realpath(place),))
    with open_chain(str(made.top), policy) as chain:
        names = [name for name, _ in named_points(chain)]
    for name in names:
        words = ("--allow-backing", place, made.top, name)
        code = export("--force", *words, tmp_path / "elsewhere")

        assert code == export("--force", *words, place / "out.raw")
        assert code == export("--force", "-O", "qcow2", *words, place / "out.qcow2")
        if code != ReadFault.exit_code:
            assert_is(place / "out.raw", tmp_path / "elsewhere", "raw")
            assert_is(place / "out.qcow2", tmp_path / "elsewhere", "qcow2")


@pytest.mark.expect_warnings
def test_what_is_written_meanwhile_without_a_lock_is_no_export(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image, out = filled(place / "image"), place / "out"
    before = copying.stored_runs

    def written(*words: Any) -> list[tuple[int, int, int]]:
        with image.open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"x")
        return before(*words)

    monkeypatch.setattr(copying, "stored_runs", written)
    code = export("--no-lock", image, "current", out)

    assert code == 1
    assert "wrote the image" in capfd.readouterr().err
    assert not out.exists()

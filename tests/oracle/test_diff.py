"""`qcowfs diff --blocks`: what is proved equal without being read, what is not, and how it is told.

Own fixtures, written by qemu-io; where bytes are right by QEMU's word is test_blockdiff.py's matter.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from qcowfs import cli
from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs.blockdiff import differing, may_differ
from qcowfs.chain import open_chain
from qcowfs.cli.points import find_point, split_image
from qcowfs.errors import NotAnImage, PointNotFound, ReadFault, SourceError, UsageError
from qcowfs.gate import Policy
from qcowfs.snapshot import open_disk
from tests.support import need
from tests.support.qemu import qemu, qemu_io
from tests.support.tables import Tables

CLUSTER = 4096
REACH = CLUSTER // 8 * CLUSTER  # of one L2 table
KIB, MIB, TIB = 1 << 10, 1 << 20, 1 << 40


def made(path: Path, *words: str | Path, size: str = "8M", cluster: int = CLUSTER, more: str = "") -> Path:
    """Make an image of small clusters, so that it has several L2 tables."""
    need("qemu-img", "qemu-io")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}{more}", *words, path, size)
    return path


def snapshot(image: Path, name: str) -> None:
    qemu("qemu-img", "snapshot", "-c", name, image)


def disks(old: Path, old_point: str, new: Path, new_point: str) -> tuple[Disk, Disk]:
    """Two points of chains that are opened apart."""
    cache = Cache(MIB)
    policy = Policy(allow=(os.path.realpath(old.parent), os.path.realpath(new.parent)))
    first, second = (
        open_disk(chain, find_point(chain, point), cache)
        for chain, point in ((open_chain(str(old), policy), old_point), (open_chain(str(new), policy), new_point))
    )
    return first, second


def both(old: Disk, new: Disk) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """What may differ by the tables, and what does, byte by byte."""
    return list(may_differ(old, new, granularity=1)), list(differing(old, new, granularity=1))


def diff(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, Any]:
    code = cli.main(["diff", "--blocks", "--json", *map(str, words)])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Snapshots "a" and "b"; between them 3 bytes were changed in the middle of the third L2 table's reach."""
    path = made(tmp_path / "image.qcow2")
    qemu_io(path, "write -P 1 0 8M")
    snapshot(path, "a")
    qemu_io(path, f"write -P 2 {2 * REACH + 3 * CLUSTER} 512")
    snapshot(path, "b")
    return path


def test_only_what_was_written_between_two_snapshots_may_differ(image: Path) -> None:
    start = 2 * REACH + 3 * CLUSTER

    assert ([(start, CLUSTER)], [(start, 512)]) == both(*disks(image, "a", image, "b"))


def test_a_table_that_both_share_is_not_read(image: Path) -> None:
    tables = Tables(image)
    for cluster in range(CLUSTER // 8):
        tables.l2(cluster, 1 << 63 | 0x1FF000 + 512)  # not aligned: whoever reads it fails
    old, new = disks(image, "a", image, "b")
    with pytest.raises(ReadFault):
        old.pread(0, 1)

    assert [(2 * REACH + 3 * CLUSTER, 512)] == both(old, new)[1]


def test_an_entry_that_is_equal_in_two_tables_is_not_looked_at(image: Path) -> None:
    Tables(image).l2(3 * REACH // CLUSTER, 1 << 63 | 0x1FF000 + 512)
    qemu_io(image, f"write -P 4 {3 * REACH + 2 * CLUSTER} 4k")  # copies the table, and what is wrong in it
    old, new = disks(image, "b", image, "current")
    with pytest.raises(ReadFault):
        new.pread(3 * REACH, 1)

    assert ([(3 * REACH + 2 * CLUSTER, CLUSTER)],) * 2 == both(old, new)


def test_bytes_that_were_written_again_are_no_difference(image: Path) -> None:
    qemu_io(image, "write -P 1 0 4k")

    assert [(0, CLUSTER)] == both(*disks(image, "b", image, "current"))[0]
    assert [] == both(*disks(image, "b", image, "current"))[1]


def test_one_host_cluster_at_two_guest_offsets_is_two_places(tmp_path: Path) -> None:
    path = made(tmp_path / "image.qcow2")
    qemu_io(path, "write -P 1 0 4k", "write -P 2 4k 4k", "write -P 1 8k 4k")
    snapshot(path, "a")
    qemu_io(path, "write -P 3 1M 4k")  # a table of its own for the active state
    tables = Tables(path)
    tables.l2(1, tables.l2(0))
    tables.l2(2, tables.l2(0))

    may, does = both(*disks(path, "a", path, "current"))

    assert [(CLUSTER, 2 * CLUSTER), (MIB, CLUSTER)] == may
    assert [(CLUSTER, CLUSTER), (MIB, CLUSTER)] == does


def test_a_stream_that_both_name_is_not_decompressed(tmp_path: Path) -> None:
    path = made(tmp_path / "image.qcow2")
    qemu_io(path, "write -c -P 1 0 4k", "write -c -P 2 4k 4k")
    snapshot(path, "a")
    qemu_io(path, "write -P 3 1M 4k")
    tables = Tables(path)
    with path.open("r+b") as file:
        file.seek(tables.l2(0) & 0xFFFFFFFF)
        file.write(b"\xff" * 16)

    assert ([(MIB, CLUSTER)], [(MIB, CLUSTER)]) == both(*disks(path, "a", path, "current"))


def test_overlays_of_one_file_by_two_names_share_it(tmp_path: Path) -> None:
    base = made(tmp_path / "base.qcow2")
    qemu_io(base, "write -P 1 0 8M")
    (tmp_path / "symbolic.qcow2").symlink_to(base)
    os.link(base, tmp_path / "hard.qcow2")
    one = made(tmp_path / "one.qcow2", "-b", "symbolic.qcow2", "-F", "qcow2")
    two = made(tmp_path / "two.qcow2", "-b", "hard.qcow2", "-F", "qcow2")
    qemu_io(two, "write -P 2 4M 4k")

    assert ([(4 * MIB, CLUSTER)],) * 2 == both(*disks(one, "current", two, "current"))
    assert ([(4 * MIB, CLUSTER)],) * 2 == both(*disks(base, "current", two, "current"))


def test_a_copy_of_a_file_is_another_one(image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    shutil.copyfile(image, copy)

    assert ([(0, 8 * MIB)], []) == both(*disks(image, "a", copy, "a"))


def test_a_zero_cluster_is_equal_to_nothing_at_all(tmp_path: Path) -> None:
    path = made(tmp_path / "image.qcow2")
    snapshot(path, "a")
    qemu_io(path, "write -z 0 1M", "write -P 0 4M 4k")

    assert ([(4 * MIB, CLUSTER)], []) == both(*disks(path, "a", path, "current"))


def test_a_short_layer_hides_what_lies_below_its_end(tmp_path: Path) -> None:
    base = made(tmp_path / "base.qcow2")
    qemu_io(base, "write -P 1 0 8M")
    short = made(tmp_path / "short.qcow2", "-b", base.name, "-F", "qcow2", size="1M")
    long = made(tmp_path / "long.qcow2", "-b", short.name, "-F", "qcow2")

    assert [(MIB, 7 * MIB)] == both(*disks(base, "current", long, "current"))[1]


def test_a_terabyte_of_nothing_takes_no_time(tmp_path: Path) -> None:
    sparse = tmp_path / "sparse.raw"
    with sparse.open("wb") as file:
        file.truncate(TIB)
        file.seek(TIB // 2)
        file.write(b"x")
    empty = made(tmp_path / "empty.qcow2", size="1T", cluster=65536)
    words = ["--image-format", "raw", "--new-format", "qcow2", "--granularity", "1", sparse, empty]

    assert 1 == cli.main(["diff", "--blocks", *map(str, words)])


def test_clusters_that_are_holes_of_their_file_are_zeros(tmp_path: Path) -> None:
    one = made(tmp_path / "one.qcow2", size="64G", cluster=65536, more=",preallocation=metadata")
    two = made(tmp_path / "two.qcow2", size="64G", cluster=65536, more=",preallocation=metadata")
    qemu_io(two, "write -P 1 32G 64k")

    assert ([(32 << 30, 65536)],) * 2 == both(*disks(one, "current", two, "current"))


def test_a_cluster_that_cannot_be_read_is_told_and_all_others_are_compared(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.qcow2"
    shutil.copyfile(image, copy)
    tables = Tables(copy)
    for cluster in (1, 2, 300):
        tables.l2(cluster, tables.l2(cluster) + 512)

    code, document = diff(capsys, "--granularity", "64K", f"{image}:a", f"{copy}:current")

    assert SourceError.exit_code == code
    assert [(CLUSTER, 2 * CLUSTER), (300 * CLUSTER, CLUSTER)] == [
        (fault["start"], fault["length"]) for fault in document["faults"]
    ]
    assert "not aligned" in document["faults"][0]["error"]
    assert [{"start": 2 * REACH, "length": 64 * KIB}] == document["ranges"]
    assert document["same"] is False


def test_what_lies_above_a_damaged_table_is_compared(image: Path, tmp_path: Path) -> None:
    overlay = made(tmp_path / "overlay.qcow2", "-b", image.name, "-F", "qcow2")
    qemu_io(overlay, "write -P 9 64k 4k")
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in (image, overlay):
        shutil.copyfile(path, copy / path.name)
    qemu_io(copy / overlay.name, "write -P 8 64k 512")
    Tables(copy / image.name).l1(0, 1 << 63 | CLUSTER + 512)
    faults: list[tuple[int, int]] = []
    old, new = disks(overlay, "current", copy / overlay.name, "current")

    found = list(differing(old, new, granularity=1, on_fault=lambda *fault: faults.append(fault[:2])))

    assert [(64 * KIB, 512)] == found
    assert 64 * KIB == faults[0][1]
    assert [REACH - CLUSTER, 0] == [sum(length for _, length in faults), faults[0][0]]


def test_a_stream_that_cannot_be_decompressed_is_its_own_cluster_only(tmp_path: Path) -> None:
    path = made(tmp_path / "image.qcow2", cluster=65536)
    qemu_io(path, *(f"write -c -P {number + 1} {number << 16} 64k" for number in range(16)))
    copy = tmp_path / "copy.qcow2"
    shutil.copyfile(path, copy)
    with copy.open("r+b") as file:
        file.seek(Tables(copy).l2(5) & 0xFFFFFFFF)
        file.write(b"\xff" * 16)
    faults: list[tuple[int, int]] = []

    found = list(differing(*disks(path, "current", copy, "current"), on_fault=lambda *fault: faults.append(fault[:2])))

    assert [] == found
    assert [(5 << 16, 1 << 16)] == faults


def test_a_fault_without_anybody_to_tell_is_raised(image: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.qcow2"
    shutil.copyfile(image, copy)
    Tables(copy).l1(1, 1 << 63 | CLUSTER + 512)
    old, new = disks(image, "a", copy, "current")

    assert [(0, 8 * MIB)] == list(may_differ(old, new))
    with pytest.raises(ReadFault, match="L2 table that is not aligned"):
        list(differing(old, new))


@pytest.mark.parametrize("written", [False, True])
def test_past_the_end_of_the_smaller_one_only_zeros_are_no_difference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written: bool
) -> None:
    small, large = made(tmp_path / "small.qcow2", size="1M"), made(tmp_path / "large.qcow2", size="2M")
    qemu_io(large, "write -P 0 1M 4k", *(["write -P 1 1536k 512"] if written else []))
    ranges = [{"start": 1536 * KIB, "length": 512}] if written else []

    code, document = diff(capsys, "--granularity", "512", small, large)

    assert (int(written), ranges) == (code, document["ranges"])
    assert [MIB, 2 * MIB] == [document[side]["virtual_size"] for side in ("old", "new")]
    assert code == qemu("qemu-img", "compare", small, large, check=False).returncode


def test_the_table_and_the_exit_code(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert 1 == cli.main(["diff", "--blocks", str(image), "a", "b"])
    assert [
        "Offset          Length",
        "0x403000        0x1000",
        "1 range, 4096 bytes (4 KiB) differ",
    ] == capsys.readouterr().out.splitlines()
    qemu_io(image, "write -P 3 7 1")
    assert 1 == cli.main(["diff", "--blocks", "--granularity", "1", str(image), "b", "current"])
    assert "1 range, 1 byte differs" == capsys.readouterr().out.splitlines()[-1]
    qemu("qemu-img", "snapshot", "-a", "b", image)
    assert 0 == cli.main(["diff", "--blocks", str(image), "b", "current"])
    assert "" == capsys.readouterr().out


def test_the_document_names_both_points(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = diff(capsys, f"{image}:1", image)

    assert 1 == code
    assert {
        "old": {"image": str(image), "point": "a", "virtual_size": 8 * MIB},
        "new": {"image": str(image), "point": "current", "virtual_size": 8 * MIB},
        "granularity": 4096,
        "ranges": [{"start": 2 * REACH + 3 * CLUSTER, "length": CLUSTER}],
        "bytes": CLUSTER,
        "faults": [],
        "more_faults": 0,
        "same": False,
    } == document


def test_the_longest_name_of_a_file_is_the_image(tmp_path: Path) -> None:
    name = str(tmp_path / "a")
    for path in (name, f"{name}:b"):
        Path(path).touch()

    assert (name, None) == split_image(name)
    assert (name, "c:d") == split_image(f"{name}:c:d")
    assert (f"{name}:b", None) == split_image(f"{name}:b")
    assert (f"{name}:b", "c") == split_image(f"{name}:b:c")
    assert (f"{name}:b", "") == split_image(f"{name}:b:")
    assert ("missing", "c:d") == split_image("missing:c:d")


@pytest.mark.parametrize(
    ("text", "image", "point"),
    [
        ("https://h:443/a.qcow2", "https://h:443/a.qcow2", None),
        ("https://h:443/a.qcow2:monday", "https://h:443/a.qcow2", "monday"),
        ("iscsi://h/iqn.2026-11.x:y/1", "iscsi://h/iqn.2026-11.x:y/1", None),
        ("iscsi://h/iqn.2026-11.x:y/1:data@a:b", "iscsi://h/iqn.2026-11.x:y/1", "data@a:b"),
        ("nbd://h:10809", "nbd://h:10809", None),
    ],
)
def test_the_point_of_a_url_is_in_its_last_component(text: str, image: str, point: str | None) -> None:
    assert (image, point) == split_image(text)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["image.qcow2", "a", "missing"], PointNotFound.exit_code, "no point missing"),
        (["image.qcow2:a", "image.qcow2:"], PointNotFound.exit_code, "no point"),
        (["image.qcow2:a", "missing.qcow2:a"], SourceError.exit_code, "missing.qcow2: cannot open"),
        (["--granularity", "3", "image.qcow2", "a", "b"], UsageError.exit_code, "'3' is not a size"),
        (["--granularity", "0", "image.qcow2", "a", "b"], UsageError.exit_code, "'0' is not a size"),
        (["--granularity", "2G", "image.qcow2", "a", "b"], UsageError.exit_code, "'2G' is not a size"),
        (["--new-format", "raw", "image.qcow2", "a", "b"], UsageError.exit_code, "--new-format is for"),
    ],
)
def test_what_is_wrong_is_one_line_and_its_exit_code(
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(image.parent)

    assert code == cli.main(["diff", "--blocks", *words])
    told = capsys.readouterr()
    assert "" == told.out
    assert said in told.err.splitlines()[0]


@pytest.mark.parametrize("options", [[], ["--blocks"]])
def test_only_the_second_image_is_said_to_be_raw(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """The option of both would compare the bytes of the qcow2 file itself."""
    raw_disk = tmp_path / "raw"
    raw_disk.write_bytes(bytes(4096))

    assert NotAnImage.exit_code == cli.main(["diff", *options, str(image), str(raw_disk)])
    assert "hint: --new-format raw takes it for a raw disk" == capsys.readouterr().err.splitlines()[1]
    assert NotAnImage.exit_code == cli.main(["diff", *options, str(raw_disk), str(image)])
    assert "hint: --image-format raw takes it for a raw disk" == capsys.readouterr().err.splitlines()[1]


@pytest.mark.parametrize("options", [[], ["--blocks"]])
def test_a_point_where_an_image_belongs_is_met_with_a_hint(
    image: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert SourceError.exit_code == cli.main(["diff", *options, str(image), "a"])
    assert "hint: for two points of one image, give IMAGE, OLD and NEW" == capsys.readouterr().err.splitlines()[1]


@pytest.mark.parametrize(
    "words",
    [
        ["--granularity", "1", "I", "a", "b"],
        ["--blocks", "--checksum", "I", "a", "b"],
        ["--blocks", "--stat", "I", "a", "b"],
        ["--blocks", "--norecovery", "I", "a", "b"],
        ["--blocks", "I", "a", "b", "p1/etc"],
        ["--new-format", "raw", "I", "a", "b"],
    ],
)
def test_what_goes_with_files_only_or_with_blocks_only_is_told(
    image: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert UsageError.exit_code == cli.main(["diff", *(str(image) if word == "I" else word for word in words)])
    assert "--" in capsys.readouterr().err

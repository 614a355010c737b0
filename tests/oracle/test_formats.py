"""Formats and chains, one scenario for each rule of reading, with QEMU's answer."""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qcowfs._core import Disk
from qcowfs.chain import Chain, open_chain
from qcowfs.errors import CorruptImage, GateRefused, ReadFault, UnsupportedImage
from qcowfs.gate import Policy
from qcowfs.sizes import Sizes
from qcowfs.snapshot import Point, points
from tests.support import lacking, need
from tests.support.content import Content
from tests.support.qemu import CannotRevert, convert, qemu, qemu_io, qemu_map, qemu_reads, reverted
from tests.support.reader import open_point, read_all, runs_of_disk, runs_of_qemu
from tests.support.tables import COMPRESSED, COPIED, Tables, active_disk

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("qemu-img", "qemu-io")


def create(path: Path, size: int | str, *words: str, options: str = "compat=1.1") -> Path:
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *words, path, str(size))
    return path


def snapshot(path: Path, name: str = "one") -> None:
    qemu("qemu-img", "snapshot", "-c", name, path)


def whole(disk: Disk) -> Content:
    return Content(read_all(disk))


def read(image: Path | str, select: int = 0, *, image_format: str | None = None) -> Content:
    """Return what qcowfs reads of the point number `select` of `image`."""
    with open_chain(str(image), Policy(), image_format=image_format) as chain:
        return whole(open_point(chain, points(chain)[select]))


def state(image: Path, snapshot_id: str) -> Content:
    """Return what QEMU reads of a snapshot."""
    with reverted(image, snapshot_id) as copy:
        return Content(convert(copy, "qcow2") or b"")


def check(image: Path, image_format: str = "qcow2") -> Content:
    """The active state is what QEMU reads; returns it."""
    expected = convert(image, image_format)
    assert expected is not None
    assert read(image) == expected
    return Content(expected)


@pytest.mark.parametrize("bits", range(9, 22))
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_r4_every_cluster_size_in_both_versions(tmp_path: Path, bits: int, compat: str) -> None:
    image = create(tmp_path / "i.qcow2", "5M", options=f"compat={compat},cluster_size={1 << bits}")
    qemu_io(image, "write -P 1 1000448 100k", "write -P 2 4M 1M")

    check(image)


@pytest.mark.parametrize("options", ["cluster_size=64k", "cluster_size=2M", "extended_l2=on,cluster_size=64k"])
def test_r18_a_disk_of_64_tib_with_data_at_both_ends(tmp_path: Path, options: str) -> None:
    size = 64 << 40
    places = [0, 1 << 29, (1 << 40) - 512, 1 << 45, size - 512]
    image = create(tmp_path / "i.qcow2", size, options=options)
    qemu_io(image, *[f"write -P {number + 1} {place} 512" for number, place in enumerate(places)])
    ranges = [(max(0, place - 512), 1024) for place in places[:-1]] + [(size - 1024, 1024)]

    with open_chain(str(image), Policy()) as chain:
        disk = active_disk(chain)

        assert qemu_reads(image, ranges) == [disk.pread(*piece) for piece in ranges]
        assert runs_of_qemu(qemu_map(image, "qcow2")) == runs_of_disk(disk)
        assert disk.pread(size - 1, 100) == b"\x05"
        assert disk.pread(size, 1) == b""


@pytest.mark.parametrize("bits", range(14, 22))
def test_r28_every_cluster_size_with_extended_l2(tmp_path: Path, bits: int) -> None:
    image = create(tmp_path / "i.qcow2", "9M", options=f"extended_l2=on,cluster_size={1 << bits}")
    qemu_io(image, "write -P 1 512k 3k", "write -z 1M 20k", "write -P 2 8M 512", "discard 513k 1k")

    check(image)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
@pytest.mark.parametrize("bits", [9, 12, 16, 21])
@pytest.mark.parametrize("extended", ["on", "off"])
def test_r23_r29_compressed_images(tmp_path: Path, kind: str, bits: int, extended: str) -> None:
    """Compressible and not, so that streams are short, long and at odd offsets (R23, R24)."""
    if extended == "on" and bits < 14:
        bits = 14
    raw = tmp_path / "source.raw"
    raw.write_bytes(
        b"".join(os.urandom(3000) + bytes([place % 256]) * 9000 for place in range(300)) + b"end".ljust(700)
    )
    image = tmp_path / "i.qcow2"
    options = f"compression_type={kind},cluster_size={1 << bits},extended_l2={extended}"
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)

    assert raw.read_bytes() == check(image)[: raw.stat().st_size]  # R27: the disk ends inside its last cluster


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_r24_streams_begin_anywhere_and_may_be_longer_than_their_cluster(tmp_path: Path, kind: str) -> None:
    """Trap 3: an odd host offset is no zero flag. The descriptor counts whole sectors: a short stream may seem long."""
    raw = tmp_path / "source.raw"
    raw.write_bytes(b"".join(os.urandom(20 + place * 7 % 400).ljust(512, b"0") for place in range(3000)))
    image = tmp_path / "i.qcow2"
    options = f"compression_type={kind},cluster_size=512"
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)
    tables = Tables(image)
    entries = [tables.l2(number) for number in range(3000)]
    streams = [(entry & ((1 << 61) - 1), (entry >> 61 & 1) + 1) for entry in entries if entry & COMPRESSED]

    assert len(streams) > 2000
    assert sum(offset % 2 for offset, _ in streams) > 500
    assert sum(sectors * 512 - offset % 512 > 512 for offset, sectors in streams) > 100
    assert raw.read_bytes() == check(image)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_r24_a_stream_at_the_end_of_the_file_is_shorter_than_its_sectors(tmp_path: Path, kind: str) -> None:
    image = create(tmp_path / "i.qcow2", "1M", options=f"compression_type={kind}")
    qemu_io(image, "write -c -P 3 64k 64k")
    offset = Tables(image).l2(1) & ((1 << 54) - 1)

    assert image.stat().st_size % 512 != 0
    assert offset < image.stat().st_size < offset + 512
    assert check(image)[64 * KIB : 128 * KIB] == b"\x03" * 64 * KIB


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_r27_a_disk_that_ends_inside_a_compressed_cluster(tmp_path: Path, kind: str) -> None:
    raw = tmp_path / "source.raw"
    raw.write_bytes(bytes(range(256)) * 300)
    image = tmp_path / "i.qcow2"
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", f"compression_type={kind}", raw, image)

    assert Tables(image).l2(1) & COMPRESSED
    assert raw.read_bytes() == check(image)


def test_r10_a_dirty_image_is_read_and_left_dirty(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "4M", options="lazy_refcounts=on")
    command = ["qemu-io", "-f", "qcow2", "-c", "write -P 5 0 1M", "-c", "abort", str(image)]
    subprocess.run(command, capture_output=True, timeout=60)
    before = image.read_bytes()

    with open_chain(str(image), Policy()) as chain:
        assert any("not closed cleanly" in warning for warning in chain.warnings)
        assert whole(open_point(chain, points(chain)[0]))[:MIB] == b"\x05" * MIB
    assert before == image.read_bytes()


def test_r11_an_image_marked_corrupt_is_read_with_a_warning(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "4M")
    qemu_io(image, "write -P 6 1M 1M")
    tables = Tables(image)
    tables.word(72, tables.word(72) | 2)

    with open_chain(str(image), Policy()) as chain:
        assert any("corrupt" in warning for warning in chain.warnings)
    check(image)


@pytest.mark.parametrize("words", [[], ["-c"]], ids=["plain", "compressed"])
def test_r15_r16_version_1(tmp_path: Path, words: list[str]) -> None:
    raw = tmp_path / "source.raw"
    raw.write_bytes(b"".join(os.urandom(100) + bytes([place]) * 8000 for place in range(200)))
    image = tmp_path / "i.qcow"
    qemu("qemu-img", "convert", *words, "-O", "qcow", raw, image, check=False)  # -c: exit 1, and right (QEMU 7.2)

    assert raw.read_bytes() == check(image, "qcow")[: raw.stat().st_size]


def test_r15_version_1_over_a_backing_file_whose_format_nobody_recorded(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "4M")
    qemu_io(base, "write -P 1 0 4M")
    image = tmp_path / "i.qcow"
    qemu("qemu-img", "create", "-q", "-f", "qcow", "-b", "base.qcow2", "-F", "qcow2", image, "4M")
    qemu_io(image, "write -P 2 1M 1M", image_format="qcow")

    check(image, "qcow")


def test_r21_zeros_hide_the_backing_file(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "4M")
    qemu_io(base, "write -P 1 0 4M")
    image = create(tmp_path / "i.qcow2", "4M", "-b", "base.qcow2", "-F", "qcow2")
    qemu_io(image, "write -z 1M 1M", "write -P 3 2M 64k", "write -z 2M 64k")

    assert bytes(MIB) == check(image)[MIB : 2 * MIB]


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("extended", ["on", "off"])
def test_r22_preallocated_images(tmp_path: Path, mode: str, extended: str) -> None:
    image = create(tmp_path / "i.qcow2", "4M", options=f"preallocation={mode},extended_l2={extended}")
    qemu_io(image, "write -P 1 1M 10k")

    check(image)


@pytest.mark.expect_warnings
def test_r30_a_cut_file_reads_as_qemu_reads_it_but_for_its_tables(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "4M")
    qemu_io(image, "write -P 1 0 4M")
    os.truncate(image, image.stat().st_size - 30000)

    assert bytes(30000) == check(image)[-30000:]


def test_r30_a_cut_l2_table_is_an_error_where_qemu_reads_zeros(tmp_path: Path) -> None:
    """A deviation on purpose: QEMU calls the whole disk empty."""
    image = create(tmp_path / "i.qcow2", "4M")
    qemu_io(image, "write -P 1 0 4M")
    os.truncate(image, Tables(image).l1(0) & ((1 << 56) - 1))

    assert Content(bytes(4 * MIB)) == convert(image, "qcow2")
    with pytest.raises(ReadFault, match="truncated"):
        read(image)


def test_r31_trailing_garbage_means_nothing(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "4M")
    qemu_io(image, "write -P 1 1M 1M")
    with image.open("ab") as file:
        file.write(os.urandom(100_000))

    check(image)


@contextmanager
def loop_device(file: Path) -> Iterator[str]:
    found = subprocess.run(["losetup", "-f", "--show", file], capture_output=True, timeout=30, text=True)
    if found.returncode:
        lacking(f"no loop device: {found.stderr.strip()}")
    device = found.stdout.strip()
    try:
        yield device
    finally:
        subprocess.run(["losetup", "-d", device], check=True, timeout=30)


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
def test_r31_an_image_on_a_block_device(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "4M")
    qemu_io(image, "write -P 7 0 3M")
    snapshot(image)
    expected = convert(image, "qcow2")
    os.truncate(image, 8 * MIB)

    with loop_device(image) as device:
        assert [expected, expected] == [read(device), read(device, 1)]


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
def test_a_raw_block_device_as_backing_file(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(2 * MIB))

    with loop_device(base) as device:
        image = create(tmp_path / "i.qcow2", "2M", "-b", device, "-F", "raw")
        with open_chain(str(image), Policy(allow=("/dev",))) as chain:
            assert base.read_bytes() == whole(open_point(chain, points(chain)[0]))
            assert Sizes(chain).own(points(chain)[1]) == 2 * MIB  # stat(2) counts no blocks of a device


@pytest.mark.parametrize("raw", ["on", "off"])
def test_r38_r39_external_data_files(tmp_path: Path, raw: str) -> None:
    data = tmp_path / "data.bin"
    image = create(tmp_path / "i.qcow2", "4M", options=f"data_file={data},data_file_raw={raw}")
    qemu_io(image, "write -P 1 1M 1M", "write -z 1500k 64k", "discard 1700k 64k")

    expected = check(image)
    if raw == "on":
        assert expected == data.read_bytes()


def test_r40_a_relative_data_file_lies_beside_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU looks in the working directory only."""
    monkeypatch.chdir(tmp_path)
    image = create(Path("i.qcow2"), "1M", options="data_file=data.bin")
    qemu_io(image, "write -P 9 0 1M")
    monkeypatch.chdir("/")

    assert read(tmp_path / "i.qcow2") == b"\x09" * MIB


def test_r40_a_relative_data_file_may_lie_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As QEMU has it; not beside the image, it needs to be allowed."""
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    image = create(Path("images/i.qcow2"), "1M", options="data_file=data.bin")
    qemu_io(image, "write -P 9 0 1M")

    with pytest.raises(GateRefused, match="data file"):
        open_chain(str(image), Policy())
    with open_chain(str(image), Policy(allow=(str(tmp_path),))) as chain:
        assert convert(image, "qcow2") == whole(active_disk(chain)) == b"\x09" * MIB


def test_r41_a_relative_name_starts_at_the_directory_of_the_name_that_was_opened(tmp_path: Path) -> None:
    """QEMU takes the overlay's name as it was given: two links to one overlay lead to two bases."""
    for number, folder in enumerate(("real", "other"), 1):
        (tmp_path / folder).mkdir()
        base = create(tmp_path / folder / "base.qcow2", "1M")
        qemu_io(base, f"write -P {number} 0 1M")
    image = create(tmp_path / "real" / "i.qcow2", "1M", "-b", "base.qcow2", "-F", "qcow2")
    (tmp_path / "other" / "i.qcow2").symlink_to(image)
    (tmp_path / "directory").symlink_to(tmp_path / "real")

    assert check(image) == b"\x01" * MIB
    assert check(tmp_path / "directory" / "i.qcow2") == b"\x01" * MIB
    link = tmp_path / "other" / "i.qcow2"
    assert Content(convert(link, "qcow2") or b"") == b"\x02" * MIB
    with open_chain(
        str(link), Policy(allow=(str(tmp_path),))
    ) as chain:  # what is beside a link is not beside the image
        assert whole(active_disk(chain)) == b"\x02" * MIB


def test_r41_a_name_that_leads_nowhere_from_a_link_is_looked_for_where_the_file_is(tmp_path: Path) -> None:
    """Kinder than QEMU, which fails."""
    (tmp_path / "real").mkdir()
    base = create(tmp_path / "real" / "base.qcow2", "1M")
    qemu_io(base, "write -P 1 0 1M")
    image = create(tmp_path / "real" / "i.qcow2", "1M", "-b", "base.qcow2", "-F", "qcow2")
    link = tmp_path / "link.qcow2"
    link.symlink_to(image)

    assert convert(link, "qcow2") is None
    assert read(link) == b"\x01" * MIB


def test_r41_names_of_every_layer_start_at_that_layer(tmp_path: Path) -> None:
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
    qemu_io(create(tmp_path / "c" / "base.qcow2", "1M"), "write -P 3 0 1M")
    create(tmp_path / "b" / "middle.qcow2", "1M", "-b", "../c/base.qcow2", "-F", "qcow2")
    image = create(tmp_path / "a" / "top.qcow2", "1M", "-b", "../b/middle.qcow2", "-F", "qcow2")

    with open_chain(str(image), Policy(allow=(str(tmp_path),))) as chain:
        assert convert(image, "qcow2") == whole(active_disk(chain)) == b"\x03" * MIB


@pytest.mark.parametrize("name", ["./a:b.qcow2", "{directory}/a:b.qcow2", "file:{directory}/a:b.qcow2"])
def test_r42_a_colon_in_a_name_is_no_protocol_after_a_slash(tmp_path: Path, name: str) -> None:
    base = create(tmp_path / "a:b.qcow2", "1M")
    qemu_io(base, "write -P 1 0 1M")
    image = create(tmp_path / "i.qcow2", "1M", "-u", "-b", name.format(directory=tmp_path), "-F", "qcow2")

    assert check(image) == b"\x01" * MIB


@pytest.mark.parametrize(
    "name",
    [
        "a:b.qcow2",
        "nbd://host/export",
        "nbd:unix:/run/socket",
        "https://host/image",
        "ssh://host/image",
        "rbd:pool/image",
        "iscsi://host/target/0",
        "nvme://0000:01:00.0/1",
        "fat:/etc",
        'json:{"driver":"nbd","host":"host"}',
    ],
)
def test_r42_r43_a_protocol_is_refused_by_name_and_never_taken_for_a_path(tmp_path: Path, name: str) -> None:
    """Even where a file of that name is there; QEMU cannot open these either."""
    if "/" not in name:
        create(tmp_path / name, "1M")
    image = create(tmp_path / "i.qcow2", "1M", "-u", "-b", name, "-F", "raw")

    with pytest.raises(
        (UnsupportedImage, GateRefused), match=r"not supported|it lies outside the folders of the image's"
    ):
        open_chain(str(image), Policy())


@pytest.mark.parametrize("length", [1_000_003, 65536, 512, 1])
def test_r46_a_backing_file_that_is_shorter_ends_in_zeros(tmp_path: Path, length: int) -> None:
    base = tmp_path / "short.raw"
    base.write_bytes(b"\xaa" * length)
    image = create(tmp_path / "i.qcow2", "4M", "-b", "short.raw", "-F", "raw")
    qemu_io(image, "write -P 1 960k 2k", "write -P 2 3M 1k")

    check(image)


def test_r46_each_layer_cuts_what_lies_below_it(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "4M")
    qemu_io(base, "write -P 1 0 4M")
    create(tmp_path / "middle.qcow2", "1M", "-b", "base.qcow2", "-F", "qcow2")
    image = create(tmp_path / "top.qcow2", "4M", "-b", "middle.qcow2", "-F", "qcow2")

    assert b"\x01" * MIB + bytes(3 * MIB) == check(image)


def test_r47_a_longer_backing_file_is_cut(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "4M")
    qemu_io(base, "write -P 1 0 4M")
    image = create(tmp_path / "top.qcow2", 1000 * 512, "-b", "base.qcow2", "-F", "qcow2")

    assert check(image) == b"\x01" * 512_000


def test_r45_the_recorded_format_wins_over_what_the_bytes_look_like(tmp_path: Path) -> None:
    create(tmp_path / "base.qcow2", "4M")
    image = create(tmp_path / "top.qcow2", 64 * KIB, "-b", "base.qcow2", "-F", "raw")

    assert check(image)[:4] == b"QFI\xfb"


@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
def test_r45_a_format_that_nobody_recorded_is_found_and_told(tmp_path: Path, base_format: str) -> None:
    base = tmp_path / "base"
    qemu("qemu-img", "create", "-q", "-f", base_format, base, "1M")
    qemu_io(base, "write -P 4 0 1M", image_format=base_format)
    image = create(tmp_path / "top.qcow2", "1M", "-b", "base", "-F", base_format)
    with image.open("r+b") as file:  # old tools wrote none: give the extension a type that nobody knows
        data = file.read(4096)
        file.seek(data.index(struct.pack(">I", 0xE2792ACA)))
        file.write(b"what")

    with open_chain(str(image), Policy()) as chain:
        assert [f"records no format of its backing file: {base} looks {base_format}"] == [
            warning.partition(": ")[2] for warning in chain.warnings
        ]
    assert check(image) == b"\x04" * MIB


def test_r49_a_chain_that_is_based_on_itself_is_refused_by_name(tmp_path: Path) -> None:
    first, second = tmp_path / "first.qcow2", tmp_path / "second.qcow2"
    create(first, "1M")
    create(second, "1M", "-b", "first.qcow2", "-F", "qcow2")
    qemu("qemu-img", "rebase", "-u", "-b", "second.qcow2", "-F", "qcow2", first)

    with pytest.raises(CorruptImage, match=r"first\.qcow2: its backing chain never ends"):
        open_chain(str(first), Policy())
    said = qemu("qemu-img", "info", "--backing-chain", first, check=False)
    assert b"infinite loop" in said.stderr


def test_r50_every_layer_and_its_snapshots_are_points_with_their_own_lower_chain(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "2M")
    qemu_io(base, "write -P 1 0 1M")
    snapshot(base, "base-before")
    qemu_io(base, "write -P 2 0 512k")
    middle = create(tmp_path / "middle.qcow2", "1M", "-b", "base.qcow2", "-F", "qcow2")
    qemu_io(middle, "write -P 3 64k 64k")
    snapshot(middle, "middle-before")
    image = create(tmp_path / "top.qcow2", "2M", "-b", "middle.qcow2", "-F", "qcow2")
    qemu_io(image, "write -P 4 1M 64k")

    with open_chain(str(image), Policy()) as chain:
        found = points(chain)
        expected = [convert(image, "qcow2"), convert(middle, "qcow2"), state(middle, "1")]
        expected += [convert(base, "qcow2"), state(base, "1")]

        assert expected == [whole(open_point(chain, point)) for point in found]
        assert [("active", 0), ("layer", 1), ("snapshot", 1), ("layer", 2), ("snapshot", 2)] == [
            (point.kind, point.depth) for point in found
        ]


def test_r48_a_snapshot_of_an_overlay_reads_the_backing_file_of_today(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "2M")
    qemu_io(base, "write -P 1 0 2M")
    image = create(tmp_path / "top.qcow2", "2M", "-b", "base.qcow2", "-F", "qcow2")
    qemu_io(image, "write -P 2 0 64k")
    snapshot(image)
    qemu_io(base, "write -P 3 1M 1M")

    assert state(image, "1") == read(image, 1)
    assert read(image, 1)[MIB : MIB + 512] == b"\x03" * 512


def snapshot_points(chain: Chain) -> list[Point]:
    return [point for point in points(chain) if point.kind == "snapshot"]


@pytest.mark.parametrize(("resized", "words"), [("16M", []), ("4M", ["--shrink"])], ids=["grown", "shrunk"])
def test_r53_r54_a_snapshot_has_its_own_size_and_no_vm_state_in_it(
    tmp_path: Path, resized: str, words: list[str]
) -> None:
    """Trap 1: convert -l keeps the active size, and shows VM state as disk data."""
    image = create(tmp_path / "i.qcow2", "8M", options="cluster_size=4k")
    qemu_io(image, "write -P 0x11 0 8M", "write -b -P 0xbb 0 64k")
    qemu("qemu-img", "snapshot", "-c", "s8", image)
    qemu("qemu-img", "resize", "-q", *words, image, resized)

    with open_chain(str(image), Policy()) as chain:
        [point] = snapshot_points(chain)

        assert point.virtual_size == 8 * MIB
    assert b"\x11" * 8 * MIB == read(image, 1) == state(image, "1")


def test_r53_a_short_l1_table_leaves_the_rest_unallocated(tmp_path: Path) -> None:
    """iotest 029's case, forged: the snapshot's disk is larger than what its L1 table covers."""
    image = create(tmp_path / "i.qcow2", "64M", options="cluster_size=4k")
    qemu_io(image, "write -P 1 0 1M")
    snapshot(image)
    table = Tables(image).word(64)
    with image.open("r+b") as file:
        file.seek(table + 8)
        file.write(struct.pack(">I", 1))  # of 32 entries

    assert b"\x01" * MIB + bytes(63 * MIB) == read(image, 1)
    # Sizes are equal, so that -l is right.
    assert convert(image, "qcow2", "-l", "snapshot.id=1") == read(image, 1)


@pytest.mark.parametrize(
    ("offset", "entries"),
    [(512, 32), (1 << 63, 32), (4096 * 3 + 1, 32), (4096 * 3, (32 << 20) // 8 + 1)],
)
def test_r53_a_bad_l1_table_spoils_its_snapshot_and_no_other(tmp_path: Path, offset: int, entries: int) -> None:
    image = create(tmp_path / "i.qcow2", "64M", options="cluster_size=4k")
    qemu_io(image, "write -P 1 0 1M")
    snapshot(image, "one")
    snapshot(image, "two")
    with image.open("r+b") as file:
        file.seek(Tables(image).word(64))
        file.write(struct.pack(">QI", offset, entries))

    assert read(image, 0) == read(image, 2) == b"\x01" * MIB + bytes(63 * MIB)
    with pytest.raises((CorruptImage, ReadFault)):
        read(image, 1)
    with pytest.raises(CannotRevert):
        state(image, "1")


def test_r53_a_snapshots_l1_table_past_the_end_is_an_error_where_qemu_reads_zeros(tmp_path: Path) -> None:
    """The same deviation on purpose as for the active table."""
    image = create(tmp_path / "i.qcow2", "1M")
    qemu_io(image, "write -P 1 0 1M")
    snapshot(image)
    Tables(image).word(Tables(image).word(64), 1 << 50)

    assert Content(convert(image, "qcow2", "-l", "snapshot.id=1") or b"") == bytes(MIB)
    with pytest.raises(ReadFault, match="L1 table lies past the end of the file"):
        read(image, 1)


def test_r54_vm_state_at_1_tib_is_no_disk_data(tmp_path: Path) -> None:
    """iotest 029: an L1 table that is much longer than the disk needs."""
    image = create(tmp_path / "i.qcow2", "8M")
    qemu_io(image, "write -P 1 0 8M", "write -b -P 0xbb 1T 512")
    snapshot(image)
    qemu_io(image, "write -P 2 0 1M")

    with open_chain(str(image), Policy()) as chain:
        active, point = points(chain)

        assert (8 * MIB, 8 * MIB) == (active.virtual_size, point.virtual_size)
        assert point.entry is not None
        assert point.entry.l1_entries > 2048
    assert b"\x01" * 8 * MIB == read(image, 1) == state(image, "1")
    assert check(image)[:512] == b"\x02" * 512


def test_r55_bit_63_of_a_snapshots_entries_means_nothing(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "8M")
    qemu_io(image, "write -P 1 0 1M")
    snapshot(image)
    tables = Tables(image)
    tables.l1_offset = tables.word(tables.word(64))  # of the snapshot
    tables.l1(0, tables.l1(0) ^ COPIED)
    for cluster in range(16):
        tables.l2(cluster, tables.l2(cluster) ^ (COPIED if cluster % 2 else 0))

    assert b"\x01" * MIB + bytes(7 * MIB) == read(image, 1)


def told_by_qemu(image: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(qemu("qemu-img", "info", "--output=json", image).stdout)["snapshots"]
    return found


def test_r51_r56_names_of_every_length_and_kind_are_kept_in_order(tmp_path: Path) -> None:
    """Entries are padded to 8 bytes; names repeat, look like ids, or like paths."""
    names = ["x" * length for length in range(10)] + ["2", "2", "one", "one", "two/../x y", "..", "ü", "x" * 255]
    image = create(tmp_path / "i.qcow2", "1M", options="cluster_size=512")
    for name in names:
        snapshot(image, name)
    qemu("qemu-img", "snapshot", "-d", "xxx", image)  # ids have gaps

    with open_chain(str(image), Policy()) as chain:
        found = [point for point in points(chain) if point.entry]

        assert [(told["id"], told["name"]) for told in told_by_qemu(image)] == [
            ((point.snapshot_id or b"").decode(), (point.snapshot_name or b"").decode()) for point in found
        ]
    assert len(found) == len(names) - 1


def test_r56_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "1M")
    snapshot(image, os.fsdecode(b"\xff\xfe"))

    with open_chain(str(image), Policy()) as chain:
        assert points(chain)[1].snapshot_name == b"\xff\xfe"


def test_r54_r57_date_clock_and_vm_state_size_are_qemus(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "1M")
    snapshot(image)
    table = Tables(image).word(64)
    with image.open("r+b") as file:
        file.seek(table + 16)
        file.write(struct.pack(">IIQI", 1_700_000_001, 999_999_999, 3_600_000_000_007, 77))
        file.seek(table + 40)
        file.write(struct.pack(">Q", 5 << 32))  # replaces the 77

    with open_chain(str(image), Policy()) as chain:
        point = points(chain)[1]
        [told] = told_by_qemu(image)

        assert told["date-sec"] * 10**9 + told["date-nsec"] == point.date_ns == 1_700_000_001_999_999_999
        assert told["vm-clock-sec"] * 10**9 + told["vm-clock-nsec"] == point.vm_clock_ns == 3_600_000_000_007
        assert told["vm-state-size"] == point.vm_state_size == 5 << 32


@pytest.mark.parametrize("extra", [0, 8, 16, 24])
def test_r52_version_2_snapshots_with_less_extra_data(tmp_path: Path, extra: int) -> None:
    image = create(tmp_path / "i.qcow2", "4M", options="compat=0.10")
    qemu_io(image, "write -P 1 0 1M")
    snapshot(image)
    data = bytearray(image.read_bytes())
    table = struct.unpack_from(">Q", data, 64)[0]
    names = data[table + 40 + struct.unpack_from(">I", data, table + 36)[0] :][:4]
    struct.pack_into(">I", data, table + 36, extra)
    kept = data[table + 40 : table + 40 + extra]
    data[table + 40 : table + 100] = (kept + names).ljust(60, b"\0")
    image.write_bytes(data)

    assert len(read(image, 1)) == 4 * MIB
    assert state(image, "1") == read(image, 1)


def test_r2_version_2_has_extensions_too(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "1M")
    qemu_io(base, "write -P 4 0 1M")
    image = create(tmp_path / "i.qcow2", "1M", "-b", "base.qcow2", "-F", "raw", options="compat=0.10")

    assert check(image)[:4] == b"QFI\xfb"


@pytest.mark.parametrize("size", [1_000_448, 512, 65536 + 512])
def test_r5_sizes_that_end_inside_a_cluster(tmp_path: Path, size: int) -> None:
    image = create(tmp_path / "i.qcow2", size)
    qemu_io(image, f"write -P 8 {size - 512} 512")

    assert size == len(check(image))


def test_r5_a_size_that_is_not_whole_sectors_is_cut_to_them(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", 1_000_448)
    qemu_io(image, "write -P 8 0 1000448")
    Tables(image).word(24, 1_000_003)

    assert len(check(image)) == 999_936


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_r13_every_refcount_width(tmp_path: Path, bits: int) -> None:
    image = create(tmp_path / "i.qcow2", "2M", options=f"refcount_bits={bits}")
    qemu_io(image, "write -P 1 0 1M")

    check(image)


def test_a_chain_of_40_layers(tmp_path: Path) -> None:
    create(tmp_path / "layer0.qcow2", "4M")
    for number in range(1, 40):
        image = tmp_path / f"layer{number}.qcow2"
        create(image, "4M", "-b", f"layer{number - 1}.qcow2", "-F", "qcow2")
        qemu_io(image, f"write -P {number} {number * 100}k 10k")

    check(image)


def test_a_raw_image_that_the_person_calls_raw(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(1_000_003))

    assert convert(image, "raw") == read(image, image_format="raw")


def test_json_names_with_a_window(tmp_path: Path) -> None:
    """R44: the raw driver's offset and size."""
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(4 * MIB))
    name = (
        '{"driver":"raw","offset":1048576,"size":1048576,"file":{"driver":"file","filename":"%s"}}' % base  # noqa: UP031
    )
    image = create(tmp_path / "i.qcow2", "2M", "-u", "-b", f"json:{name}", "-F", "raw")

    assert base.read_bytes()[MIB : 2 * MIB] + bytes(MIB) == check(image)

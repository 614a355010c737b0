"""Formats and chains, one scenario for each rule of reading, with QEMU's answer."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowfs.chain import Chain, open_chain
from qcowfs.errors import ReadFault
from qcowfs.gate import Policy
from qcowfs.snapshot import Point, points
from tests.support import lacking, need
from tests.support.images import convert, qemu, reverted
from tests.support.reader import open_point, read_all
from tests.support.tables import Tables

KIB, MIB = 1 << 10, 1 << 20


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("qemu-img", "qemu-io")


def create(path: Path, size: int | str, *words: str, options: str = "compat=1.1") -> Path:
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *words, path, str(size))
    return path


def write(path: Path, *commands: str, image_format: str = "qcow2") -> None:
    qemu("qemu-io", "-f", image_format, *[word for command in commands for word in ("-c", command)], path)


def read(image: Path | str, select: int = 0, *, image_format: str | None = None) -> bytes:
    """Return what qcowfs reads of the point number `select` of `image`."""
    with open_chain(str(image), Policy(), image_format=image_format) as chain:
        return read_all(open_point(chain, points(chain)[select]))


def check(image: Path, image_format: str = "qcow2") -> bytes:
    """The active state is what QEMU reads; returns it."""
    expected = convert(image, image_format)
    assert expected is not None
    assert expected == read(image)
    return expected


@pytest.mark.parametrize("bits", range(9, 22))
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_r4_every_cluster_size_in_both_versions(tmp_path: Path, bits: int, compat: str) -> None:
    image = create(tmp_path / "i.qcow2", "5M", options=f"compat={compat},cluster_size={1 << bits}")
    write(image, "write -P 1 1000448 100k", "write -P 2 4M 1M")

    check(image)


@pytest.mark.parametrize("bits", range(14, 22))
def test_r28_every_cluster_size_with_extended_l2(tmp_path: Path, bits: int) -> None:
    image = create(tmp_path / "i.qcow2", "9M", options=f"extended_l2=on,cluster_size={1 << bits}")
    write(image, "write -P 1 512k 3k", "write -z 1M 20k", "write -P 2 8M 512", "discard 513k 1k")

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


def test_r10_a_dirty_image_is_read_and_left_dirty(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "4M", options="lazy_refcounts=on")
    command = ["qemu-io", "-f", "qcow2", "-c", "write -P 5 0 1M", "-c", "abort", str(image)]
    subprocess.run(command, capture_output=True, timeout=60)
    before = image.read_bytes()

    with open_chain(str(image), Policy()) as chain:
        assert any("not closed cleanly" in warning for warning in chain.warnings)
        assert read_all(open_point(chain, points(chain)[0]))[:MIB] == b"\x05" * MIB
    assert before == image.read_bytes()


def test_r11_an_image_marked_corrupt_is_read_with_a_warning(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "4M")
    write(image, "write -P 6 1M 1M")
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
    write(base, "write -P 1 0 4M")
    image = tmp_path / "i.qcow"
    qemu("qemu-img", "create", "-q", "-f", "qcow", "-b", "base.qcow2", "-F", "qcow2", image, "4M")
    write(image, "write -P 2 1M 1M", image_format="qcow")

    check(image, "qcow")


def test_r21_zeros_hide_the_backing_file(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "4M")
    write(base, "write -P 1 0 4M")
    image = create(tmp_path / "i.qcow2", "4M", "-b", "base.qcow2", "-F", "qcow2")
    write(image, "write -z 1M 1M", "write -P 3 2M 64k", "write -z 2M 64k")

    assert bytes(MIB) == check(image)[MIB : 2 * MIB]


@pytest.mark.parametrize("mode", ["metadata", "falloc", "full"])
@pytest.mark.parametrize("extended", ["on", "off"])
def test_r22_preallocated_images(tmp_path: Path, mode: str, extended: str) -> None:
    image = create(tmp_path / "i.qcow2", "4M", options=f"preallocation={mode},extended_l2={extended}")
    write(image, "write -P 1 1M 10k")

    check(image)


@pytest.mark.expect_warnings
def test_r30_a_cut_file_reads_as_qemu_reads_it_but_for_its_tables(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "4M")
    write(image, "write -P 1 0 4M")
    os.truncate(image, image.stat().st_size - 30000)

    assert bytes(30000) == check(image)[-30000:]


def test_r30_a_cut_l2_table_is_an_error_where_qemu_reads_zeros(tmp_path: Path) -> None:
    """A deviation on purpose: QEMU calls the whole disk empty."""
    image = create(tmp_path / "i.qcow2", "4M")
    write(image, "write -P 1 0 4M")
    os.truncate(image, Tables(image).l1(0) & ((1 << 56) - 1))

    assert bytes(4 * MIB) == convert(image, "qcow2")
    with pytest.raises(ReadFault, match="truncated"):
        read(image)


def test_r31_trailing_garbage_means_nothing(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", "4M")
    write(image, "write -P 1 1M 1M")
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
    write(image, "write -P 7 0 3M")
    qemu("qemu-img", "snapshot", "-c", "one", image)
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
            assert base.read_bytes() == read_all(open_point(chain, points(chain)[0]))


@pytest.mark.parametrize("raw", ["on", "off"])
def test_r38_r39_external_data_files(tmp_path: Path, raw: str) -> None:
    data = tmp_path / "data.bin"
    image = create(tmp_path / "i.qcow2", "4M", options=f"data_file={data},data_file_raw={raw}")
    write(image, "write -P 1 1M 1M", "write -z 1500k 64k", "discard 1700k 64k")

    expected = check(image)
    if raw == "on":
        assert expected == data.read_bytes()


def test_r40_a_relative_data_file_lies_beside_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU looks in the working directory only."""
    monkeypatch.chdir(tmp_path)
    image = create(Path("i.qcow2"), "1M", options="data_file=data.bin")
    write(image, "write -P 9 0 1M")
    monkeypatch.chdir("/")

    assert read(tmp_path / "i.qcow2") == b"\x09" * MIB


@pytest.mark.parametrize("length", [1_000_003, 65536, 512, 1])
def test_r46_a_backing_file_that_is_shorter_ends_in_zeros(tmp_path: Path, length: int) -> None:
    base = tmp_path / "short.raw"
    base.write_bytes(b"\xaa" * length)
    image = create(tmp_path / "i.qcow2", "4M", "-b", "short.raw", "-F", "raw")
    write(image, "write -P 1 960k 2k", "write -P 2 3M 1k")

    check(image)


def test_r46_each_layer_cuts_what_lies_below_it(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "4M")
    write(base, "write -P 1 0 4M")
    create(tmp_path / "middle.qcow2", "1M", "-b", "base.qcow2", "-F", "qcow2")
    image = create(tmp_path / "top.qcow2", "4M", "-b", "middle.qcow2", "-F", "qcow2")

    assert b"\x01" * MIB + bytes(3 * MIB) == check(image)


def test_r47_a_longer_backing_file_is_cut(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "4M")
    write(base, "write -P 1 0 4M")
    image = create(tmp_path / "top.qcow2", 1000 * 512, "-b", "base.qcow2", "-F", "qcow2")

    assert check(image) == b"\x01" * 512_000


def test_r45_the_recorded_format_wins_over_what_the_bytes_look_like(tmp_path: Path) -> None:
    create(tmp_path / "base.qcow2", "4M")
    image = create(tmp_path / "top.qcow2", 64 * KIB, "-b", "base.qcow2", "-F", "raw")

    assert check(image)[:4] == b"QFI\xfb"


def test_r48_a_snapshot_of_an_overlay_reads_the_backing_file_of_today(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "2M")
    write(base, "write -P 1 0 2M")
    image = create(tmp_path / "top.qcow2", "2M", "-b", "base.qcow2", "-F", "qcow2")
    write(image, "write -P 2 0 64k")
    qemu("qemu-img", "snapshot", "-c", "one", image)
    write(base, "write -P 3 1M 1M")

    assert reverted(image, 0) == read(image, 1)
    assert read(image, 1)[MIB : MIB + 512] == b"\x03" * 512


def snapshot_points(chain: Chain) -> list[Point]:
    return [point for point in points(chain) if point.kind == "snapshot"]


@pytest.mark.parametrize(("resized", "words"), [("16M", []), ("4M", ["--shrink"])], ids=["grown", "shrunk"])
def test_r53_r54_a_snapshot_has_its_own_size_and_no_vm_state_in_it(
    tmp_path: Path, resized: str, words: list[str]
) -> None:
    """Trap 1: convert -l keeps the active size, and shows VM state as disk data."""
    image = create(tmp_path / "i.qcow2", "8M", options="cluster_size=4k")
    write(image, "write -P 0x11 0 8M", "write -b -P 0xbb 0 64k")
    qemu("qemu-img", "snapshot", "-c", "s8", image)
    qemu("qemu-img", "resize", "-q", *words, image, resized)

    with open_chain(str(image), Policy()) as chain:
        [point] = snapshot_points(chain)

        assert point.virtual_size == 8 * MIB
    assert b"\x11" * 8 * MIB == read(image, 1) == reverted(image, 0)


def test_r53_a_short_l1_table_leaves_the_rest_unallocated(tmp_path: Path) -> None:
    """iotest 029's case, forged: the snapshot's disk is larger than what its L1 table covers."""
    image = create(tmp_path / "i.qcow2", "64M", options="cluster_size=4k")
    write(image, "write -P 1 0 1M")
    qemu("qemu-img", "snapshot", "-c", "one", image)
    table = struct.unpack_from(">Q", image.read_bytes(), 64)[0]
    with image.open("r+b") as file:
        file.seek(table + 8)
        file.write(struct.pack(">I", 1))  # of 32 entries

    assert b"\x01" * MIB + bytes(63 * MIB) == read(image, 1)


@pytest.mark.parametrize("extra", [0, 8, 16, 24])
def test_r52_version_2_snapshots_with_less_extra_data(tmp_path: Path, extra: int) -> None:
    image = create(tmp_path / "i.qcow2", "4M", options="compat=0.10")
    write(image, "write -P 1 0 1M")
    qemu("qemu-img", "snapshot", "-c", "one", image)
    data = bytearray(image.read_bytes())
    table = struct.unpack_from(">Q", data, 64)[0]
    names = data[table + 40 + struct.unpack_from(">I", data, table + 36)[0] :][:4]
    struct.pack_into(">I", data, table + 36, extra)
    kept = data[table + 40 : table + 40 + extra]
    data[table + 40 : table + 100] = (kept + names).ljust(60, b"\0")
    image.write_bytes(data)

    assert len(read(image, 1)) == 4 * MIB
    assert reverted(image, 0) == read(image, 1)


def test_r2_version_2_has_extensions_too(tmp_path: Path) -> None:
    base = create(tmp_path / "base.qcow2", "1M")
    write(base, "write -P 4 0 1M")
    image = create(tmp_path / "i.qcow2", "1M", "-b", "base.qcow2", "-F", "raw", options="compat=0.10")

    assert check(image)[:4] == b"QFI\xfb"


@pytest.mark.parametrize("size", [1_000_448, 512, 65536 + 512])
def test_r5_sizes_that_end_inside_a_cluster(tmp_path: Path, size: int) -> None:
    image = create(tmp_path / "i.qcow2", size)
    write(image, f"write -P 8 {size - 512} 512")

    assert size == len(check(image))


def test_r5_a_size_that_is_not_whole_sectors_is_cut_to_them(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", 1_000_448)
    write(image, "write -P 8 0 1000448")
    Tables(image).word(24, 1_000_003)

    assert len(check(image)) == 999_936


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16, 32, 64])
def test_r13_every_refcount_width(tmp_path: Path, bits: int) -> None:
    image = create(tmp_path / "i.qcow2", "2M", options=f"refcount_bits={bits}")
    write(image, "write -P 1 0 1M")

    check(image)


def test_a_chain_of_40_layers(tmp_path: Path) -> None:
    create(tmp_path / "layer0.qcow2", "4M")
    for number in range(1, 40):
        image = tmp_path / f"layer{number}.qcow2"
        create(image, "4M", "-b", f"layer{number - 1}.qcow2", "-F", "qcow2")
        write(image, f"write -P {number} {number * 100}k 10k")

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

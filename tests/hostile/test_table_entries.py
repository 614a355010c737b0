"""L1 and L2 entries at and around each of their rules: right data, or EIO for that range and no other.

Chosen scenarios; where QEMU has an answer it is asked for it. Each test has five seconds: a hang is a failure. Every
single bit is in test_entry_bits.py, random entries in test_random_tables.py.
"""

from __future__ import annotations

import errno
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs._core import Disk
from qcowfs.chain import open_chain
from qcowfs.errors import ReadFault
from qcowfs.gate import Policy
from tests.support import need
from tests.support.content import EIO
from tests.support.qemu import qemu, qemu_reads, qemu_says
from tests.support.tables import COMPRESSED, COPIED, Tables, active_disk, qcowfs_says

pytestmark = pytest.mark.timeout(5, method="signal")

CLUSTER = 65536
GOOD, BAD, AFTER = 0, 1, 2  # guest clusters: written, the one that is edited, written


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return made(tmp_path)


def made(folder: Path, options: str = "compat=1.1") -> Path:
    """An image whose clusters 0 to 2 hold 0x11, 0x22, 0x33."""
    need("qemu-img", "qemu-io")
    path = folder / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size=64k,{options}", path, "1G")
    writes = [f"write -P {0x11 * (place + 1)} {place * CLUSTER} {CLUSTER}" for place in range(3)]
    qemu("qemu-io", "-f", "qcow2", *[word for write in writes for word in ("-c", write)], path)
    return path


def check(path: Path, expected: bytes | str, *, ask_qemu: bool = True) -> None:
    """Cluster BAD is `expected`, for QEMU too; its neighbours are as they were."""
    with open_chain(str(path), Policy()) as chain:
        disk = active_disk(chain)
        said = qcowfs_says(disk, BAD * CLUSTER, CLUSTER)
        neighbours = [qcowfs_says(disk, place * CLUSTER, CLUSTER) for place in (GOOD, AFTER)]

    assert expected == said
    assert neighbours == [b"\x11" * CLUSTER, b"\x33" * CLUSTER]
    if ask_qemu:
        assert qemu_says(path, BAD * CLUSTER, expected)


@pytest.mark.parametrize("bit", range(56, 62))
def test_r19_reserved_bits_of_an_l2_entry_are_ignored(image: Path, bit: int) -> None:
    tables = Tables(image)
    tables.l2(BAD, tables.l2(BAD) | 1 << bit)

    check(image, b"\x22" * CLUSTER)


def test_r55_bit_63_says_nothing_of_the_data(image: Path) -> None:
    tables = Tables(image)
    tables.l2(BAD, tables.l2(BAD) ^ COPIED)

    check(image, b"\x22" * CLUSTER)


@pytest.mark.parametrize("bit", range(9, 16))
def test_r19_an_unaligned_host_cluster_is_an_error_for_that_cluster_alone(image: Path, bit: int) -> None:
    tables = Tables(image)
    tables.l2(BAD, tables.l2(BAD) | 1 << bit)

    check(image, EIO)


@pytest.mark.parametrize("bit", range(1, 9))
def test_r19_low_bits_of_an_l2_entry_are_ignored(image: Path, bit: int) -> None:
    tables = Tables(image)
    tables.l2(BAD, tables.l2(BAD) | 1 << bit)

    check(image, b"\x22" * CLUSTER)


def test_r19_the_zero_flag_wins_over_the_host_cluster(image: Path) -> None:
    tables = Tables(image)
    tables.l2(BAD, tables.l2(BAD) | 1)

    check(image, bytes(CLUSTER))


def test_r19_a_preallocated_zero_cluster_is_never_read(image: Path) -> None:
    """Its host cluster lies past the end of the file, where reading would be noticed."""
    tables = Tables(image)
    tables.l2(BAD, (1 << 50) | 1)

    check(image, bytes(CLUSTER))


def test_r20_the_zero_flag_in_version_2_is_an_error(tmp_path: Path) -> None:
    path = made(tmp_path, "compat=0.10")
    tables = Tables(path)
    tables.l2(BAD, tables.l2(BAD) | 1)

    check(path, EIO)


@pytest.mark.parametrize("entry", [0, COPIED, 0x1FE, 1 << 57])
def test_r19_an_entry_without_an_offset_is_unallocated(image: Path, entry: int) -> None:
    Tables(image).l2(BAD, entry)

    check(image, bytes(CLUSTER))


@pytest.mark.parametrize("place", [0, 1 << 16])
def test_an_l2_entry_may_point_at_the_header_or_a_table_and_nothing_hangs(image: Path, place: int) -> None:
    """R61: QEMU reads the bytes that are there; so does this."""
    tables = Tables(image)
    tables.l2(BAD, COPIED | (place or 1 << 16))
    expected = image.read_bytes()[place or 1 << 16 :][:CLUSTER]

    with open_chain(str(image), Policy()) as chain:
        assert expected == qcowfs_says(active_disk(chain), BAD * CLUSTER, CLUSTER)


def test_r18_an_l1_entry_that_is_not_aligned_is_an_error_for_its_range_alone(image: Path) -> None:
    tables = Tables(image)
    tables.l1(1, tables.l1(0) + 512)
    reach = CLUSTER // 8 * CLUSTER

    with open_chain(str(image), Policy()) as chain:
        disk = active_disk(chain)

        assert qcowfs_says(disk, reach, 512) == EIO
        assert disk.pread(0, 512) == b"\x11" * 512
    assert qemu_says(image, reach, EIO)


def test_r18_reserved_bits_of_an_l1_entry_are_ignored(image: Path) -> None:
    tables = Tables(image)
    tables.l1(0, tables.l1(0) | 0x7F << 56 | 0x1FF)

    check(image, b"\x22" * CLUSTER)


def test_r61_an_l2_table_that_is_the_l1_table_itself_ends(image: Path) -> None:
    tables = Tables(image)
    tables.l1(1, tables.l1_offset)
    reach = CLUSTER // 8 * CLUSTER

    with open_chain(str(image), Policy()) as chain:
        disk = active_disk(chain)
        # The L1 entries, taken for L2 entries, name the L2 table and the L1 table as data.
        assert image.read_bytes()[tables.l1(0) & (COPIED - 1) :][:512] == disk.pread(reach, 512)
        assert len(disk.extents(0, disk.virtual_size, 1000)) < 1000


def test_r30_an_l2_table_past_the_end_is_an_error_not_zeros(image: Path) -> None:
    """QEMU reads zeros here, and the whole disk of a truncated download looks empty: a deviation on purpose."""
    tables = Tables(image)
    tables.l1(1, 1 << 40)
    reach = CLUSTER // 8 * CLUSTER

    with open_chain(str(image), Policy()) as chain:
        disk = active_disk(chain)
        with pytest.raises(ReadFault, match="past the end of the file") as caught:
            disk.pread(reach, 512)

        assert caught.value.errno == errno.EIO
        assert disk.pread(CLUSTER, 512) == b"\x22" * 512


@pytest.mark.expect_warnings
def test_r30_data_past_the_end_reads_as_zeros_with_one_warning(image: Path, caplog: pytest.LogCaptureFixture) -> None:
    Tables(image).l2(BAD, COPIED | 1 << 50)

    check(image, bytes(CLUSTER))
    assert sum("past the end of the file" in record.getMessage() for record in caplog.records) == 1


def test_r30_an_l1_table_past_the_end_is_an_error_not_an_empty_disk(image: Path) -> None:
    """QEMU reads it as full of zeros: the same deviation on purpose."""
    tables = Tables(image)
    tables.word(40, 1 << 40)

    assert qemu_says(image, 0, bytes(512))
    with (
        open_chain(str(image), Policy()) as chain,
        pytest.raises(ReadFault, match="L1 table lies past the end") as caught,
    ):
        active_disk(chain).pread(0, 512)
    assert caught.value.errno == errno.EIO


def test_r30_an_l1_table_that_is_cut_is_an_error_for_what_is_missing(image: Path) -> None:
    tables = Tables(image)
    reach = CLUSTER // 8 * CLUSTER
    new = tables.append(tables.path.read_bytes()[tables.l1_offset :][:8], CLUSTER)  # 1 of 2 entries, and the file ends
    tables.word(40, new)

    with open_chain(str(image), Policy()) as chain:
        disk = active_disk(chain)

        assert disk.pread(0, 512) == b"\x11" * 512
        assert qcowfs_says(disk, reach, 512) == EIO
        assert qcowfs_says(disk, reach - 512, 1024) == EIO


def test_r30_an_l2_table_that_is_cut_is_an_error_for_what_is_missing(image: Path) -> None:
    tables = Tables(image)
    table = tables.l1(0) & (COPIED - 1)
    tables.l1(0, COPIED | tables.append(image.read_bytes()[table : table + 20], CLUSTER))  # ends inside the third entry

    with open_chain(str(image), Policy()) as chain:
        disk = active_disk(chain)

        assert qcowfs_says(disk, 0, 2 * CLUSTER) == b"\x11" * CLUSTER + b"\x22" * CLUSTER
        assert qcowfs_says(disk, AFTER * CLUSTER, 512) == EIO


@pytest.mark.parametrize("target", ["header", "l1", "data", "refcounts"])
def test_r61_an_l1_entry_may_name_anything_as_an_l2_table(image: Path, target: str) -> None:
    """Whatever lies there is read as entries: wrong ones are EIO, right ones are data, for QEMU too."""
    tables = Tables(image)
    offset = {
        "header": 1 << 63,  # host offset 0 means no table
        "l1": tables.l1_offset,
        "data": tables.l2(GOOD) & (COPIED - 1),
        "refcounts": tables.word(48),
    }[target]
    tables.l1(1, offset)
    reach = CLUSTER // 8 * CLUSTER
    ranges = [(reach + number * CLUSTER, CLUSTER) for number in range(4)]

    with open_chain(str(image), Policy()) as chain:
        disk = active_disk(chain)

        assert qemu_reads(image, ranges) == [qcowfs_says(disk, *piece) for piece in ranges]
        assert qcowfs_says(disk, BAD * CLUSTER, CLUSTER) == b"\x22" * CLUSTER


def test_r61_two_l1_entries_may_share_a_table(image: Path) -> None:
    """Overlapping tables: QEMU only minds when it writes."""
    tables = Tables(image)
    tables.l1(1, tables.l1(0))
    reach = CLUSTER // 8 * CLUSTER

    with open_chain(str(image), Policy()) as chain:
        assert qcowfs_says(active_disk(chain), reach, 3 * CLUSTER) == qcowfs_says(active_disk(chain), 0, 3 * CLUSTER)
    assert qemu_says(image, reach + CLUSTER, b"\x22" * CLUSTER)


def test_r61_two_l2_entries_may_share_a_cluster(image: Path) -> None:
    tables = Tables(image)
    tables.l2(BAD, tables.l2(AFTER))

    check(image, b"\x33" * CLUSTER)


def test_a_read_over_a_bad_cluster_is_an_error_and_does_not_shorten(image: Path) -> None:
    tables = Tables(image)
    tables.l2(BAD, tables.l2(BAD) | 512)

    with open_chain(str(image), Policy()) as chain, pytest.raises(ReadFault) as caught:
        active_disk(chain).pread(CLUSTER - 512, 1024)
    assert caught.value.errno == errno.EIO
    assert caught.value.guest_offset == BAD * CLUSTER
    assert caught.value.depth == 0
    assert str(image) in str(caught.value)


def deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, zlib.DEFLATED, -12)
    return compressor.compress(data) + compressor.flush()


def test_r23_the_compressed_bit_goes_before_all_others(image: Path) -> None:
    """R19 and trap 3: bit 0 of a compressed entry is the lowest bit of an offset, not the zero flag."""
    tables = Tables(image)
    stream = deflate(b"\x44" * CLUSTER)
    offset = tables.append(b"?" + stream) + 1
    tables.l2(BAD, tables.compressed(offset, len(stream)))

    check(image, b"\x44" * CLUSTER)


def test_r24_a_stream_may_run_past_the_end_of_the_file(image: Path) -> None:
    tables = Tables(image)
    stream = deflate(b"\x45" * CLUSTER)
    tables.l2(BAD, tables.compressed(tables.append(stream), 8192))

    check(image, b"\x45" * CLUSTER)


def test_r24_a_stream_may_be_longer_than_its_cluster(image: Path) -> None:
    """Stored blocks, with junk after them that the descriptor includes."""
    tables = Tables(image)
    compressor = zlib.compressobj(0, zlib.DEFLATED, -12)
    stream = compressor.compress(b"\x46" * CLUSTER) + compressor.flush() + b"junk" * 200
    tables.l2(BAD, tables.compressed(tables.append(stream), len(stream)))

    assert len(stream) > CLUSTER
    check(image, b"\x46" * CLUSTER)


def test_r25_a_stream_that_goes_on_after_the_cluster_is_full_is_right(image: Path) -> None:
    tables = Tables(image)
    stream = deflate(b"\x47" * (CLUSTER + 1))
    tables.l2(BAD, tables.compressed(tables.append(stream), len(stream)))

    check(image, b"\x47" * CLUSTER)


def test_r25_a_stream_without_its_end_is_right_if_the_cluster_is_full(image: Path) -> None:
    tables = Tables(image)
    compressor = zlib.compressobj(9, zlib.DEFLATED, -12)
    stream = compressor.compress(b"\x48" * CLUSTER) + compressor.flush(zlib.Z_SYNC_FLUSH)
    padding = (
        -len(stream) % 512
    )  # before it: what follows a stream in its last sector would be taken for its next block
    tables.l2(BAD, tables.compressed(tables.append(bytes(padding) + stream) + padding, len(stream)))

    check(image, b"\x48" * CLUSTER)


@pytest.mark.parametrize(
    "stream",
    [b"", b"\xff" * 512, deflate(b"\x49" * (CLUSTER - 1)), b"\x00" * 512, deflate(b"\x49" * CLUSTER)[:20]],
    ids=["nothing", "garbage", "too short", "zeros", "cut"],
)
def test_r25_a_stream_that_does_not_fill_the_cluster_is_an_error(image: Path, stream: bytes) -> None:
    tables = Tables(image)
    offset = tables.append(stream.ljust(512, b"\xff"))
    tables.l2(BAD, tables.compressed(offset, 512))

    check(image, EIO)


def test_r24_a_stream_wholly_past_the_end_is_an_error(image: Path) -> None:
    tables = Tables(image)
    tables.l2(BAD, tables.compressed(1 << 45, 4096))

    check(image, EIO)


def test_a_bomb_fills_one_cluster_and_no_more(image: Path) -> None:
    tables = Tables(image)
    stream = deflate(bytes(64 << 20))
    tables.l2(BAD, tables.compressed(tables.append(stream), len(stream)))

    check(image, bytes(CLUSTER))


@pytest.mark.parametrize(
    "block", [b"\x00\x00\x00\xff\xff", b"\x02\x00"], ids=["empty stored blocks", "bits that end no block"]
)
def test_r25_a_stream_that_goes_on_without_output_ends(tmp_path: Path, block: bytes) -> None:
    """As long as a descriptor can say: 4 MiB of input for one cluster of 2 MiB."""
    path = made(tmp_path, "cluster_size=2M")
    tables = Tables(path)
    length = 8192 * 512
    tables.l2(BAD, tables.compressed(tables.append((block * length)[:length]), length))

    with open_chain(str(path), Policy()) as chain:
        assert qcowfs_says(active_disk(chain), BAD * tables.cluster_size, 512) == EIO
    assert qemu_says(path, BAD * tables.cluster_size, EIO)


@pytest.mark.parametrize("distance", [4096, 4097, 32000])
def test_r25_a_stream_that_looks_back_further_than_qemus_window(image: Path, distance: int) -> None:
    """QEMU's window has 4 KiB, but zlib sees all of the cluster, so that any distance within it is right."""
    generator = random.Random(distance)
    start = generator.randbytes(distance)
    content = (start * 20)[:CLUSTER]
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    stream = compressor.compress(content) + compressor.flush()
    tables = Tables(image)
    tables.l2(BAD, tables.compressed(tables.append(stream), len(stream)))

    assert len(stream) < CLUSTER
    with open_chain(str(image), Policy()) as chain:
        said = qcowfs_says(active_disk(chain), BAD * CLUSTER, CLUSTER)
    assert said == content
    assert qemu_reads(image, [(BAD * CLUSTER, CLUSTER)]) == [content]


def zstd_frame(payload: bytes, window_descriptor: int | None = None) -> bytes:
    """A zstd frame of one raw block, written by hand: with a window of its own, or as a single segment."""
    header = b"\x28\xb5\x2f\xfd"
    if window_descriptor is None:
        header += b"\xa0" + len(payload).to_bytes(4, "little")  # single segment, 4 bytes of content size
    else:
        header += b"\x00" + bytes([window_descriptor])
    blocks = b""
    for place in range(0, len(payload), CLUSTER):
        piece = payload[place : place + CLUSTER]
        last = place + CLUSTER >= len(payload)
        blocks += (len(piece) << 3 | last).to_bytes(3, "little") + piece
    return header + blocks


@pytest.fixture
def zstd_image(tmp_path: Path) -> Path:
    return made(tmp_path, "compat=1.1,compression_type=zstd")


def put(path: Path, stream: bytes) -> None:
    tables = Tables(path)
    tables.l2(BAD, tables.compressed(tables.append(stream), len(stream)))


def test_r26_several_zstd_frames_fill_one_cluster(zstd_image: Path) -> None:
    put(zstd_image, zstd_frame(b"\x51" * 40000) + zstd_frame(b"\x51" * (CLUSTER - 40000)))

    check(zstd_image, b"\x51" * CLUSTER)


def test_r26_what_follows_the_last_zstd_frame_is_ignored(zstd_image: Path) -> None:
    put(zstd_image, zstd_frame(b"\x52" * CLUSTER) + b"\xff" * 700)

    check(zstd_image, b"\x52" * CLUSTER)


def test_r26_a_zstd_frame_that_goes_on_after_the_cluster_is_an_error(zstd_image: Path) -> None:
    put(zstd_image, zstd_frame(b"\x53" * (CLUSTER + 1)))

    check(zstd_image, EIO)


@pytest.mark.parametrize("cut", [1, 1000, CLUSTER])
def test_r26_a_cut_zstd_frame_is_an_error(zstd_image: Path, cut: int) -> None:
    put(zstd_image, zstd_frame(b"\x54" * CLUSTER)[:-cut])

    with open_chain(str(zstd_image), Policy()) as chain:
        assert qcowfs_says(active_disk(chain), BAD * CLUSTER, CLUSTER) == EIO


def test_a_zstd_frame_that_asks_for_a_giant_window_costs_no_memory(zstd_image: Path) -> None:
    """128 MiB is what the streaming interface would allocate before the first byte."""
    put(zstd_image, zstd_frame(b"\x55" * CLUSTER, window_descriptor=17 << 3))

    check(zstd_image, b"\x55" * CLUSTER)


@pytest.mark.parametrize("descriptor", [18 << 3, 21 << 3])
def test_a_zstd_frame_with_a_window_that_qemu_refuses_is_read_all_the_same(zstd_image: Path, descriptor: int) -> None:
    """256 MiB, 2 GiB. A deviation on purpose: no window is ever allocated, and the data is right."""
    put(zstd_image, zstd_frame(b"\x56" * CLUSTER, window_descriptor=descriptor))

    check(zstd_image, b"\x56" * CLUSTER, ask_qemu=False)
    assert qemu_says(zstd_image, BAD * CLUSTER, EIO)


def test_a_zstd_frame_with_a_window_that_zstd_does_not_have_is_an_error(zstd_image: Path) -> None:
    """3.75 TiB."""
    put(zstd_image, zstd_frame(b"\x56" * CLUSTER, window_descriptor=0xFF))

    check(zstd_image, EIO)


@pytest.mark.parametrize("claimed", [CLUSTER - 1, CLUSTER + 1, 1 << 40])
def test_r26_a_zstd_frame_that_claims_another_size_than_it_has_is_an_error(zstd_image: Path, claimed: int) -> None:
    block = (CLUSTER << 3 | 1).to_bytes(3, "little") + b"\x57" * CLUSTER
    put(zstd_image, b"\x28\xb5\x2f\xfd\xe0" + claimed.to_bytes(8, "little") + block)

    check(zstd_image, EIO)


def test_a_million_skippable_zstd_frames_end(zstd_image: Path) -> None:
    skippable = b"\x50\x2a\x4d\x18\x00\x00\x00\x00"
    put(zstd_image, skippable * ((1 << 16) // len(skippable)))

    with open_chain(str(zstd_image), Policy()) as chain:
        assert qcowfs_says(active_disk(chain), BAD * CLUSTER, CLUSTER) == EIO


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    return made(tmp_path, "compat=1.1,extended_l2=on")


SUBCLUSTER = CLUSTER // 32


@pytest.mark.parametrize("number", [0, 1, 15, 30, 31])
@pytest.mark.parametrize(("allocated", "zero", "expected"), [(1, 0, 0x22), (0, 1, 0), (0, 0, 0)])
def test_r28_each_subcluster_is_data_zero_or_unallocated(
    extended: Path, number: int, allocated: int, zero: int, expected: int
) -> None:
    everything = (1 << 32) - 1
    bits = everything & ~(1 << number) | allocated << number | zero << (32 + number)
    Tables(extended).l2(BAD, bits=bits)
    wanted = bytearray(b"\x22" * CLUSTER)
    wanted[number * SUBCLUSTER : (number + 1) * SUBCLUSTER] = bytes([expected]) * SUBCLUSTER

    with open_chain(str(extended), Policy()) as chain:
        assert wanted == qcowfs_says(active_disk(chain), BAD * CLUSTER, CLUSTER)
    assert qemu_says(extended, BAD * CLUSTER + number * SUBCLUSTER, bytes([expected]) * SUBCLUSTER)


@pytest.mark.parametrize("number", [0, 31])
def test_r28_a_subcluster_that_is_both_spoils_its_cluster(extended: Path, number: int) -> None:
    Tables(extended).l2(BAD, bits=(1 << 32) - 1 | 1 << (32 + number))

    check(extended, EIO)


@pytest.mark.parametrize("bits", [1, 1 << 31, (1 << 32) - 1, 1 | 1 << 32])
def test_r28_an_allocated_subcluster_without_a_cluster_is_an_error(extended: Path, bits: int) -> None:
    Tables(extended).l2(BAD, COPIED, bits=bits)

    check(extended, EIO)


def test_r28_without_a_cluster_subclusters_are_zero_or_unallocated(extended: Path) -> None:
    Tables(extended).l2(BAD, 0, bits=0x5555_5555 << 32)

    check(extended, bytes(CLUSTER))


def test_r28_bit_0_of_an_extended_entry_is_not_the_zero_flag(extended: Path) -> None:
    tables = Tables(extended)
    tables.l2(BAD, tables.l2(BAD) | 1)

    check(extended, b"\x22" * CLUSTER)


def test_r29_a_compressed_extended_entry_is_the_whole_cluster(extended: Path) -> None:
    tables = Tables(extended)
    stream = deflate(b"\x61" * CLUSTER)
    tables.l2(BAD, tables.compressed(tables.append(stream), len(stream)), bits=0)

    check(extended, b"\x61" * CLUSTER)


@pytest.fixture
def with_data_file(tmp_path: Path) -> Iterator[Path]:
    yield made(tmp_path, f"compat=1.1,data_file={tmp_path / 'data.raw'}")


def test_r38_an_offset_that_is_not_the_guests_is_an_error_in_a_data_file(with_data_file: Path) -> None:
    tables = Tables(with_data_file)
    tables.l2(BAD, tables.l2(BAD) + CLUSTER)

    check(with_data_file, EIO)


def test_r38_a_compressed_entry_is_an_error_with_a_data_file(with_data_file: Path) -> None:
    Tables(with_data_file).l2(BAD, COMPRESSED | 0x10000)

    check(with_data_file, EIO)


@pytest.mark.parametrize(("entry", "expected"), [(COPIED, 0x11), (0, 0)])
def test_r19_offset_0_is_data_in_a_data_file_if_bit_63_says_so(with_data_file: Path, entry: int, expected: int) -> None:
    Tables(with_data_file).l2(GOOD, entry)

    with open_chain(str(with_data_file), Policy()) as chain:
        assert bytes([expected]) * CLUSTER == qcowfs_says(active_disk(chain), 0, CLUSTER)
    assert qemu_says(with_data_file, 0, bytes([expected]) * CLUSTER)


def test_extents_end_before_a_bad_entry_and_then_say_so(image: Path) -> None:
    tables = Tables(image)
    tables.l2(BAD, tables.l2(BAD) | 512)

    with open_chain(str(image), Policy()) as chain:
        disk: Disk = active_disk(chain)
        found = disk.extents(0, disk.virtual_size, 100)

        assert [(extent.start, extent.length) for extent in found] == [(0, CLUSTER)]
        with pytest.raises(ReadFault, match="not aligned"):
            disk.extents(CLUSTER, CLUSTER, 100)
        assert disk.extents(AFTER * CLUSTER, CLUSTER, 1)[0].start == AFTER * CLUSTER

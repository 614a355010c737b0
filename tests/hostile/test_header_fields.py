"""Each field of the qcow2 header and of its extensions, at its boundary and one off it: right data or a named error.

Forged images with QEMU's answer; where qcowfs refuses what QEMU opens, the reason is beside it. R1 to R14, and the
limits of R61.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from qcowfs.errors import CorruptImage, NotAnImage, QcowfsError, ReadFault, UnsupportedImage
from qcowfs.qcow2.header import read_header
from qcowfs.qcow2.snapshots import read_snapshots, validate_l1
from tests.support import forge, need
from tests.support.forge import BytesSource, Snapshot, extension, feature_name
from tests.support.verdict import DATA, opens, refuses

# The marks that an image carries (dirty, corrupt) are told in warnings.
pytestmark = [pytest.mark.timeout(5, method="signal"), pytest.mark.expect_warnings]
need("qemu-io")

CLUSTER = 1 << 16
HEADER = 112  # bytes of a header that QEMU writes; extensions follow
ROOM = CLUSTER - HEADER - 8  # bytes that the data of one extension can have
END_OF_FILES = (1 << 63) - (1 << 30)  # QEMU's, and so ours


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "forged.qcow2"


def patched(image: bytes, offset: int, form: str, *values: int) -> bytes:
    """Return `image` with something else at `offset`; nothing moves."""
    data = struct.pack(form, *values)
    return image[:offset] + data + image[offset + len(data) :]


@pytest.mark.parametrize("magic", [b"QFI\xfa", b"QFI\xfc", b"\0\0\0\0", b"qfi\xfb"])
def test_r1_magic(path: Path, magic: bytes) -> None:
    refuses(path, forge.qcow2(data=DATA, magic=magic), NotAnImage, "not a qcow2 image")


@pytest.mark.parametrize("version", [2, 3])
def test_r1_versions_that_are_read(path: Path, version: int) -> None:
    opens(path, forge.qcow2(data=DATA, version=version))


@pytest.mark.parametrize("version", [0, 1, 4, (1 << 32) - 1])
def test_r1_versions_that_are_not(path: Path, version: int) -> None:
    image = patched(forge.qcow2(data=DATA), 4, ">I", version)

    refuses(path, image, UnsupportedImage, f"qcow2 version {version}")


def test_r2_version_2_has_no_fields_after_72(path: Path) -> None:
    """What version 3 would read as features and lengths is an extension here: of an unknown type, so it is skipped."""
    opens(path, forge.qcow2(data=DATA, version=2, extensions=[(0xFFFFFFFF, b"\xff" * 64)]))


def test_r2_extensions_of_version_2_start_at_72(path: Path) -> None:
    path.with_name("base.raw").write_bytes(b"\x11" * CLUSTER)
    image = forge.qcow2(version=2, extensions=[(forge.BACKING_FORMAT, b"raw")], backing_name=b"base.raw")

    assert image[72:84] == bytes.fromhex("e2792aca00000003") + b"raw\0"
    opens(path, image)


@pytest.mark.parametrize("length", [104, 105, 111, 112, 113, 120, 1024, CLUSTER - 8])
def test_r3_header_lengths_that_are_read(path: Path, length: int) -> None:
    """The specification wants a multiple of 8; QEMU, and so qcowfs, does not mind."""
    opens(path, forge.qcow2(data=DATA, header_length=length))


def test_r3_a_header_may_fill_the_first_cluster(path: Path) -> None:
    opens(path, patched(forge.qcow2(data=DATA), 100, ">I", CLUSTER))


@pytest.mark.parametrize("length", [0, 72, 103, CLUSTER + 1, (1 << 32) - 1])
def test_r3_header_lengths_that_are_not(path: Path, length: int) -> None:
    image = patched(forge.qcow2(data=DATA), 100, ">I", length)

    refuses(path, image, CorruptImage, "bad header_length", f"{length} at 0x64")


@pytest.mark.parametrize("bits", [9, 10, 20, 21])
def test_r4_cluster_bits_that_are_read(path: Path, bits: int) -> None:
    opens(path, forge.qcow2(data=DATA, cluster_bits=bits))


@pytest.mark.parametrize("bits", [0, 8, 22, 31, 32, 64, (1 << 32) - 1])
def test_r4_cluster_bits_that_are_not(path: Path, bits: int) -> None:
    image = forge.qcow2(data=DATA, header_cluster_bits=bits)

    refuses(path, image, CorruptImage, "bad cluster_bits", f"{bits} at 0x14", "9 to 21")


@pytest.mark.parametrize("bits", [14, 21])
def test_r4_cluster_bits_with_extended_l2(path: Path, bits: int) -> None:
    opens(path, forge.qcow2(data=DATA, cluster_bits=bits, incompatible_features=16))


def test_r4_smaller_clusters_have_no_subclusters(path: Path) -> None:
    image = forge.qcow2(data=DATA, cluster_bits=13, incompatible_features=16)

    refuses(path, image, CorruptImage, "bad cluster_bits", "13 at 0x14", "14 to 21")


@pytest.mark.parametrize("size", [512, 513, CLUSTER, CLUSTER * CLUSTER // 8])
def test_r5_sizes_that_the_l1_table_covers(path: Path, size: int) -> None:
    opens(path, patched(forge.qcow2(data=DATA), 24, ">Q", size))


@pytest.mark.parametrize("size", [CLUSTER * CLUSTER // 8 + 1, 1 << 40, 1 << 62])
def test_r5_sizes_that_need_a_longer_l1_table(path: Path, size: int) -> None:
    refuses(path, patched(forge.qcow2(data=DATA), 24, ">Q", size), CorruptImage, "bad l1_size", "1 at 0x24")


@pytest.mark.parametrize("size", [(1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_r5_sizes_that_no_file_can_have(path: Path, size: int) -> None:
    refuses(path, patched(forge.qcow2(data=DATA), 24, ">Q", size), CorruptImage, "bad size", f"{size} at 0x18")


def test_r5_the_largest_disk_of_the_largest_l1_table(path: Path) -> None:
    """2 EiB in clusters of 2 MiB: what QEMU's cap on L1 tables allows."""
    image = forge.qcow2(data=DATA, cluster_bits=21)

    opens(path, patched(patched(image, 24, ">Q", 1 << 61), 36, ">I", 1 << 22))


@pytest.mark.parametrize("entries", [1, 2, 1 << 22])
def test_r5_l1_sizes_that_are_read(path: Path, entries: int) -> None:
    opens(path, forge.qcow2(data=DATA, l1_size=entries))


@pytest.mark.parametrize("entries", [0, (1 << 22) + 1, (1 << 32) - 1])
def test_r5_l1_sizes_that_are_not(path: Path, entries: int) -> None:
    refuses(path, forge.qcow2(data=DATA, l1_size=entries), CorruptImage, "bad l1_size", f"{entries} at 0x24")


@pytest.mark.parametrize("offset", [1, 8, 512, CLUSTER - 1, CLUSTER + 1])
@pytest.mark.parametrize(
    ("name", "place"), [("l1_table_offset", 0x28), ("refcount_table_offset", 0x30), ("snapshots_offset", 0x40)]
)
def test_r5_tables_are_aligned_to_a_cluster(path: Path, name: str, place: int, offset: int) -> None:
    """QEMU minds it of the snapshot table even where there are no snapshots."""
    fields: dict[str, Any] = {name: offset}
    image = forge.qcow2(data=DATA, **fields)

    refuses(path, image, CorruptImage, f"bad {name}", f"{offset:#x} at {place:#x}", "0x10000 was expected")


@pytest.mark.parametrize("offset", [0, 1 << 62, END_OF_FILES])
def test_r5_an_empty_snapshot_table_may_be_anywhere(path: Path, offset: int) -> None:
    opens(path, forge.qcow2(data=DATA, snapshots_offset=offset))


@pytest.mark.parametrize("offset", [0, 1 << 62, END_OF_FILES - CLUSTER])
def test_r5_the_refcount_table_may_be_anywhere(path: Path, offset: int) -> None:
    """Reading needs no refcounts, and QEMU takes what lies past the end of the file for zeros."""
    opens(path, forge.qcow2(data=DATA, refcount_table_offset=offset))


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - CLUSTER])
@pytest.mark.parametrize("name", ["l1_table_offset", "refcount_table_offset", "snapshots_offset"])
def test_r5_no_table_is_beyond_what_a_file_can_have(path: Path, name: str, offset: int) -> None:
    fields: dict[str, Any] = {name: offset}
    image = forge.qcow2(data=DATA, **fields)

    refuses(path, image, CorruptImage, f"bad {name}", f"{offset:#x} at", "beyond what a file can have")


@pytest.mark.parametrize("offset", [1 << 40, 1 << 62, END_OF_FILES - CLUSTER])
def test_r5_r30_an_l1_table_past_the_end_of_the_file(path: Path, offset: int) -> None:
    """QEMU reads zeros there, and so a disk of zeros; here it is an error of what is read."""
    refuses(path, forge.qcow2(data=DATA, l1_table_offset=offset), ReadFault, "L1 table lies past the end of the file")


def test_r5_no_table_ends_beyond_what_a_file_can_have(path: Path) -> None:
    offset = END_OF_FILES - CLUSTER
    image = forge.qcow2(data=DATA, l1_table_offset=offset, l1_size=CLUSTER // 8 + 1)

    refuses(path, image, CorruptImage, "bad l1_table_offset", f"{offset:#x} at 0x28", "beyond what a file can have")


@pytest.mark.parametrize("clusters", [1, 2, (8 << 20) // CLUSTER])
def test_r5_refcount_tables_that_are_read(path: Path, clusters: int) -> None:
    opens(path, forge.qcow2(data=DATA, refcount_table_clusters=clusters))


@pytest.mark.parametrize("clusters", [0, (8 << 20) // CLUSTER + 1, (1 << 32) - 1])
def test_r5_refcount_tables_that_are_not(path: Path, clusters: int) -> None:
    image = forge.qcow2(data=DATA, refcount_table_clusters=clusters)

    refuses(path, image, CorruptImage, "bad refcount_table_clusters", f"{clusters} at 0x38", "1 to 128")


@pytest.mark.parametrize("count", [65537, (1 << 32) - 1])
def test_r51_r61_no_more_than_65536_snapshots(path: Path, count: int) -> None:
    refuses(path, forge.qcow2(data=DATA, nb_snapshots=count), CorruptImage, "bad nb_snapshots", f"{count} at 0x3c")


def backing(name: bytes, **more: Any) -> bytes:
    return forge.qcow2(extensions=[(forge.BACKING_FORMAT, b"raw")], backing_name=name, **more)


@pytest.mark.parametrize("length", [10, 11, 1022, 1023])
def test_r6_backing_names_of_up_to_1023_bytes(path: Path, base: Path, length: int) -> None:
    opens(path, backing(b"." + b"/" * (length - 9) + base.name.encode()))


@pytest.mark.parametrize("length", [1024, 1025, (1 << 32) - 1])
def test_r6_longer_backing_names(path: Path, length: int) -> None:
    image = backing(b"x" * 1025, backing_file_size=length)

    refuses(path, image, CorruptImage, "bad backing_file_size", f"{length} at 0x10", "0 to 1023")


@pytest.mark.parametrize("room", [8, 9])
def test_r6_a_backing_name_may_end_with_the_first_cluster(path: Path, base: Path, room: int) -> None:
    image = patched(forge.qcow2(extensions=[(forge.BACKING_FORMAT, b"raw")]), 8, ">QI", CLUSTER - room, 8)

    opens(path, image[: CLUSTER - room] + b"base.raw".ljust(room, b"x") + image[CLUSTER:])


def test_r6_but_not_after_it(path: Path) -> None:
    image = patched(forge.qcow2(data=DATA), 8, ">QI", CLUSTER - 7, 8)

    refuses(path, image, CorruptImage, "bad backing_file_size", "8 at 0x10", "0 to 7")


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (0, 8), (104, 0), (112, 0), (120, 0), (CLUSTER, 0)])
def test_r6_no_backing_name(path: Path, offset: int, length: int) -> None:
    opens(path, patched(forge.qcow2(data=DATA), 8, ">QI", offset, length))


@pytest.mark.parametrize("offset", [CLUSTER + 1, 1 << 32, 1 << 63, (1 << 64) - 1])
def test_r6_backing_names_start_in_the_first_cluster(path: Path, offset: int) -> None:
    image = patched(forge.qcow2(data=DATA), 8, ">QI", offset, 0)

    refuses(path, image, CorruptImage, "bad backing_file_offset", f"{offset} at 0x8")


def test_r6_a_name_ends_at_its_first_nul(path: Path, base: Path) -> None:
    opens(path, backing(base.name.encode() + b"\0junk"))


def test_r6_a_name_that_begins_with_nul_is_none(path: Path) -> None:
    opens(path, backing(b"\0base.raw", data=DATA))


def test_r7_unknown_extensions_are_skipped(path: Path) -> None:
    lengths = [0, 1, 7, 8, 9, 1000]

    opens(path, forge.qcow2(data=DATA, extensions=[(0x12345678, b"\xff" * length) for length in lengths]))


@pytest.mark.parametrize("length", [ROOM, ROOM - 1, ROOM - 8])
def test_r7_an_extension_may_fill_the_first_cluster(path: Path, length: int) -> None:
    image = patched(forge.qcow2(data=DATA), HEADER, ">II", 0x12345678, length)

    opens(path, image)


@pytest.mark.parametrize("length", [ROOM + 1, ROOM + 8, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
@pytest.mark.parametrize("kind", [0x12345678, forge.FEATURE_NAMES, forge.BACKING_FORMAT, 0])
def test_r7_an_extension_that_does_not_fit(path: Path, kind: int, length: int) -> None:
    """Not even the one that ends the list."""
    image = patched(forge.qcow2(data=DATA), HEADER, ">II", kind, length)

    refuses(path, image, CorruptImage, "bad header extension", f"{kind:#010x} at 0x70", f"{length} bytes")


@pytest.mark.parametrize("left", [1, 4, 7])
def test_r7_there_must_be_room_for_an_extension(path: Path, left: int) -> None:
    image = patched(forge.qcow2(data=DATA), 8, ">QI", HEADER + left, 0)

    refuses(path, image, CorruptImage, "bad header extension", f"{left} bytes are left at 0x70")


def test_r7_the_list_may_end_with_the_cluster(path: Path) -> None:
    image = patched(forge.qcow2(data=DATA), HEADER, ">II", 0x12345678, ROOM - 8)

    opens(path, patched(image, CLUSTER - 8, ">II", 0x12345678, 0))


def test_r7_a_quarter_million_of_extensions_end(path: Path) -> None:
    image = forge.qcow2(data=DATA, cluster_bits=21)
    count = ((1 << 21) - HEADER) // 8

    header = read_header(BytesSource(image[:HEADER] + struct.pack(">II", 7, 0) * count + image[1 << 21 :]))

    assert header.backing_format is None  # QEMU takes much longer: it keeps them all in a list


@pytest.mark.parametrize(("first", "last", "fits"), [(b"qcow2", b"raw", True), (b"raw", b"qcow2", False)])
def test_r7_the_last_of_two_counts(path: Path, base: Path, first: bytes, last: bytes, fits: bool) -> None:
    extensions = [(forge.BACKING_FORMAT, first), (forge.BACKING_FORMAT, last)]
    image = forge.qcow2(extensions=extensions, backing_name=base.name.encode())

    if fits:
        opens(path, image)
    else:
        path.write_bytes(image)
        header = read_header(BytesSource(image))

        assert header.backing_format == b"qcow2"


@pytest.mark.parametrize("cut", [HEADER + 1, HEADER + 7, HEADER + 8, HEADER + 18])
def test_r7_r30_extensions_that_the_file_has_not_got(path: Path, cut: int) -> None:
    """QEMU reads them as zeros, and loses the format of the backing file."""
    image = forge.qcow2(data=DATA, extensions=[(forge.BACKING_FORMAT, b"raw" * 4)])[:cut]

    refuses(path, image, CorruptImage, "the header is cut off", f"ends at {cut:#x}", "truncated")


@pytest.mark.parametrize("length", [1, 15])
def test_r8_backing_formats_of_up_to_15_bytes(path: Path, length: int) -> None:
    opens(path, forge.qcow2(data=DATA, extensions=[(forge.BACKING_FORMAT, b"x" * length)]))


@pytest.mark.parametrize("length", [16, 17, 1000])
def test_r8_longer_backing_formats(path: Path, length: int) -> None:
    image = forge.qcow2(data=DATA, extensions=[(forge.BACKING_FORMAT, b"x" * length)])

    refuses(path, image, CorruptImage, "bad backing format extension", f"{length} bytes", "at most 15")


@pytest.mark.parametrize("recorded", [b"raw\0junk", b"raw\0"])
def test_r8_a_backing_format_ends_at_its_first_nul(path: Path, base: Path, recorded: bytes) -> None:
    extensions = [(forge.BACKING_FORMAT, recorded)]

    opens(path, forge.qcow2(extensions=extensions, backing_name=base.name.encode()))


@pytest.mark.parametrize("length", [0, 23, 25, 1000])
@pytest.mark.parametrize("autoclear", [0, 1])
def test_r8_the_bitmaps_extension_has_24_bytes(path: Path, length: int, autoclear: int) -> None:
    extensions = [(forge.BITMAPS, bytes(length))]
    image = forge.qcow2(data=DATA, extensions=extensions, autoclear_features=autoclear)

    refuses(path, image, CorruptImage, "bad bitmaps extension", f"{length} bytes, 24 were expected")


@pytest.mark.parametrize("method", [0, 1])
def test_r8_an_encryption_header_is_for_luks_alone(path: Path, method: int) -> None:
    image = forge.qcow2(data=DATA, extensions=[(forge.CRYPTO, bytes(16))], crypt_method=method)

    refuses(path, image, CorruptImage, "bad encryption header extension", f"{method} at 0x20")


@pytest.mark.parametrize("length", [15, 17])
def test_r8_an_encryption_header_extension_has_16_bytes(path: Path, length: int) -> None:
    image = forge.qcow2(data=DATA, extensions=[(forge.CRYPTO, bytes(length))], crypt_method=2)

    refuses(path, image, CorruptImage, "bad encryption header extension", f"{length} bytes")


def test_r8_an_encryption_header_may_end_where_files_do() -> None:
    place = struct.pack(">QQ", END_OF_FILES - CLUSTER, CLUSTER)

    assert read_header(BytesSource(forge.qcow2(extensions=[(forge.CRYPTO, place)], crypt_method=2))).encrypted


@pytest.mark.parametrize(
    ("offset", "length"), [(512, 4096), (1 << 63, 0), (CLUSTER, (1 << 64) - 1), (END_OF_FILES - CLUSTER, CLUSTER + 1)]
)
def test_r8_an_encryption_header_has_its_clusters(path: Path, offset: int, length: int) -> None:
    extensions = [(forge.CRYPTO, struct.pack(">QQ", offset, length))]
    image = forge.qcow2(data=DATA, extensions=extensions, crypt_method=2)

    refuses(path, image, CorruptImage, "bad encryption header extension", f"{length:#x} bytes at {offset:#x}")


def test_r8_data_file_names_have_a_limit(path: Path) -> None:
    """QEMU has none but the cluster, and then fails to open such a path. The limit keeps errors readable."""
    longest, longer = (
        forge.qcow2(extensions=[(forge.DATA_FILE, b"x" * length)], incompatible_features=4) for length in (8192, 8193)
    )

    assert read_header(BytesSource(longest)).data_file_name == b"x" * 8192
    refuses(path, longer, CorruptImage, "bad data file name extension", "8193 bytes")


@pytest.mark.parametrize("bit", [0, 1])
def test_r9_dirty_and_corrupt_images_are_read(path: Path, bit: int) -> None:
    opens(path, forge.qcow2(data=DATA, incompatible_features=1 << bit))


@pytest.mark.parametrize("bit", range(5, 64))
def test_r9_unknown_incompatible_features(path: Path, bit: int) -> None:
    image = forge.qcow2(data=DATA, incompatible_features=1 << bit)

    refuses(path, image, UnsupportedImage, f"bit {bit} ({1 << bit:#x} at 0x48)")


def test_r9_unknown_features_are_called_by_their_names(path: Path) -> None:
    names = feature_name(1, 5, b"compatible") + feature_name(0, 5, b"time travel") + feature_name(0, 5, b"second")
    names += feature_name(0, 63, b"x" * 46) + feature_name(0, 7, b"") + feature_name(0, 8, b"bad\n\x1b\xff\0junk")
    features = 1 << 5 | 1 << 7 | 1 << 8 | 1 << 63
    image = forge.qcow2(data=DATA, extensions=[(forge.FEATURE_NAMES, names)], incompatible_features=features)

    refuses(path, image, UnsupportedImage, "time travel, bit 7, bad\\x0a\\x1b\\xff, " + "x" * 46 + " (")


def test_r9_an_unknown_feature_explains_a_broken_extension(path: Path) -> None:
    extensions = extension(forge.FEATURE_NAMES, feature_name(0, 5, b"time travel")) + extension(7, b"", length=1 << 31)
    image = forge.qcow2(data=DATA, extensions=extensions, incompatible_features=32)

    refuses(path, image, UnsupportedImage, "time travel")


def test_r9_a_million_of_names_are_not_all_read(path: Path) -> None:
    """The table's length is limited by the cluster, and the number of names by what they can name."""
    names = feature_name(2, 200, b"x") * 40000 + feature_name(0, 5, b"too late")
    image = forge.qcow2(data=DATA, cluster_bits=21, extensions=[(forge.FEATURE_NAMES, names)], incompatible_features=32)

    with pytest.raises(UnsupportedImage, match="bit 5"):
        read_header(BytesSource(image))


@pytest.mark.parametrize("features", [1, 2, 1 << 63, (1 << 64) - 1])
def test_r12_compatible_features_do_not_matter(path: Path, features: int) -> None:
    opens(path, forge.qcow2(data=DATA, compatible_features=features))


@pytest.mark.parametrize("features", [1, 4, 1 << 63, ((1 << 64) - 1) & ~2])
def test_r12_autoclear_features_do_not_matter(path: Path, features: int) -> None:
    opens(path, forge.qcow2(data=DATA, autoclear_features=features))


def test_r12_but_for_a_raw_data_file_that_is_not_there(path: Path) -> None:
    image = forge.qcow2(data=DATA, autoclear_features=2)

    refuses(path, image, CorruptImage, "bad autoclear_features", "0x2 at 0x58")


@pytest.mark.parametrize("order", range(7))
def test_r13_refcount_orders_that_are_read(path: Path, order: int) -> None:
    opens(path, forge.qcow2(data=DATA, refcount_order=order))


@pytest.mark.parametrize("order", [7, 64, (1 << 32) - 1])
def test_r13_refcount_orders_that_are_not(path: Path, order: int) -> None:
    refuses(path, forge.qcow2(data=DATA, refcount_order=order), CorruptImage, "bad refcount_order", f"{order} at 0x60")


def test_r14_compression_types_that_are_read(path: Path) -> None:
    opens(path, forge.qcow2(data=DATA, compression_type=0))
    opens(path, forge.qcow2(data=DATA, compression_type=1, incompatible_features=8))


@pytest.mark.parametrize(("kind", "features"), [(0, 8), (1, 0)])
def test_r14_the_feature_bit_must_fit_the_type(path: Path, kind: int, features: int) -> None:
    image = forge.qcow2(data=DATA, compression_type=kind, incompatible_features=features)

    refuses(path, image, CorruptImage, "bad compression type", f"{kind} at 0x68")


@pytest.mark.parametrize("kind", [2, 255])
@pytest.mark.parametrize("features", [0, 8])
def test_r14_compression_types_that_are_not(path: Path, kind: int, features: int) -> None:
    image = forge.qcow2(data=DATA, compression_type=kind, incompatible_features=features)

    refuses(path, image, UnsupportedImage, "compression type", f"{kind} at 0x68")


@pytest.mark.parametrize("junk", [2, 255])
def test_r14_a_header_of_104_bytes_has_no_type(path: Path, junk: int) -> None:
    """What follows then is the first extension: here of a type whose first byte would be a bad compression type."""
    opens(path, forge.qcow2(data=DATA, header_length=104, extensions=[(junk << 24, b"")]))


@pytest.mark.parametrize("method", [3, (1 << 32) - 1])
def test_r32_encryption_methods_that_nobody_knows(path: Path, method: int) -> None:
    image = forge.qcow2(data=DATA, crypt_method=method)

    refuses(path, image, UnsupportedImage, "encryption method", f"{method} at 0x20")


@pytest.mark.parametrize("method", [1, 2])
def test_r32_encrypted_data_is_refused_and_never_shown(path: Path, method: int) -> None:
    image = forge.qcow2(data=DATA, crypt_method=method)

    assert read_header(BytesSource(image)).encrypted
    refuses(path, image, UnsupportedImage, "encrypted images are not supported yet")


@pytest.mark.parametrize("length", [4, 8, 71, 72, 103])
def test_r30_a_header_that_the_file_has_not_got(path: Path, length: int) -> None:
    refuses(path, forge.qcow2(data=DATA)[:length], CorruptImage, "the header is cut off", "truncated")


def test_random_damage_to_the_header_and_the_snapshot_table_is_a_named_error_or_nothing() -> None:
    """2000 images, each with up to 8 bytes changed; seeded."""
    snapshots = [Snapshot(id=b"%d" % number, name=b"n" * number, icount=number) for number in range(5)]
    names = [(forge.FEATURE_NAMES, feature_name(0, 0, b"dirty bit")), (forge.BACKING_FORMAT, b"raw")]
    image = forge.qcow2(cluster_bits=9, snapshots=snapshots, extensions=names, backing_name=b"base.raw")
    table = int.from_bytes(image[64:72], "big")
    generator = random.Random(20261124)
    outcomes = {True: 0, False: 0}
    for _ in range(2000):
        damaged = bytearray(image)
        for _ in range(generator.randrange(1, 9)):
            place = generator.choice([generator.randrange(512), table + generator.randrange(420)])
            damaged[place] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])
        outcomes[is_read(BytesSource(bytes(damaged)))] += 1

    assert min(outcomes.values()) > 200


def is_read(source: BytesSource) -> bool:
    """Tell whether all that is parsed of `source` is right; any other error than a named one is raised."""
    try:
        header = read_header(source)
        for entry in read_snapshots(source, header):
            validate_l1(source, header, entry)
    except QcowfsError as error:
        assert "\n" not in str(error)
        return False
    return True

"""Each field of the bitmaps extension and of the bitmap directory, at its boundary and one off it.

Forged images with QEMU's answer: R59, R60 and the limits of R61. A broken directory spoils `info` and nothing else: the
disk holds its data, whatever bitmaps say of it. QEMU refuses the whole image.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from qcowfs.errors import CorruptImage, QcowfsError
from qcowfs.qcow2 import bitmaps
from qcowfs.qcow2.header import read_header
from tests.support import forge, need
from tests.support.forge import Bitmap, BytesSource, bitmaps_extension
from tests.support.verdict import DATA, opens, refuses

pytestmark = pytest.mark.timeout(5, method="signal")
need("qemu-io")

CLUSTER = 1 << 16
END_OF_FILES = (1 << 63) - (1 << 30)  # QEMU's, and so ours
TABLE = 5 * CLUSTER  # where a directory goes that is forged as bytes, or anything else that is not looked at
IN_USE, AUTO, COMPATIBLE = 1, 2, 4
WHAT = "bad bitmap directory at 0x"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "forged.qcow2"


def forged(*entries: Bitmap, **fields: Any) -> bytes:
    return forge.qcow2(data=DATA, bitmaps=entries, **fields)


def directory(data: bytes) -> bytes:
    """Return an image whose whole directory is `data`, said to be one entry."""
    return forge.qcow2(data=DATA, bitmaps=data)


def extended(extension: bytes, *, autoclear: int = 1, version: int = 3) -> bytes:
    extensions = [(forge.BITMAPS, extension)]
    if version == 2:
        return forge.qcow2(version=2, data=DATA, extensions=extensions)
    return forge.qcow2(data=DATA, extensions=extensions, autoclear_features=autoclear)


def read(image: bytes) -> tuple[bitmaps.Bitmap, ...]:
    source = BytesSource(image)
    return bitmaps.read_bitmaps(source, read_header(source))


@pytest.mark.parametrize("count", [1, 2, 100])
def test_r59_bitmaps_in_order(path: Path, count: int) -> None:
    image = forged(*[Bitmap(name=b"b%d" % number) for number in range(count)])

    opens(path, image)
    assert [bitmap.name for bitmap in read(image)] == [b"b%d" % number for number in range(count)]


@pytest.mark.parametrize("count", [0, 65536, (1 << 32) - 1])
def test_r59_r61_1_to_65535_bitmaps(path: Path, count: int) -> None:
    refuses(path, extended(bitmaps_extension(count, 32, TABLE)), CorruptImage, WHAT, f"{count} bitmaps, 1 to 65535")


@pytest.mark.parametrize("count", [2, 65535])
def test_r59_fewer_bitmaps_than_the_header_says(path: Path, count: int) -> None:
    image = forged(Bitmap())
    place = image.index(struct.pack(">II", forge.BITMAPS, 24)) + 8
    image = image[:place] + struct.pack(">I", count) + image[place + 4 :]

    refuses(path, image, CorruptImage, WHAT, f"1 entries, the header extension says {count}")


def test_r59_more_bitmaps_than_the_header_says(path: Path) -> None:
    image = forged(Bitmap(name=b"b0"), Bitmap(name=b"b1"))
    place = image.index(struct.pack(">II", forge.BITMAPS, 24)) + 8
    image = image[:place] + struct.pack(">I", 1) + image[place + 4 :]

    refuses(path, image, CorruptImage, WHAT, "2 entries, the header extension says 1")


@pytest.mark.parametrize("reserved", [1, (1 << 32) - 1])
def test_r59_the_reserved_field_is_zero(path: Path, reserved: int) -> None:
    image = extended(bitmaps_extension(1, 32, TABLE, reserved=reserved))

    refuses(path, image, CorruptImage, WHAT, f"reserved field is {reserved:#x}")


@pytest.mark.parametrize("offset", [1, 512, CLUSTER - 1, CLUSTER + 1])
def test_r59_the_directory_is_aligned_to_a_cluster(path: Path, offset: int) -> None:
    image = extended(bitmaps_extension(1, 32, offset))

    refuses(path, image, CorruptImage, f"{WHAT[:-2]}{offset:#x}", "a multiple of the cluster size 0x10000 was expected")


def test_r59_the_directory_does_not_end_beyond_any_file(path: Path) -> None:
    offset = END_OF_FILES - CLUSTER

    refuses(path, extended(bitmaps_extension(1, CLUSTER, offset)), CorruptImage, f"{offset:#x}", "truncated")
    refuses(path, extended(bitmaps_extension(1, CLUSTER + 1, offset)), CorruptImage, f"{offset:#x}", "beyond")


@pytest.mark.parametrize("offset", [1 << 63, (1 << 64) - CLUSTER])
def test_r59_the_directory_is_not_beyond_any_file(path: Path, offset: int) -> None:
    image = extended(bitmaps_extension(1, 32, offset))

    refuses(path, image, CorruptImage, f"{offset:#x}", "beyond what a file can have")


@pytest.mark.parametrize("offset", [1 << 40, 1 << 62])
def test_r59_r30_a_directory_past_the_end_of_the_file(path: Path, offset: int) -> None:
    refuses(path, extended(bitmaps_extension(1, 32, offset)), CorruptImage, f"{offset:#x}", "truncated")


@pytest.mark.parametrize("size", [0, 65535 * 1024 + 1, (1 << 64) - 1])
def test_r59_r61_the_directory_has_up_to_64_mib(path: Path, size: int) -> None:
    refuses(path, extended(bitmaps_extension(1, size, TABLE)), CorruptImage, WHAT, f"{size} bytes, 1 to 67107840")


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (1, "1 bytes are left, an entry of 24 was expected"),
        (23, "23 bytes are left"),
        (24, "an entry of 32 bytes does not fit"),
        (31, "an entry of 32 bytes does not fit"),
        (33, "1 bytes are left"),
        (40, "8 bytes are left"),
        (65535 * 1024, "truncated"),
    ],
)
def test_r59_the_directory_holds_whole_entries(path: Path, size: int, said: str) -> None:
    """32 bytes would be right: of an entry with a name of two, and its padding."""
    image = forged(Bitmap())
    place = image.index(struct.pack(">II", forge.BITMAPS, 24)) + 16
    image = image[:place] + struct.pack(">Q", size) + image[place + 8 :]

    refuses(path, image, CorruptImage, WHAT, said)


def test_r59_the_last_entry_is_padded_too(path: Path) -> None:
    refuses(path, directory(Bitmap().packed(CLUSTER)[:26]), CorruptImage, WHAT, "an entry of 32 bytes does not fit")


@pytest.mark.parametrize("kind", [0, 2, 255])
def test_r59_one_type(path: Path, kind: int) -> None:
    refuses(path, forged(Bitmap(fields={"type": kind})), CorruptImage, WHAT, f"type {kind}, 1 was expected")


@pytest.mark.parametrize("flags", [0, IN_USE, AUTO, IN_USE | AUTO])
def test_r59_r60_flags(path: Path, flags: int) -> None:
    image = forged(Bitmap(flags=flags))

    opens(path, image)
    (bitmap,) = read(image)
    assert (bitmap.in_use, bitmap.auto) == (bool(flags & IN_USE), bool(flags & AUTO))
    assert bitmap.consistent is not bitmap.in_use


@pytest.mark.parametrize("bit", [3, 4, 31])
def test_r59_reserved_flags(path: Path, bit: int) -> None:
    refuses(path, forged(Bitmap(flags=1 << bit)), CorruptImage, WHAT, f"flags {1 << bit:#x}")


@pytest.mark.parametrize(("flags", "consistent"), [(0, False), (COMPATIBLE, True), (COMPATIBLE | IN_USE, False)])
@pytest.mark.parametrize("length", [1, 8, 1000])
def test_r59_r60_extra_data_matters_unless_a_flag_says_no(
    path: Path, length: int, flags: int, consistent: bool
) -> None:
    """QEMU supports no extra data and refuses the image; the specification says what it means not to know it."""
    image = forged(Bitmap(extra=b"x" * length, flags=flags))

    opens(path, image, qemu_opens=False)
    (bitmap,) = read(image)
    assert (bitmap.name, bitmap.consistent) == (b"b0", consistent)


@pytest.mark.parametrize("length", [7, 1 << 31, (1 << 32) - 1])
def test_r59_extra_data_that_does_not_fit(path: Path, length: int) -> None:
    refuses(path, forged(Bitmap(fields={"extra_data_size": length})), CorruptImage, WHAT, "does not fit")


@pytest.mark.parametrize("bits", [9, 10, 30, 31])
def test_r59_granularities_that_are_read(path: Path, bits: int) -> None:
    image = forged(Bitmap(granularity_bits=bits))

    opens(path, image)
    assert read(image)[0].granularity == 1 << bits


@pytest.mark.parametrize("bits", [0, 8, 32, 64, 255])
def test_r59_granularities_that_are_not(path: Path, bits: int) -> None:
    refuses(path, forged(Bitmap(granularity_bits=bits)), CorruptImage, WHAT, f"granularity_bits {bits}, 9 to 31")


@pytest.mark.parametrize("length", [0, 1, 1022, 1023])
def test_r59_names_of_up_to_1023_bytes(path: Path, length: int) -> None:
    image = forged(Bitmap(name=b"x" * length))

    opens(path, image)
    assert read(image)[0].name == b"x" * length


@pytest.mark.parametrize("length", [1024, 65535])
def test_r59_longer_names(path: Path, length: int) -> None:
    refuses(path, forged(Bitmap(name=b"x" * length)), CorruptImage, WHAT, f"a name of {length} bytes, at most 1023")


def test_r59_a_name_that_does_not_fit(path: Path) -> None:
    refuses(path, forged(Bitmap(fields={"name_size": 9})), CorruptImage, WHAT, "an entry of 40 bytes does not fit")


def test_r59_names_are_unique(path: Path) -> None:
    refuses(path, forged(Bitmap(name=b"a\n"), Bitmap(name=b"a\n")), CorruptImage, WHAT, "with the name a\\x0a")


@pytest.mark.parametrize("flags", [0, IN_USE])
@pytest.mark.parametrize("offset", [0, 512, CLUSTER + 1])
def test_r59_a_bitmap_table_is_aligned_and_somewhere(path: Path, offset: int, flags: int) -> None:
    image = forged(Bitmap(flags=flags, fields={"bitmap_table_offset": offset}))

    refuses(path, image, CorruptImage, WHAT, f"a bitmap table is at {offset:#x}")


def test_r59_a_bitmap_table_may_end_where_files_do(path: Path) -> None:
    fields = {"bitmap_table_offset": END_OF_FILES - CLUSTER, "bitmap_table_size": CLUSTER // 8}

    opens(path, forged(Bitmap(flags=IN_USE, fields=fields)))


@pytest.mark.parametrize("offset", [END_OF_FILES, 1 << 63, (1 << 64) - CLUSTER])
def test_r59_a_bitmap_table_is_not_beyond_any_file(path: Path, offset: int) -> None:
    image = forged(Bitmap(fields={"bitmap_table_offset": offset}))

    refuses(path, image, CorruptImage, WHAT, f"{offset:#x}, beyond what a file can have")


@pytest.mark.parametrize("entries", [0, (512 << 20) // CLUSTER + 1, 1 << 27, (1 << 32) - 1])
@pytest.mark.parametrize("flags", [0, IN_USE])
def test_r59_r61_a_bitmap_has_up_to_512_mib(path: Path, entries: int, flags: int) -> None:
    image = forged(Bitmap(flags=flags, fields={"bitmap_table_size": entries}))

    refuses(path, image, CorruptImage, WHAT, f"a table of {entries} entries, 1 to 8192 were expected")


@pytest.mark.parametrize("entries", [2, (512 << 20) // CLUSTER])
def test_r59_a_bitmap_covers_the_disk_unless_it_is_in_use(path: Path, entries: int) -> None:
    """In use, it may have been left behind by a resize."""
    fields = {"bitmap_table_size": entries}

    refuses(path, forged(Bitmap(fields=fields)), CorruptImage, WHAT, f"{entries} entries, 1 were expected")
    opens(path, forged(Bitmap(flags=IN_USE, fields=fields)))


@pytest.mark.parametrize(("size", "fits"), [(512 * 8 * CLUSTER, True), (512 * 8 * CLUSTER + 512, False)])
def test_r60_one_cluster_of_bits_covers_so_much(path: Path, size: int, fits: bool) -> None:
    image = forged(Bitmap(granularity_bits=9), size=size)

    if fits:
        opens(path, image)
    else:
        refuses(path, image, CorruptImage, WHAT, "1 entries, 2 were expected for the virtual size")


def test_r12_r60_without_the_autoclear_bit_all_are_inconsistent(path: Path) -> None:
    image = forged(Bitmap(), autoclear_features=0)

    opens(path, image)
    assert [(bitmap.name, bitmap.consistent) for bitmap in read(image)] == [(b"b0", False)]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize(
    "extension", [b"\xff" * 24, bitmaps_extension(0, 0, 0), bitmaps_extension(1, 32, CLUSTER), bytes(24)]
)
def test_r12_a_directory_left_behind_by_others_may_be_gone(path: Path, extension: bytes, version: int) -> None:
    image = extended(extension, autoclear=0, version=version)

    opens(path, image)
    assert read(image) == ()


def test_random_damage_to_the_directory_is_a_named_error_or_nothing() -> None:
    """2000 images, each with up to 4 bytes changed; seeded."""
    names = [b"n" * number for number in range(8)]
    image = forge.qcow2(cluster_bits=9, bitmaps=[Bitmap(name=name, extra=name, flags=COMPATIBLE) for name in names])
    extension = image.index(struct.pack(">II", forge.BITMAPS, 24))
    start = int.from_bytes(image[extension + 24 : extension + 32], "big")
    generator = random.Random(20261124)
    outcomes = {True: 0, False: 0}
    for _ in range(2000):
        damaged = bytearray(image)
        for _ in range(generator.randrange(1, 5)):
            place = generator.choice([extension + 8 + generator.randrange(24), *[start + generator.randrange(300)] * 4])
            damaged[place] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])
        try:
            outcomes[bool(read(bytes(damaged)))] += 1
        except QcowfsError as error:
            outcomes[False] += 1
            assert "\n" not in str(error)

    assert min(outcomes.values()) > 200

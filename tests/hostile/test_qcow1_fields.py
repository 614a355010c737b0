"""Each field of a qcow version 1 header, at its boundary and one off it: right data or a named error.

Forged images with QEMU's answer: R15, and the limits of R61.
"""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from qcowfs.errors import CorruptImage, NotAnImage, QcowfsError, ReadFault, UnsupportedImage
from qcowfs.qcow1 import read_header
from tests.support import forge, need, verdict
from tests.support.forge import BytesSource
from tests.support.verdict import DATA

pytestmark = pytest.mark.timeout(5, method="signal")
need("qemu-io")

CLUSTER = 1 << 12
REACH = CLUSTER << 9  # bytes of disk of one L1 entry
END_OF_FILES = (1 << 63) - (1 << 30)  # QEMU's, and so ours


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "forged.qcow"


def opens(path: Path, image: bytes) -> None:
    verdict.opens(path, image, image_format="qcow")


def refuses(path: Path, image: bytes, error: type[QcowfsError], *words: str, qemu_opens: bool = False) -> None:
    verdict.refuses(path, image, error, *words, image_format="qcow", qemu_opens=qemu_opens)


def with_size(size: int) -> bytes:
    """Return an image that is as it was but for its size."""
    image = forge.qcow1(data=DATA)
    return image[:24] + struct.pack(">Q", size) + image[32:]


@pytest.mark.parametrize("magic", [b"QFI\xfa", b"QFI\xfc", b"\0\0\0\0"])
def test_r15_magic(path: Path, magic: bytes) -> None:
    refuses(path, forge.qcow1(data=DATA, magic=magic), NotAnImage, "not a qcow image")


@pytest.mark.parametrize("version", [0, 2, 3, (1 << 32) - 1])
def test_r15_version(path: Path, version: int) -> None:
    refuses(path, forge.qcow1(data=DATA, version=version), NotAnImage, "not a qcow image", "version 1")


@pytest.mark.parametrize("bits", [9, 10, 15, 16])
def test_r15_cluster_bits_that_are_read(path: Path, bits: int) -> None:
    opens(path, forge.qcow1(data=DATA, cluster_bits=bits))


@pytest.mark.parametrize("bits", [0, 8, 17, 63, 64, 255])
def test_r15_cluster_bits_that_are_not(path: Path, bits: int) -> None:
    image = forge.qcow1(data=DATA)

    refuses(path, image[:32] + bytes([bits]) + image[33:], CorruptImage, "bad cluster_bits", f"{bits} at 0x20")


@pytest.mark.parametrize("bits", [6, 7, 12, 13])
def test_r15_l2_bits_that_are_read(path: Path, bits: int) -> None:
    opens(path, forge.qcow1(data=DATA, l2_bits=bits))


@pytest.mark.parametrize("bits", [0, 5, 14, 64, 255])
def test_r15_l2_bits_that_are_not(path: Path, bits: int) -> None:
    image = forge.qcow1(data=DATA)

    refuses(path, image[:33] + bytes([bits]) + image[34:], CorruptImage, "bad l2_bits", f"{bits} at 0x21")


@pytest.mark.parametrize("size", [512, 513, 1023, REACH, REACH + 1])
def test_r15_sizes_that_are_read(path: Path, size: int) -> None:
    opens(path, with_size(size))


@pytest.mark.parametrize("size", [0, 1])
def test_r15_sizes_that_are_too_small(path: Path, size: int) -> None:
    refuses(path, with_size(size), CorruptImage, "bad size", f"{size} at 0x18")


def test_r15_an_image_of_less_than_a_sector_is_empty() -> None:
    assert read_header(BytesSource(with_size(2))).virtual_size == 0
    assert read_header(BytesSource(with_size(511))).virtual_size == 0


def test_r15_r61_the_largest_l1_table(path: Path) -> None:
    opens(path, with_size((256 << 20) // 8 * REACH))


def test_r15_r61_a_larger_l1_table(path: Path) -> None:
    """QEMU opens up to eight times this size, and reads the whole table first. Nobody has version 1 of 64 TiB."""
    size = (256 << 20) // 8 * REACH + 1

    refuses(path, with_size(size), CorruptImage, "bad size", f"{size:#x} at 0x18", qemu_opens=True)


@pytest.mark.parametrize("size", [1 << 62, 1 << 63, (1 << 64) - REACH, (1 << 64) - 1])
def test_r15_r61_absurd_sizes(path: Path, size: int) -> None:
    refuses(path, with_size(size), CorruptImage, "bad size", f"{size:#x} at 0x18")


@pytest.mark.parametrize("method", [2, (1 << 32) - 1])
def test_r15_encryption_methods_that_nobody_knows(path: Path, method: int) -> None:
    refuses(path, forge.qcow1(data=DATA, crypt_method=method), UnsupportedImage, f"{method} at 0x24")


def test_r17_encrypted_data_is_refused_and_never_shown(path: Path) -> None:
    image = forge.qcow1(data=DATA, crypt_method=1)

    assert read_header(BytesSource(image)).encrypted
    refuses(path, image, UnsupportedImage, "encrypted images are not supported yet")


@pytest.mark.parametrize("moved", [1, 8, 511, 4095])
def test_r15_the_l1_table_may_be_anywhere(path: Path, moved: int) -> None:
    """Not even aligned to 8 bytes."""
    image = forge.qcow1(data=DATA)
    place = struct.unpack_from(">Q", image, 40)[0]
    image = image[:40] + struct.pack(">Q", len(image) + moved) + image[48:] + bytes(moved) + image[place : place + 8]

    opens(path, image)


@pytest.mark.parametrize("offset", [1 << 40, 1 << 62, END_OF_FILES - 8])
def test_r15_r30_an_l1_table_past_the_end_of_the_file(path: Path, offset: int) -> None:
    """QEMU reads zeros there, and so a disk of zeros; here it is an error of what is read."""
    refuses(path, forge.qcow1(data=DATA, l1_table_offset=offset), ReadFault, "L1 table lies past the end of the file")


@pytest.mark.parametrize("offset", [END_OF_FILES - 7, 1 << 63, (1 << 64) - 1])
def test_r15_an_l1_table_beyond_any_file(path: Path, offset: int) -> None:
    image = forge.qcow1(data=DATA, l1_table_offset=offset)

    refuses(path, image, CorruptImage, "bad l1_table_offset", f"{offset:#x} at 0x28")


@pytest.mark.parametrize("field", ["mtime", "padding"])
def test_r15_fields_that_do_not_matter(path: Path, field: str) -> None:
    fields: dict[str, Any] = {field: 0xFFFF}

    opens(path, forge.qcow1(data=DATA, **fields))


@pytest.mark.parametrize("length", [10, 11, 1022, 1023])
def test_r15_backing_names_of_up_to_1023_bytes(path: Path, base: Path, length: int) -> None:
    opens(path, forge.qcow1(backing_name=b"." + b"/" * (length - 9) + base.name.encode()))


@pytest.mark.parametrize("length", [1024, 1025, (1 << 32) - 1])
def test_r15_longer_backing_names(path: Path, length: int) -> None:
    image = forge.qcow1(backing_name=b"x" * 1025, backing_file_size=length)

    refuses(path, image, CorruptImage, "bad backing_file_size", f"{length} at 0x10")


@pytest.mark.parametrize(("offset", "length"), [(0, 0), (0, 8), (48, 0), (1 << 40, 0)])
def test_r15_no_backing_name(path: Path, offset: int, length: int) -> None:
    opens(path, forge.qcow1(data=DATA, backing_file_offset=offset, backing_file_size=length))


def test_r15_a_backing_name_may_be_anywhere_in_the_file(path: Path, base: Path) -> None:
    image = forge.qcow1()

    opens(path, image[:8] + struct.pack(">QI", len(image), 8) + image[20:] + base.name.encode())


def test_r15_a_backing_name_ends_at_its_first_nul(path: Path, base: Path) -> None:
    opens(path, forge.qcow1(backing_name=base.name.encode() + b"\0junk"))


@pytest.mark.parametrize("offset", [1 << 40, 1 << 62])
def test_r15_r30_a_backing_name_that_the_file_has_not_got(path: Path, offset: int) -> None:
    """QEMU reads zeros there, and so an image without a backing file."""
    image = forge.qcow1(data=DATA, backing_file_offset=offset, backing_file_size=8)

    refuses(path, image, CorruptImage, "bad backing file name", f"{offset:#x}", "truncated", qemu_opens=True)


@pytest.mark.parametrize("offset", [END_OF_FILES, 1 << 63, (1 << 64) - 1])
def test_r15_a_backing_name_beyond_any_file(path: Path, offset: int) -> None:
    image = forge.qcow1(data=DATA, backing_file_offset=offset, backing_file_size=8)

    refuses(path, image, CorruptImage, "bad backing_file_offset", f"{offset:#x} at 0x8")


@pytest.mark.parametrize("length", [8, 47])
def test_r15_r30_a_header_that_the_file_has_not_got(path: Path, length: int) -> None:
    refuses(path, forge.qcow1(data=DATA)[:length], CorruptImage, "the header is cut off", f"{length:#x}", "truncated")


def test_random_damage_to_the_header_is_a_named_error_or_nothing() -> None:
    """2000 images, each with up to 4 bytes changed; seeded."""
    image = forge.qcow1(data=DATA, backing_name=b"base.raw")
    generator = random.Random(20261124)
    outcomes = {True: 0, False: 0}
    for _ in range(2000):
        damaged = bytearray(image)
        for _ in range(generator.randrange(1, 5)):
            damaged[generator.randrange(8, 56)] = generator.choice([0, 1, 0x7F, 0x80, 0xFF, generator.randrange(256)])
        try:
            read_header(BytesSource(bytes(damaged)))
            outcomes[True] += 1
        except QcowfsError as error:
            outcomes[False] += 1
            assert "\n" not in str(error)

    assert min(outcomes.values()) > 200

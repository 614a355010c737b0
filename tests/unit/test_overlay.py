"""What is laid over a volume: pieces are joined, and every byte comes from its place. Evidence: own fixture."""

from __future__ import annotations

import random
from array import array

import pytest

from qcowfs._crc32c import crc32c
from qcowfs.inside.overlay import Overlay
from qcowfs.inside.reader import INLINE
from qcowfs.inside.record import Extent

BLOCK = 1024
SIZE = 64 * BLOCK + 100  # the last block is not whole
MAGIC = bytes.fromhex("c03b3998")


class Memory:
    """A Device in memory."""

    size = SIZE

    def __init__(self) -> None:
        self.content = random.Random(5).randbytes(SIZE)

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= SIZE
        return self.content[offset : offset + length]


def overlay() -> tuple[Overlay, bytes]:
    """Return an overlay, and the content that it should have."""
    device = Memory()
    made = Overlay(device, BLOCK, array("Q", (3, 4, 5, 9, 20)), array("Q", (40 << 1, 41 << 1, 50 << 1, 42 << 1 | 1, 0)))
    made.put(10, b"\x07" * BLOCK)
    made.put(20, b"\x08" * BLOCK)
    expected = bytearray(device.content)
    for block, place in ((3, 40), (4, 41), (5, 50), (9, 42)):
        expected[block * BLOCK : (block + 1) * BLOCK] = device.content[place * BLOCK : (place + 1) * BLOCK]
    expected[9 * BLOCK : 9 * BLOCK + 4] = MAGIC
    expected[10 * BLOCK : 11 * BLOCK] = b"\x07" * BLOCK
    expected[20 * BLOCK : 21 * BLOCK] = b"\x08" * BLOCK
    return made, bytes(expected)


def test_any_range_reads_as_it_should() -> None:
    made, expected = overlay()
    rng = random.Random(6)
    for _ in range(500):
        offset = min(rng.randrange(SIZE), rng.randrange(12 * BLOCK) if rng.random() < 0.7 else SIZE)
        length = rng.randrange(min(SIZE - offset, rng.choice((3, 5000, SIZE))) + 1)

        assert expected[offset : offset + length] == made.read(offset, length)


def test_blocks_that_follow_each_other_are_one_piece() -> None:
    made, _ = overlay()

    assert [
        (3 * BLOCK - 1, 1),
        (2 * BLOCK, 40 * BLOCK),
        (BLOCK, 50 * BLOCK),
        (3 * BLOCK, 6 * BLOCK),
        (4, MAGIC),
        (BLOCK - 4, 42 * BLOCK + 4),
        (BLOCK, b"\x07" * BLOCK),
        (1, 11 * BLOCK),
    ] == list(made.locate(1, 11 * BLOCK))


def test_what_is_past_the_end_is_an_error() -> None:
    made, _ = overlay()
    for offset, length in ((SIZE, 1), (SIZE - 1, 2), (-1, 1), (0, -1)):
        with pytest.raises(OSError):
            made.read(offset, length)

    assert b"" == made.read(SIZE, 0)


@pytest.mark.parametrize("limit", (1, 2, 3, 7, 100))
def test_the_extents_of_a_file_lead_to_its_bytes(limit: int) -> None:
    made, expected = overlay()
    file = [Extent(0, 6 * BLOCK, 8 * BLOCK), Extent(9 * BLOCK, 3 * BLOCK - 5, 2 * BLOCK)]
    end = 12 * BLOCK - 5
    content = bytearray(end)
    offset = 0
    while offset < end:
        rest = [
            Extent(max(at, offset), length - max(offset - at, 0), place + max(offset - at, 0))
            for at, length, place in file
            if at + length > offset
        ]
        found = made.extents(rest, limit, end)
        assert 0 < len(found.extents) <= limit
        for start, length, place in found.extents:
            source = found.inline[place - INLINE :] if place >= INLINE else Memory().content[place:]
            content[start : start + length] = source[:length]
        offset = found.end

    assert expected[8 * BLOCK : 14 * BLOCK] + bytes(3 * BLOCK) + expected[2 * BLOCK : 5 * BLOCK - 5] == content


def test_the_checksum_is_castagnolis() -> None:
    """RFC 3720, B.4; and any cut gives the same."""
    assert 0x8A9136AA == crc32c(0xFFFFFFFF, bytes(32)) ^ 0xFFFFFFFF
    assert 0x113FDB5C == crc32c(0xFFFFFFFF, bytes(range(31, -1, -1))) ^ 0xFFFFFFFF
    data = random.Random(7).randbytes(1000)
    for cut in range(0, 1000, 37):
        assert crc32c(1, data) == crc32c(crc32c(1, data[:cut]), memoryview(data)[cut:])
    assert 5 == crc32c(5, b"")


def test_what_is_covered_is_told_in_few_ranges() -> None:
    device = Memory()
    blocks = array("Q", [2, 3, 9])
    laid = Overlay(device, BLOCK, blocks, array("Q", [20, 40, 60]))
    laid.put(4, bytes(BLOCK))
    laid.put(11, bytes(BLOCK))

    assert [(2 * BLOCK, 5 * BLOCK), (9 * BLOCK, 10 * BLOCK), (11 * BLOCK, 12 * BLOCK)] == laid.covered_ranges()

"""The oracle of `blockdiff`: pairs of seeded random points, against QEMU's raws of both compared byte for byte.

Each seed makes a chain and compares two of its points, which share files; and one of them with the same point of a copy
of all its files in which something was written, which shares none. Left out are points that QEMU does not read, as in
test_random.py.
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs.blockdiff import differing, may_differ
from qcowfs.chain import Chain, open_chain
from qcowfs.gate import Policy
from qcowfs.snapshot import Point, open_disk, points
from tests.support import need
from tests.support.images import MadeImage, MadeLayer, make
from tests.support.qemu import CannotRevert, convert, qemu, reverted

SEEDS = [int(os.environ["SEED"])] if "SEED" in os.environ else range(100)
GRANULARITIES = (1, 512, 65536)
WRITTEN = re.compile(rb"[^\0]+")

Ranges = list[tuple[int, int]]
State = tuple[MadeImage, Chain, Point]


class Unknown(Exception):
    """QEMU does not tell."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.expect_warnings
def test_two_points_differ_where_their_bytes_do(tmp_path: Path, seed: int) -> None:
    """Scenarios by seed, with the bytes that QEMU reads."""
    need("qemu-img", "qemu-io")
    made = make(seed, tmp_path)
    generator = random.Random(f"pairs of {seed}")
    replay = "\n".join([f"again: SEED={seed} make test TESTS=tests/oracle/test_blockdiff.py", *made.commands])

    with _opened(tmp_path, made.top) as chain:
        found = points(chain)
        first, second = generator.sample(found, 2) if len(found) > 1 else found * 2
        cache = Cache(1 << 20)
        _compare_points((made, chain, first), (made, chain, second), cache, replay)
        copied = _copied(made, tmp_path, first.depth, generator)
        with _opened(tmp_path, copied.top) as copy:
            same = points(copy)[found.index(first)]
            _compare_points((made, chain, first), (copied, copy, same), cache, replay)


def _opened(directory: Path, image: Path) -> Chain:
    return open_chain(str(image), Policy(allow=(os.path.realpath(directory),)))


def _copied(made: MadeImage, directory: Path, depth: int, generator: random.Random) -> MadeImage:
    """Copy all files, and write into a layer, `depth` or below."""
    (directory / "copy").mkdir()
    for path in directory.iterdir():
        if path.is_file():
            shutil.copyfile(path, directory / "copy" / path.name)
    copy = MadeImage(made.seed, [MadeLayer(_in_copy(layer.path), layer.format) for layer in made.layers])
    layer = copy.layers[generator.randrange(depth, len(copy.layers))]
    words = [f"write -P {generator.randrange(256)} {generator.randrange(128) * 512} 1536", "write -z 65536 70000"]
    for word in words:
        qemu("qemu-io", "-f", layer.format, "-c", word, layer.path, check=False)
    return copy


def _in_copy(path: Path) -> Path:
    return path.parent / "copy" / path.name


def _compare_points(old: State, new: State, cache: Cache, told: str) -> None:
    try:
        old_bytes, new_bytes = (_qemus_bytes(made.layers[point.depth], point) for made, _, point in (old, new))
    except Unknown:
        return
    _compare(open_disk(*old[1:], cache), open_disk(*new[1:], cache), old_bytes, new_bytes, told)


def _qemus_bytes(layer: MadeLayer, point: Point) -> bytes:
    if point.entry is None:
        found = convert(layer.path, layer.format)
    else:
        try:
            with reverted(layer.path, point.entry.id.decode()) as copy:
                found = convert(copy, "qcow2")
        except CannotRevert:
            raise Unknown from None
    if found is None:
        raise Unknown
    return found


def _compare(old: Disk, new: Disk, old_bytes: bytes, new_bytes: bytes, told: str) -> None:
    size = max(len(old_bytes), len(new_bytes))
    old_bytes, new_bytes = old_bytes.ljust(size, b"\0"), new_bytes.ljust(size, b"\0")
    exact = _by_byte(old_bytes, new_bytes)
    for granularity in GRANULARITIES:
        expected = exact if granularity == 1 else _by_block(old_bytes, new_bytes, granularity)
        found = list(differing(old, new, granularity=granularity))
        assert expected == found, f"granularity {granularity}: {told}"
        assert _covers(may_differ(old, new, granularity=granularity), found), f"granularity {granularity}: {told}"


def _by_byte(old: bytes, new: bytes) -> Ranges:
    marks = (int.from_bytes(old) ^ int.from_bytes(new)).to_bytes(len(old))
    return [(match.start(), match.end() - match.start()) for match in WRITTEN.finditer(marks)]


def _by_block(old: bytes, new: bytes, granularity: int) -> Ranges:
    found: Ranges = []
    for start in range(0, len(old), granularity):
        length = min(granularity, len(old) - start)
        if old[start : start + length] == new[start : start + length]:
            continue
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def _covers(ranges: Iterator[tuple[int, int]], wanted: Ranges) -> bool:
    """Does each of `wanted` lie in one of `ranges`?"""
    covering = (0, 0)
    for start, length in wanted:
        while covering is not None and sum(covering) < start + length:
            covering = next(ranges, None)
        if covering is None or covering[0] > start:
            return False
    return True

"""The golden images hold what QEMU said when they were made; needs no QEMU. Own fixtures, with QEMU's answer.

`python -m tests.golden.make_images` makes them again.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from qcowfs.chain import Chain, open_chain
from qcowfs.gate import Policy
from qcowfs.snapshot import Point, points
from tests.support.reader import open_point, read_all, runs_of_disk

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
LARGEST = 64 << 10  # bytes of a file in the repository
IMAGES: dict[str, dict[str, Any]] = json.loads((GOLDEN / "MANIFEST.json").read_text())["images"]


@pytest.fixture
def image(name: str, tmp_path: Path) -> Path:
    """The unpacked image `name`."""
    for kept in (GOLDEN / name).iterdir():
        (tmp_path / kept.stem).write_bytes(gzip.decompress(kept.read_bytes()))
    return tmp_path / str(IMAGES[name]["top"])


@pytest.mark.parametrize("name", IMAGES)
def test_files_are_those_of_the_manifest_and_small(name: str) -> None:
    kept = {path.stem: path for path in (GOLDEN / name).iterdir()}

    assert IMAGES[name]["files"] == {
        file: hashlib.sha256(gzip.decompress(path.read_bytes())).hexdigest() for file, path in kept.items()
    }
    assert all(path.stat().st_size < LARGEST for path in kept.values())


def test_every_directory_is_in_the_manifest() -> None:
    assert sorted(IMAGES) == sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and path.name[0] != "_")


def described(chain: Chain, point: Point) -> dict[str, Any]:
    """What the manifest says of a point, as qcowfs sees it."""
    disk = open_point(chain, point)
    return {
        "depth": point.depth,
        "id": None if point.snapshot_id is None else point.snapshot_id.decode(),
        "name": None if point.snapshot_name is None else point.snapshot_name.decode(errors="replace"),
        "size": point.virtual_size,
        "sha256": hashlib.sha256(read_all(disk)).hexdigest(),
        "map": [list(run) for run in runs_of_disk(disk)],
    }


@pytest.mark.parametrize("name", IMAGES)
def test_every_point_is_what_qemu_read(name: str, image: Path) -> None:
    with open_chain(str(image), Policy()) as chain:
        assert IMAGES[name]["points"] == [described(chain, point) for point in points(chain)]


@pytest.mark.parametrize("name", IMAGES)
def test_only_the_dirty_image_has_a_warning(name: str, image: Path) -> None:
    with open_chain(str(image), Policy()) as chain:
        assert (name == "dirty") == bool(chain.warnings)

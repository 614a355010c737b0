"""Damaged file systems through the whole command: what can be read is printed, and the rest is one line each."""

from __future__ import annotations

import json
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from qcowfs import cli
from tests.support import need
from tests.support.disks import run

BLOCK = 1024
PATIENCE = 10.0  # seconds; each takes 0.2, and 0.5 with the worst damage found in 480 runs
pytestmark = pytest.mark.expect_warnings


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    need("mke2fs")
    directory = tmp_path_factory.mktemp("tree")
    tree, image = directory / "tree", directory / "image"
    for number in range(30):
        (tree / f"d{number % 5}" / "e").mkdir(parents=True, exist_ok=True)
        (tree / f"d{number % 5}" / f"file {number}").write_bytes(b"content" * number * 100)
        (tree / f"d{number % 5}" / "e" / f"link{number}").symlink_to(f"../../d{number % 3}")
    run("mke2fs", "-q", "-t", "ext4", "-b", str(BLOCK), "-O", "^metadata_csum", "-d", tree, image, "8M")
    return image.read_bytes()


def damaged(image: bytes, dice: random.Random) -> bytes:
    data = bytearray(image)
    used = [at for at in range(0, len(data), BLOCK) if any(data[at : at + BLOCK])]
    for at in dice.sample(used, dice.choice([1, 5, 40])):
        for _ in range(dice.choice([1, 8])):
            data[at + dice.randrange(BLOCK)] = dice.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("seed", range(25))
def test_damage_is_told_in_lines_and_ends_in_time(
    image: bytes, tmp_path: Path, seed: int, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(damaged(image, random.Random(seed)))
    readable = ""
    for words in (["ls", "-R", "--json"], ["ls", "-lR"], ["list", "-v"], ["cat"]):
        if words == ["cat"] and not readable:
            continue  # a file that says it is an exabyte of zeros is no error
        began = time.monotonic()
        code = cli.main([*words, "--image-format", "raw", str(path), *([readable] if words == ["cat"] else [])])
        said = capsysbinary.readouterr()
        errors = said.err.decode()

        assert code in (0, 1, 17), errors
        assert all(line.startswith(("qcowfs: ", "hint: ")) for line in errors.splitlines()), errors
        assert "internal error" not in errors
        assert "nonsense" not in errors, "the reader told what no reader may"
        assert time.monotonic() - began < PATIENCE
        if "--json" in words and said.out:
            document = json.loads(said.out)
            assert (code == 0) == (document["errors"] == [])
            readable = next((f"current:{one['path']}" for one in document["entries"] if is_small_file(one)), "")


def is_small_file(entry: dict[str, Any]) -> bool:
    return entry["type"] == "file" and "error" not in entry and entry["size"] < 1 << 20


def test_the_image_is_readable_before_it_is_damaged(
    image: bytes, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(image)

    assert cli.main(["cat", "--image-format", "raw", str(path), "current:d1/file 6"]) == 0
    assert capsysbinary.readouterr().out == b"content" * 600
    assert os.path.getsize(path) == 8 << 20

"""Blocks of remote images on disk: found by the next mount and by others at the same time, never wrong, and bounded."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qcowfs._blocks import BlockCache, BlockSource
from qcowfs.errors import UsageError
from qcowfs.source.cachedir import CacheDirectory
from tests.support.remotebase import RemoteBase, content_of

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 64 * KIB
SIZE = 6 * MIB + 4321
CONTENT = content_of(SIZE)
BOUND = 16 * MIB
NOBODY = 65534


class Mounted:
    """What one mount has of an image: a source behind a cache of its own, and the directory."""

    def __init__(self, path: Path, base: RemoteBase, version: str | None = "v1", bound: int = BOUND) -> None:
        self.base = base
        self.directory = CacheDirectory(str(path), bound)
        self.cache = BlockCache(8 * MIB)
        self.source = BlockSource(self.cache, base.source, directory=self.directory, version=version)

    def __enter__(self) -> BlockSource:
        return self.source

    def __exit__(self, *_: object) -> None:
        self.source.close()
        self.directory.close()


def read(path: Path, base: RemoteBase | None = None, version: str | None = "v1", bound: int = BOUND) -> RemoteBase:
    """Read the whole image in one mount; returns what stood behind it."""
    base = base or RemoteBase(CONTENT)
    with Mounted(path, base, version, bound) as source:
        for offset in range(0, len(base.content), 512 * KIB):
            assert base.content[offset : offset + 512 * KIB] == source.read_at(offset, 512 * KIB)
    return base


def files(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def taken(path: Path) -> int:
    found = 0
    for file in files(path):
        with suppress(FileNotFoundError):  # another process gave it up meanwhile
            found += 512 * file.lstat().st_blocks
    return found


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_the_next_mount_reads_what_the_last_one_fetched(directory: Path) -> None:
    assert SIZE == read(directory).fetched
    assert 0 == read(directory).fetched


def test_everything_is_private(directory: Path) -> None:
    read(directory)

    assert 0o700 == stat.S_IMODE(directory.stat().st_mode)
    assert [0o600] == [stat.S_IMODE(file.stat().st_mode) for file in files(directory)]
    assert [] == [file.name for file in files(directory) if "image" in file.name]


def test_a_mount_sees_at_once_what_another_fetches(directory: Path) -> None:
    with Mounted(directory, RemoteBase(CONTENT)) as first, Mounted(directory, RemoteBase(CONTENT)) as second:
        other = RemoteBase(CONTENT)
        assert CONTENT[MIB : MIB + 10] == first.read_at(MIB, 10)
        first.close()  # which waits for what is still to be written
        assert CONTENT[MIB : MIB + 10] == second.read_at(MIB, 10)
        with Mounted(directory, other) as third:
            assert CONTENT[MIB : MIB + 10] == third.read_at(MIB, 10)
        assert 0 == other.fetched


@pytest.mark.parametrize(
    "changed",
    [
        {"version": "v2"},
        {"base": RemoteBase(CONTENT, name="here://other")},
        {"base": RemoteBase(CONTENT, place=("here", "other"))},
        {"base": RemoteBase(CONTENT + b"!")},
    ],
    ids=["version", "name", "place", "size"],
)
def test_another_image_has_blocks_of_its_own(directory: Path, changed: dict[str, object]) -> None:
    read(directory)
    base = read(directory, **changed)  # type: ignore[arg-type]

    assert len(base.content) == base.fetched
    assert 2 == len(files(directory))


def test_what_has_no_version_is_not_kept(directory: Path) -> None:
    read(directory, version=None)

    assert [] == files(directory)


def test_a_damaged_block_is_fetched_again_and_mended(directory: Path) -> None:
    read(directory)
    (file,) = files(directory)
    dice = random.Random(3)
    places = sorted({dice.randrange(BLOCK, file.stat().st_size) for _ in range(10)})
    with open(file, "r+b") as opened:
        for place in places:
            opened.seek(place)
            byte = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([byte ^ 1 << dice.randrange(8)]))
    damaged = len({place // BLOCK for place in places})

    assert (damaged - 1) * BLOCK < read(directory).fetched <= damaged * BLOCK
    assert 0 == read(directory).fetched


def test_every_bit_of_a_record_counts(directory: Path) -> None:
    read(directory)
    (file,) = files(directory)
    good = file.read_bytes()
    for bit in range(32):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        file.write_bytes(damaged)
        assert BLOCK == read(directory).fetched


@pytest.mark.parametrize("length", [0, 1, 7, 8, 800, BLOCK - 1, BLOCK, BLOCK + 1, 3 * MIB, SIZE])
def test_a_cut_file_is_mended(directory: Path, length: int) -> None:
    read(directory)
    (file,) = files(directory)
    os.truncate(file, length)

    assert 0 < read(directory).fetched <= SIZE
    assert 0 == read(directory).fetched


@pytest.mark.parametrize("seed", range(6))
def test_a_file_of_garbage_gives_no_wrong_byte(directory: Path, seed: int) -> None:
    read(directory)
    (file,) = files(directory)
    dice = random.Random(seed)
    garbage = bytearray(file.read_bytes())
    for _ in range(50):
        start, length = dice.randrange(len(garbage)), dice.choice([1, 8, 512, 4096, BLOCK])
        source = dice.randrange(len(garbage))
        garbage[start : start + length] = garbage[source : source + length]
    file.write_bytes(dice.choice([garbage, dice.randbytes(len(garbage)), bytes(len(garbage))]))

    read(directory)
    assert 0 == read(directory).fetched


def test_a_block_in_anothers_place_is_not_believed(directory: Path) -> None:
    """As a file system may return it after a crash, or as somebody copies it."""
    read(directory)
    (file,) = files(directory)
    read(directory, version="v2")
    (other,) = set(files(directory)) - {file}
    shutil.copyfile(file, other)

    assert SIZE == read(directory, version="v2").fetched


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe", "hardlink", "readable"])
def test_nothing_is_read_or_written_through_what_is_no_file_of_ours(directory: Path, kind: str, tmp_path: Path) -> None:
    read(directory)
    (file,) = files(directory)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    file.unlink()
    if kind == "link":
        file.symlink_to(victim)
    elif kind == "dangling":
        file.symlink_to(tmp_path / "new")
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "hardlink":
        os.link(victim, file)
    else:
        file.write_bytes(b"")
        file.chmod(0o644)

    assert SIZE == read(directory).fetched
    assert b"precious" == victim.read_bytes()
    assert not (tmp_path / "new").exists()
    assert 0 == read(directory).fetched


@pytest.mark.expect_warnings
def test_a_directory_where_a_file_should_be_costs_a_line_in_the_log(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read(directory)
    (file,) = files(directory)
    file.unlink()
    file.mkdir()
    read(directory)

    assert [f"{directory}: no blocks are kept of an image: Is a directory"] == [r.getMessage() for r in caplog.records]


def test_the_bound_holds_and_the_oldest_go_first(directory: Path) -> None:
    images = [RemoteBase(content_of(4 * MIB, seed), name=f"here://{seed}") for seed in range(8)]
    for number, image in enumerate(images):
        read(directory, image)
        assert taken(directory) <= BOUND
        for file in files(directory):
            make_older(file, 1000)
        if number:
            read(directory, again(images[0]))  # the first one is used again and again
    assert 0 == read(directory, again(images[0])).fetched
    assert 0 == read(directory, again(images[7])).fetched
    assert 4 * MIB == read(directory, again(images[1])).fetched


def again(image: RemoteBase) -> RemoteBase:
    return RemoteBase(image.content, name=image.source.name)


def make_older(file: Path, seconds: int) -> None:
    """Let all blocks of the file have been used so much earlier."""
    records = bytearray(file.read_bytes()[:512])
    for place in range(4, 512, 8):
        used = int.from_bytes(records[place : place + 4], sys.byteorder)
        records[place : place + 4] = (used and used - seconds).to_bytes(4, sys.byteorder)
    with open(file, "r+b") as opened:
        opened.write(records)


def test_an_image_larger_than_the_bound_keeps_what_was_used_last(directory: Path) -> None:
    large = RemoteBase(content_of(30 * MIB))
    read(directory, large)
    fetched = read(directory, again(large)).fetched

    assert taken(directory) <= BOUND
    assert 10 * MIB < fetched < 30 * MIB


def test_files_without_blocks_go_unless_somebody_has_them_open(directory: Path) -> None:
    names = []
    with Mounted(directory, RemoteBase(CONTENT, name="here://open")) as source:
        for seed in range(6):
            read(directory, RemoteBase(content_of(4 * MIB, seed), name=f"here://{seed}"))
            for file in files(directory):
                make_older(file, 1000)
        names = [file.name for file in files(directory)]
        assert CONTENT[:10] == source.read_at(0, 10)
    other = RemoteBase(CONTENT, name="here://open")
    with Mounted(directory, other) as source:
        source.read_at(0, 10)

    assert len(names) < 7
    assert 0 == other.fetched


def test_other_files_of_the_directory_are_left_alone(directory: Path) -> None:
    directory.mkdir(0o700)
    notes = [directory / "notes", directory / f"{'0' * 64}-10.blocks.old", directory / f"{'0' * 64}-10.blocks"]
    for note in notes[:2]:
        note.write_bytes(bytes(BOUND))
    notes[2].symlink_to(notes[0])
    read(directory, RemoteBase(content_of(30 * MIB)))

    assert {notes[0], notes[1]} <= set(files(directory))
    assert BOUND == notes[0].stat().st_size == notes[1].stat().st_size


def test_too_small_a_bound_is_refused(directory: Path) -> None:
    with pytest.raises(UsageError, match="16M are needed"):
        CacheDirectory(str(directory), BOUND - 1)


def test_the_directory_is_made_with_those_above_it(tmp_path: Path) -> None:
    base = RemoteBase(CONTENT)
    read(tmp_path / ".cache/qcowfs", base)

    assert 0o700 == (tmp_path / ".cache/qcowfs").stat().st_mode & 0o777
    assert [] != files(tmp_path / ".cache/qcowfs")


def test_what_is_no_directory_of_ours_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    for name, why in (("file", "Not a directory"), ("open", "other users may write"), ("file/b", "Not a directory")):
        with pytest.raises(UsageError, match=why):
            CacheDirectory(str(tmp_path / name))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_directory_of_another_user_is_refused(directory: Path) -> None:
    directory.mkdir(0o700)
    os.chown(directory, NOBODY, NOBODY)
    with pytest.raises(UsageError, match="belongs to another user"):
        CacheDirectory(str(directory))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m,mode=700", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.expect_warnings
def test_a_full_disk_ends_the_writing_and_not_the_reading(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = small_disk / "cache"
    read(directory)
    first = [record.getMessage() for record in caplog.records]
    fetched = read(directory).fetched

    assert [f"{directory}: no more blocks are kept from now on: {os.strerror(errno.ENOSPC)}"] == first
    assert 4 * MIB < fetched < SIZE - MIB


@pytest.mark.expect_warnings
def test_a_directory_that_was_removed_costs_a_line_in_the_log(
    directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mounted = Mounted(directory, RemoteBase(CONTENT))
    shutil.rmtree(directory)
    with mounted as source:
        assert CONTENT == source.read_at(0, SIZE)
        second = BlockSource(mounted.cache, RemoteBase(CONTENT).source, directory=mounted.directory, version="v3")
        assert CONTENT == second.read_at(0, SIZE)
        second.close()

    assert [f"{directory}: no blocks are kept of an image: No such file or directory"] == [
        record.getMessage() for record in caplog.records
    ]


READER = """
import json, random, sys
from tests.unit.test_cachedir import BOUND, CONTENT, MIB, SIZE, Mounted, taken
from tests.support.remotebase import RemoteBase, content_of
from pathlib import Path
path, seed, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
dice = random.Random(seed)
fetched = most = wrong = 0
print("ready", flush=True)
contents = [content_of(5 * MIB + 77 * image, image) for image in range(4)]
for turn in range(rounds):
    image = dice.randrange(4)
    content = contents[image]
    base = RemoteBase(content, name=f"here://{image}")
    with Mounted(path, base) as source:
        for _ in range(30):
            offset, length = dice.randrange(len(content)), dice.choice([1, 4096, 200_000, MIB])
            wrong += source.read_at(offset, length) != content[offset : offset + length]
            most = max(most, taken(path))
    fetched += base.fetched
print(json.dumps([wrong, fetched, most]), flush=True)
"""


def reader(path: Path, seed: int, rounds: int) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", READER, str(path), str(seed), str(rounds)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert "ready\n" == process.stdout.readline()
    return process


def test_processes_share_it_while_the_oldest_go(directory: Path) -> None:
    """The four images do not fit into it together."""
    directory.mkdir(0o700)
    readers = [reader(directory, seed, 8) for seed in range(3)]
    answers = [json.loads(process.communicate(timeout=120)[0]) for process in readers]

    assert [0, 0, 0] == [wrong for wrong, _, _ in answers]
    assert all(most <= BOUND for _, _, most in answers)
    assert all(fetched < 8 * 30 * MIB for _, fetched, _ in answers)


def test_a_writer_that_is_killed_leaves_nothing_wrong(directory: Path) -> None:
    directory.mkdir(0o700)
    dice = random.Random(8)
    images = [RemoteBase(content_of(5 * MIB + 77 * image, image), name=f"here://{image}") for image in range(4)]
    for seed in range(4):
        process = reader(directory, seed, 1000)
        written = 0
        while written < dice.randrange(MIB):  # at different moments, while something is being written
            written += taken(directory) if files(directory) else 0
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for image in images:
            read(directory, again(image))

    assert taken(directory) <= BOUND

"""What the blocks prove leaves nothing out of a `diff` of files: it is what it is when all of both trees is listed.

Evidence: trees that the kernel made, then changed by it, by debugfs behind all times, and by damage; the same command
with nothing proven is the judge. What that tells is compared with the kernel's and rsync's answers in test_filediff.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from qcowfs import cli
from qcowfs.inside.walk import File
from qcowfs.pruning import Left, Pruning
from tests.oracle.test_filediff import check
from tests.support import need
from tests.support.crash import LOGFLUSH, mounted, shut_down
from tests.support.guests import make_tree
from tests.support.states import State, overlays, seen_by_kernel

MIB = 1 << 20
SEED = int(os.environ.get("SEED", "1"))
KINDS = {
    "ext4": ("-t", "ext4"),
    "ext2": ("-t", "ext2", "-b", "4096"),
    "ext3": ("-t", "ext3", "-b", "1024", "-I", "128"),
    "small": ("-t", "ext4", "-b", "1024", "-g", "1024", "-O", "^flex_bg,^metadata_csum,meta_bg,^resize_inode"),
    "inline": ("-t", "ext4", "-I", "512", "-O", "inline_data,ea_inode,large_dir"),
    "cluster": ("-t", "ext4", "-O", "bigalloc", "-b", "1024", "-C", "4096"),
}
Told = tuple[int, bytes, bytes]
Both = Callable[..., tuple[Told, Told]]


class Counted:
    """How many directories were pruned, and how many not."""

    def __init__(self) -> None:
        self.pruned = self.listed = 0


@pytest.fixture
def counted() -> Counted:
    return Counted()


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes], counted: Counted) -> Both:
    """Run a command as it is, and with nothing proven."""
    real = Pruning.left

    def left(self: Pruning, old: File, new: File) -> Left | None:
        found = real(self, old, new)
        counted.pruned += found is not None
        counted.listed += found is None
        return found

    def run(*words: str | Path) -> tuple[Told, Told]:
        found = []
        for each in (left, lambda *_: None):
            monkeypatch.setattr(Pruning, "left", each)
            code = cli.main(["diff", "--json", *map(str, words)])
            said = capsysbinary.readouterr()
            found.append((code, said.out, said.err))
        return found[0], found[1]

    return run


def few_changes(dice: random.Random, root: Path) -> None:
    """Do a few things in a large tree."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    for path in dice.sample(files, 3):
        dice.choice([lambda p: p.write_bytes(b"x"), os.unlink, os.utime, lambda p: p.chmod(0o600)])(path)
    one, other = dice.sample(sorted(root.glob("d*")), 2)
    dice.choice(
        [
            lambda: one.rename(other / "moved"),
            lambda: (one / "link").hardlink_to(next(path for path in other.rglob("*") if path.is_file())),
            lambda: os.setxattr(one, b"user.large", bytes(700)),
            lambda: (one / "new").mkdir(),
            lambda: (one / "link").symlink_to("n" * 200),
            lambda: None,
        ]
    )()


def fill(root: Path) -> None:
    for number in range(60):
        directory = root / f"d{number % 12}" / f"e{number}"
        directory.mkdir(parents=True)
        for name in range(30):
            (directory / f"file{name}").write_bytes(b"%d" % name * length(number, name))
        os.setxattr(directory / "file3", b"user.note", b"n" * (700 if number % 7 == 0 else 10))


def length(number: int, name: int) -> int:
    return (number * 31 + name * 17) % 900


@pytest.fixture(scope="module")
def trees(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Make a file system of a kind with 1800 files in 73 directories."""
    need("mke2fs", "debugfs", "qemu-img", "losetup")

    @functools.cache
    def made(kind: str) -> Path:
        raw = tmp_path_factory.mktemp(kind) / "raw"
        make_tree(raw, 32 * MIB, fill, *KINDS[kind])
        return raw

    return made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cut"),
    [
        ("ext4", False),
        ("ext4", True),
        ("ext2", False),
        ("ext3", True),
        ("small", False),
        ("inline", True),
        ("cluster", False),
    ],
)
def test_what_the_kernel_changes(
    trees: Callable[[str], Path], tmp_path: Path, both: Both, counted: Counted, kind: str, *, cut: bool
) -> None:
    raws = [tmp_path / "old.raw", tmp_path / "new.raw"]
    shutil.copy(trees(kind), raws[0])
    shutil.copy(trees(kind), tmp_path / "disk")
    with mounted(tmp_path / "disk") as root:
        few_changes(random.Random(f"{SEED} {kind} {cut}"), root)
        if cut:
            shut_down(root, LOGFLUSH)
            shutil.copy(tmp_path / "disk", raws[1])
    if not raws[1].exists():
        shutil.copy(tmp_path / "disk", raws[1])
    image = tmp_path / "image.qcow2"
    old, new = (
        State(name, raw, *seen_by_kernel(raw)) for name, raw in zip(overlays(tmp_path, image, raws), raws, strict=True)
    )
    pruned, whole = both(image, old.point, new.point)

    assert whole == pruned
    check(old, new, json.loads(pruned[1])["changes"])
    assert (0 if kind == "inline" else 40) <= counted.pruned  # what is in inodes is listed


def by_debugfs(dice: random.Random, raw: Path) -> None:
    """Change what no time and no journal tells of."""
    place = f"/d{dice.randrange(12)}"
    inner = f"{place}/e{dice.randrange(5) * 12 + int(place[2:])}"
    name = f"{inner}/file{dice.randrange(30)}"
    one = dice.choice(
        [
            f"sif {name} mode 0100600",
            f"sif {name} size 17",
            f"sif {inner} mtime 20200101000000",
            f"sif {name} block[2] 5000",
            f"unlink {name}",
            f"kill_file {name}",
            f"clri {name}",
            f"ln {name} {place}/again",
            f"ln {inner} /d0/directory-again",
            f"link {name} /link",
            f"ea_set {name} user.note other",
            f"ea_rm {inner}/file3 user.note",
            f"symlink {place}/symbolic target",
            f"mkdir {place}/made",
            f"rmdir {inner}",
            f"set_super_value label x{dice.randrange(9)}",
        ]
    )
    subprocess.run(["debugfs", "-w", "-R", one, raw], check=True, capture_output=True)


def by_bytes(dice: random.Random, raw: Path) -> None:
    """Change a byte of what has any; of the inodes and directories, mostly."""
    data = bytearray(raw.read_bytes())
    used = [at for at in range(0, len(data), 4096) if any(data[at : at + 4096])]
    at = dice.choice(used[: len(used) // dice.choice([1, 4, 8])]) + dice.randrange(4096)
    data[at] = dice.randrange(256)
    raw.write_bytes(data)


def by_kernel(dice: random.Random, raw: Path) -> None:
    with mounted(raw) as root:
        few_changes(dice, root)


CHANGES = (by_kernel, by_debugfs, by_debugfs, by_bytes)


@pytest.mark.slow
@pytest.mark.expect_warnings
@pytest.mark.parametrize("seed", range(SEED * 100, SEED * 100 + 2))
def test_whatever_changes(trees: Callable[[str], Path], tmp_path: Path, both: Both, seed: int) -> None:
    dice = random.Random(seed)
    raws = [tmp_path / "old.raw", tmp_path / "new.raw"]
    kind = dice.choice(list(KINDS))
    for raw in raws:
        shutil.copy(trees(kind), raw)
    done = []
    for _ in range(dice.choice([1, 1, 3, 6])):
        change = dice.choice(CHANGES)
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # what is damaged cannot be mounted
            change(dice, raws[dice.random() < 0.8])
            done.append(change.__name__)
    image = tmp_path / "image.qcow2"
    points = overlays(tmp_path, image, raws)
    pruned, whole = both(*(["--norecovery"] if dice.random() < 0.3 else []), image, *points)

    assert whole == pruned, done

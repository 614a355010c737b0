"""Trees as the kernel of the tests' virtual machine shows them: for file systems that this machine's kernel lacks.

The guest is given a tree to write (a tar archive on a disk), and says what it finds as text on another disk.
"""

from __future__ import annotations

import io
import random
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.support.vm import Machine

__all__ = ["SLOT", "Told", "archive", "raw_to_qcow2", "read_told", "told", "write_tree"]

SLOT = 8 << 20  # bytes of the disk of answers for each of them
Told = tuple[int, int, int, int, int, int]  # permissions, size, blocks, and atime, mtime and ctime in seconds
ALPHABETS = (
    "abcdefghijklm nopqrstuvwxyz",
    "ABCDEFGHIJKLM",
    "äöüßéèñÆŁ€",
    "日本語文字名前",
    "😀🎉𝄞",
    "a.b-c_d+e,f;g=h[i]",
)


def write_tree(rng: random.Random, budget: int) -> dict[str, bytes | None]:
    """Return a seeded tree: paths and contents, None for directories. `budget` is in bytes, roughly."""
    tree: dict[str, bytes | None] = {"deep": None, "names": None, "empty": b"", "no entries": None}
    path = "deep"
    for level in range(12):
        path += f"/level {level} of a deep tree"
        tree[path] = None
    tree[f"{path}/at the bottom.txt"] = rng.randbytes(1000)
    for number in range(150):
        tree[f"names/{number}{_name(rng)}"] = rng.randbytes(rng.choice((0, 1, 100, 700)))
    for number in range(40):  # all with the same beginning of their short names
        tree[f"names/long file name {number}.text"] = b"%d" % number
    for name in ("SHORT.TXT", "lower.txt", "Mixed.Txt", "UP.low", "low.UP", "noext", "dots.in.name.tar.gz", ".hidden"):
        tree[f"names/{name}"] = name.encode()
    for number in range(6):
        tree[f"large {number}"] = rng.randbytes(rng.randrange(budget // 12))
    return tree


def _name(rng: random.Random) -> str:
    alphabet = rng.choice(ALPHABETS)
    longest = 250 // max(len(letter.encode()) for letter in alphabet)
    return "".join(rng.choices(alphabet, k=rng.randrange(1, longest))).rstrip(" .") + "x"


def archive(tree: Mapping[str, bytes | None], rng: random.Random) -> bytes:
    """Return `tree` as a tar archive, with seeded times."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
        for path, content in tree.items():
            member = tarfile.TarInfo(path)
            member.mtime = rng.randrange(320_000_000, 4_000_000_000)
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.mode = 0o755 if content is None or rng.random() < 0.9 else 0o555
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))
    return stream.getvalue()


def told(machine: Machine, answers: str, slot: int) -> None:
    """Have the guest tell of /mnt on the disk `answers`."""
    stat = "stat -c '%a|%s|%b|%X|%Y|%Z|%n'"
    machine.run(
        f"cd /mnt && find . -print0 | xargs -0 {stat} | dd of={answers} bs=1M seek={2 * slot * SLOT >> 20}", 300
    )
    hashes = "find . -type f -print0 | xargs -0 sha256sum"
    machine.run(f"cd /mnt && {hashes} | dd of={answers} bs=1M seek={(2 * slot + 1) * SLOT >> 20}", 300)


def read_told(answers: Path, slot: int) -> tuple[dict[bytes, Told], dict[bytes, str]]:
    """Return what `told` wrote: facts of each name (b"" is the root), and the SHA-256 of each file."""
    facts: dict[bytes, Told] = {}
    for line in _lines(answers, 2 * slot):
        permissions, *numbers, name = line.split(b"|", 6)
        size, blocks, atime, mtime, ctime = map(int, numbers)
        facts[name[2:]] = (int(permissions, 8), size, blocks, atime, mtime, ctime)
    hashes = {line[66:].removeprefix(b"./"): line[:64].decode() for line in _lines(answers, 2 * slot + 1)}
    return facts, hashes


def _lines(answers: Path, slot: int) -> Sequence[bytes]:
    with answers.open("rb") as file:
        file.seek(slot * SLOT)
        return file.read(SLOT).partition(b"\0")[0].splitlines()


def raw_to_qcow2(raw: Path) -> Path:
    """Return a qcow2 image with the bytes of `raw`."""
    image = raw.with_suffix(".qcow2")
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", str(raw), str(image)], check=True)
    return image

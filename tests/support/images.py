"""Seeded random images, made by qemu-img and qemu-io, and QEMU's word on what is in them.

`python -m tests.support.images SEED DIRECTORY` makes the image of a seed again and prints how. Everything comes from
the one seed. Where QEMU refuses an operation (a resize with snapshots in version 2, compressing over allocated
clusters), it does not happen: what counts is the image in the end, and QEMU is asked what that holds.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["MadeImage", "convert", "make", "qemu", "qemu_map", "reverted"]

TIMEOUT = 60  # seconds that one QEMU tool may take


def qemu(*words: str | Path, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    """Run a QEMU tool; with `check`, a failure is an error that shows what it said."""
    result = subprocess.run([str(word) for word in words], capture_output=True, timeout=TIMEOUT)
    if check and result.returncode:
        raise AssertionError(f"{' '.join(map(str, words))}: {result.stderr.decode(errors='replace')}")
    return result


def convert(image: Path, image_format: str) -> bytes | None:
    """Return the active state of `image` as QEMU reads it; None where QEMU cannot read all of it."""
    raw = image.with_suffix(".converted")
    result = qemu("qemu-img", "convert", "-f", image_format, "-O", "raw", image, raw, check=False)
    try:
        return raw.read_bytes() if result.returncode == 0 else None
    finally:
        raw.unlink(missing_ok=True)


def reverted(image: Path, number: int) -> bytes | None:
    """Return the state of the snapshot at `number` (0-based) of the table: a copy is reverted to it and converted.

    None where QEMU cannot read all of it; NotImplementedError where QEMU cannot revert to it.

    Never `convert -l`: it keeps the active size. `-a` looks for ids first, and ids are unique here.
    """
    copy = image.with_name(f"{image.stem}-copy.qcow2")
    shutil.copyfile(image, copy)
    try:
        result = qemu("qemu-img", "snapshot", "-a", str(number + 1), copy, check=False)
        if result.returncode:
            raise NotImplementedError(result.stderr.decode())
        return convert(copy, "qcow2")
    finally:
        copy.unlink()


def qemu_map(image: Path, image_format: str) -> list[dict[str, Any]] | None:
    """Return what `qemu-img map` says of the active state; None where it fails."""
    result = qemu("qemu-img", "map", "--output=json", "-f", image_format, image, check=False)
    found: list[dict[str, Any]] | None = json.loads(result.stdout) if result.returncode == 0 else None
    return found


@dataclass
class MadeLayer:
    """One file of a chain, and how many snapshots it holds."""

    path: Path
    format: str
    snapshots: int = 0
    preallocated: bool = False  # QEMU then looks through to the host's holes in its map


@dataclass
class MadeImage:
    """A chain from the top down, and the commands that made it."""

    seed: int
    layers: list[MadeLayer] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)

    @property
    def top(self) -> Path:
        return self.layers[0].path


def make(seed: int, directory: Path) -> MadeImage:
    """Make the image of `seed` in `directory`."""
    return _Maker(seed, directory).image()


class _Maker:
    def __init__(self, seed: int, directory: Path) -> None:
        self._random = random.Random(seed)
        self._directory = directory
        self._made = MadeImage(seed)

    def image(self) -> MadeImage:
        depth = self._random.choice([0, 0, 0, 1, 1, 2, 3, 4])
        size = self._size(1 << 16)
        for number in range(depth, -1, -1):
            self._add_layer(number, number == depth, size)
            size = self._next_size(size)
        return self._made

    def _run(self, *words: str | Path) -> bool:
        self._made.commands.append(" ".join(f"'{word}'" if " " in str(word) else str(word) for word in words))
        return qemu(*words, check=False).returncode == 0

    def _size(self, unit: int) -> int:
        """A size that ends anywhere: on a cluster, on a sector, and in raw files on a byte."""
        return max(512, self._random.randrange(1, 40) * unit + self._random.choice([0, 0, 512, 1024, 3 * 512]))

    def _next_size(self, size: int) -> int:
        """The overlay's: mostly as its backing file, else shorter or longer."""
        return self._random.choice([size, size, size * 2, max(512, size // 2 // 512 * 512)])

    def _add_layer(self, number: int, is_base: bool, size: int) -> None:
        formats = ["qcow2"] * 6 + ["qcow"] + ["raw"] * (is_base and number > 0)
        image_format = self._random.choice(formats)
        layer = MadeLayer(self._directory / f"layer{number}.{image_format}", image_format)
        if image_format == "raw":
            self._make_raw(layer, size)
        elif image_format == "qcow":
            self._make_qcow(layer, size)
        else:
            self._make_qcow2(layer, size)
        self._made.layers.insert(0, layer)

    def _backing(self) -> list[str]:
        if not self._made.layers:
            return []
        below = self._made.layers[0]
        return ["-b", below.path.name, "-F", below.format]

    def _make_raw(self, layer: MadeLayer, size: int) -> None:
        with layer.path.open("wb") as file:
            file.truncate(size + self._random.choice([0, 3]))
            for _ in range(3):
                file.seek(self._random.randrange(size))
                file.write(self._random.randbytes(min(5000, size - file.tell())))

    def _make_qcow(self, layer: MadeLayer, size: int) -> None:
        self._run("qemu-img", "create", "-q", "-f", "qcow", *self._backing(), layer.path, str(size))
        self._write(layer, self._operations(size, 4096, ["write", "write", "write -c"]))

    def _make_qcow2(self, layer: MadeLayer, size: int) -> None:
        options = self._options(layer)
        words = [f"{key}={value}" for key, value in options.items() if key != "cluster"]
        words = ["-o", ",".join(words), *self._backing(), str(layer.path), str(size)]
        made = self._run("qemu-img", "create", "-q", "-f", "qcow2", *words)
        assert made, self._made.commands[-1]
        cluster = int(options["cluster_size"])
        for round_number in range(self._random.randrange(1, 4)):
            self._write(layer, self._operations(size, cluster, self._kinds(options)))
            if "data_file" not in options and self._random.random() < 0.6:
                layer.snapshots += self._run("qemu-img", "snapshot", "-c", f"s{round_number}", layer.path)
            if self._random.random() < 0.3:
                size = self._resize(layer, size, cluster)

    def _options(self, layer: MadeLayer) -> dict[str, str]:
        choose = self._random.choice
        options = {"compat": choose(["0.10", "1.1", "1.1", "1.1"])}
        bits = choose([9, 10, 12, 14, 16, 16, 18, 21])
        if options["compat"] == "1.1":
            if choose([True, False, False]):
                options["extended_l2"] = "on"
                bits = max(bits, 14)
            if choose([True, False]):
                options["compression_type"] = "zstd"
            if choose([True, False]):
                options["refcount_bits"] = str(choose([1, 2, 4, 8, 32, 64]))
            if self._random.random() < 0.15:
                options["data_file"] = str(layer.path.with_suffix(".data"))
                options["data_file_raw"] = "off" if self._made.layers else choose(["on", "off"])
        if self._random.random() < 0.1 and not self._made.layers:
            options["preallocation"] = choose(["metadata", "falloc", "full"])
            layer.preallocated = True
        options["cluster_size"] = str(1 << bits)
        return options

    def _kinds(self, options: dict[str, str]) -> list[str]:
        kinds = ["write", "write", "write -z", "write -z -u", "discard"]
        # Compressed data cannot be in an external data file, and 1 bit cannot count two streams in one cluster.
        if "data_file" not in options:
            kinds += ["write -c", "write -c", "write -b"]
        return kinds

    def _operations(self, size: int, cluster: int, kinds: list[str]) -> list[str]:
        return [
            self._operation(self._random.choice(kinds), size, cluster) for _ in range(self._random.randrange(2, 14))
        ]

    def _operation(self, kind: str, size: int, cluster: int) -> str:
        sectors = max(1, size // 512)
        start = self._random.randrange(sectors) * 512
        length = min(self._random.randrange(1, 400) * 512, sectors * 512 - start)
        pattern = f" -P {self._random.randrange(1, 256)}"
        if kind == "write -c":
            start, length = start // cluster * cluster, cluster
        if kind == "write -b":  # VM state: past the disk, and never to be seen in it
            return f"write -b{pattern} {start} {max(512, length)}"
        return f"{kind}{'' if '-z' in kind or kind == 'discard' else pattern} {start} {max(512, length)}"

    def _write(self, layer: MadeLayer, operations: list[str]) -> None:
        commands = [word for operation in operations for word in ("-c", operation)]
        self._run("qemu-io", "-f", layer.format, *commands, layer.path)

    def _resize(self, layer: MadeLayer, size: int, cluster: int) -> int:
        new = self._random.choice([size + cluster * 3 + 512, size * 2, max(512, size // 2 // 512 * 512)])
        shrink = ["--shrink"] if new < size else []
        return new if self._run("qemu-img", "resize", "-q", *shrink, "-f", "qcow2", layer.path, str(new)) else size


if __name__ == "__main__":
    again = make(int(sys.argv[1]), Path(sys.argv[2]).resolve())
    print("\n".join(again.commands))

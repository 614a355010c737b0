"""Seeded random images, made by qemu-img and qemu-io.

`python -m tests.support.images SEED DIRECTORY` makes the image of a seed again and prints how. Everything comes from
the one seed. Where QEMU refuses an operation (a resize with snapshots in version 2, compressing over allocated
clusters), it does not happen: what counts is the image in the end, and QEMU is asked what that holds.
"""

from __future__ import annotations

import json
import random
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.qemu import qemu

__all__ = ["MadeImage", "MadeLayer", "make", "qemu"]

MIB = 1 << 20
LARGE = 0.08  # of the images have tables that are longer than qcowfs reads at once (4 KiB)
CLUSTER_BITS = [9, 10, 12, 14, 16, 16, 18, 21]
NAMES = ["s", "same", "1", "2", "two/../x y", "..", "ü", "a,b=c", "#1", "s.raw", "current"]


@dataclass
class MadeLayer:
    """One file of a chain.

    Attributes:
        snapshots: id and name of each, in the table's order, as QEMU tells.
    """

    path: Path
    format: str
    snapshots: list[tuple[str, str]] = field(default_factory=list)


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
        self._large = self._random.random() < LARGE

    def image(self) -> MadeImage:
        depth = self._random.choice([0, 0, 0, 1, 1, 2, 3, 4])
        size = self._size()
        for number in range(depth, -1, -1):
            self._add_layer(number, number == depth, size)
            size = self._next_size(size)
        return self._made

    def _run(self, *words: str | Path) -> bool:
        self._made.commands.append(shlex.join(map(str, words)))
        return qemu(*words, check=False).returncode == 0

    def _size(self) -> int:
        """A size that ends anywhere: on a cluster, on a sector."""
        base = self._random.randrange(40, 80) * MIB if self._large else self._random.randrange(1, 40) << 16
        return base + self._random.choice([0, 0, 512, 1024, 3 * 512])

    def _next_size(self, size: int) -> int:
        """The overlay's: mostly as its backing file, else shorter or longer."""
        return self._random.choice([size, size, self._longer(size), max(512, size // 2 // 512 * 512)])

    def _longer(self, size: int) -> int:
        return size + MIB + 512 if self._large else size * 2

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
            layer.snapshots = _snapshots(layer.path)
        self._made.layers.insert(0, layer)

    def _backing(self) -> list[str]:
        if not self._made.layers:
            return []
        below = self._made.layers[0]
        return ["-b", below.path.name, "-F", below.format]

    def _make_raw(self, layer: MadeLayer, size: int) -> None:
        """Holes and data, and an end on any byte."""
        with layer.path.open("wb") as file:
            file.truncate(size + self._random.choice([0, 3]))
            for _ in range(3):
                file.seek(self._random.randrange(size))
                file.write(self._random.randbytes(min(5000, size - file.tell())))
        self._made.commands.append(f"# {layer.path.name}: see _make_raw")

    def _make_qcow(self, layer: MadeLayer, size: int) -> None:
        self._run("qemu-img", "create", "-q", "-f", "qcow", *self._backing(), layer.path, str(size))
        self._write(layer, self._operations(size, 4096, ["write", "write", "write -c"]))

    def _make_qcow2(self, layer: MadeLayer, size: int) -> None:
        options = self._options(layer)
        words = [",".join(f"{key}={value}" for key, value in options.items()), *self._backing()]
        made = self._run("qemu-img", "create", "-q", "-f", "qcow2", "-o", *words, layer.path, str(size))
        assert made, self._made.commands[-1]
        cluster = int(options["cluster_size"])
        for round_number in range(self._random.randrange(1, 4)):
            self._write(layer, self._operations(size, cluster, self._kinds(options)))
            if "data_file" not in options:
                self._change_snapshots(layer, round_number)
            if self._random.random() < 0.3:
                size = self._resize(layer, size, cluster)

    def _options(self, layer: MadeLayer) -> dict[str, str]:
        choose = self._random.choice
        options = {"compat": choose(["0.10", "1.1", "1.1", "1.1"])}
        bits = choose(CLUSTER_BITS)
        if options["compat"] == "1.1":
            if choose([True, False, False]):
                options["extended_l2"] = "on"
                bits = max(bits, 14)
            if choose([True, False]):
                options["compression_type"] = "zstd"
            if choose([True, False]):
                options["refcount_bits"] = str(choose([1, 2, 4, 8, 32, 64]))
            if choose([True, False, False, False]):
                options["lazy_refcounts"] = "on"
            if self._random.random() < 0.15:
                options["data_file"] = str(layer.path.with_suffix(".data"))
                options["data_file_raw"] = "off" if self._made.layers else choose(["on", "off"])
        if self._random.random() < 0.1 and not self._made.layers and not self._large:
            options["preallocation"] = choose(["metadata", "falloc", "full"])
        options["cluster_size"] = str(1 << bits)
        return options

    def _kinds(self, options: dict[str, str]) -> list[str]:
        kinds = ["write", "write", "write -z", "write -z -u", "discard"]
        if "data_file" not in options:  # which holds neither compressed data nor VM state
            kinds += ["write -c", "write -c", "write -b"]
        return kinds

    def _operations(self, size: int, cluster: int, kinds: list[str]) -> list[str]:
        return [
            self._operation(self._random.choice(kinds), size, cluster) for _ in range(self._random.randrange(2, 14))
        ]

    def _operation(self, kind: str, size: int, cluster: int) -> str:
        sectors = size // 512
        start = self._random.randrange(sectors) * 512
        most = 40_000 if self._large and cluster >= 16384 and self._random.random() < 0.2 else 400
        length = min(self._random.randrange(1, most) * 512, sectors * 512 - start)
        pattern = f" -P {self._random.randrange(1, 256)}"
        if kind == "write -c":
            start, length = start // cluster * cluster, cluster
        # -b is VM state: past the disk, and never to be seen in it.
        return f"{kind}{'' if '-z' in kind or kind == 'discard' else pattern} {start} {length}"

    def _write(self, layer: MadeLayer, operations: list[str]) -> None:
        commands = [word for operation in operations for word in ("-c", operation)]
        self._run("qemu-io", "-f", layer.format, *commands, layer.path)

    def _change_snapshots(self, layer: MadeLayer, round_number: int) -> None:
        if self._random.random() < 0.6:
            name = self._random.choice([*NAMES, *[f"s{round_number}"] * len(NAMES)])
            self._run("qemu-img", "snapshot", "-c", name, layer.path)
        if round_number and self._random.random() < 0.25:
            # Deleting (by name) leaves gaps in the ids, going back (by id) makes two states share clusters.
            verb = self._random.choice([("-d", "s0"), ("-d", "s1"), ("-a", "1"), ("-a", "2")])
            self._run("qemu-img", "snapshot", *verb, layer.path)

    def _resize(self, layer: MadeLayer, size: int, cluster: int) -> int:
        new = self._random.choice([size + cluster * 3 + 512, self._longer(size), max(512, size // 2 // 512 * 512)])
        shrink = ["--shrink"] if new < size else []
        return new if self._run("qemu-img", "resize", "-q", *shrink, "-f", "qcow2", layer.path, str(new)) else size


def _snapshots(image: Path) -> list[tuple[str, str]]:
    told = json.loads(qemu("qemu-img", "info", "--output=json", "-f", "qcow2", image).stdout)
    return [(snapshot["id"], snapshot["name"]) for snapshot in told.get("snapshots", [])]


if __name__ == "__main__":
    again = make(int(sys.argv[1]), Path(sys.argv[2]).resolve())
    print("\n".join(again.commands))

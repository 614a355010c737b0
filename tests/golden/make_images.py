"""Makes the golden images again: `python -m tests.golden.make_images` (needs qemu-img and qemu-io).

Each recipe is the lines that were run, in a directory of its own; MANIFEST.json keeps them with the hash of every file
and QEMU's word on what every point holds. tests/unit/test_golden.py reads the images where there is no QEMU. They are
kept gzipped, because most of an image is zeros: no file here is over 64 KiB.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.qemu import convert, qemu, qemu_map, reverted
from tests.support.reader import runs_of_qemu

GOLDEN = Path(__file__).resolve().parent
MANIFEST = GOLDEN / "MANIFEST.json"
TEXT = "".join(f"line {number} of a text that compresses\n" for number in range(2000)).encode()
RUN = re.compile(r"\[\s[\s\d,truefalsn]*\]")  # goes on one line
NOISE = b"".join(hashlib.sha256(bytes([number])).digest() for number in range(256))


@dataclass(frozen=True)
class Recipe:
    """How a chain is made; `top` is its active image, `layers` all of its images from the top down."""

    name: str
    about: str
    lines: tuple[str, ...]
    layers: tuple[tuple[str, str], ...] = (("image.qcow2", "qcow2"),)

    @property
    def top(self) -> str:
        return self.layers[0][0]


def image(name: str, about: str, options: str, size: str, *steps: str) -> Recipe:
    """Return the recipe of one qcow2 image: what to do with it after creating it."""
    create = f"qemu-img create -q -f qcow2 -o {options} image.qcow2 {size}"
    return Recipe(name, about, (create, *steps))


def io(*commands: str, file: str = "image.qcow2", image_format: str = "qcow2") -> str:
    """Return a line of qemu-io."""
    words = [word for command in commands for word in ("-c", command)]
    return shlex.join(["qemu-io", "-f", image_format, *words, file])


def snapshot(name: str) -> str:
    return shlex.join(["qemu-img", "snapshot", "-c", name, "image.qcow2"])


RECIPES = (
    image(
        "default",
        "as qemu-img makes it: version 3, clusters of 64 KiB, two snapshots",
        "compat=1.1",
        "8M",
        io("write -P 0x11 0 1M", "write -s noise 3M 8k"),
        snapshot("before-upgrade"),
        io("write -P 0x22 512k 1M", "write -z 3M 64k", "discard 0 64k"),
        snapshot("after upgrade"),
        io("write -P 0x33 7M 1M"),
    ),
    image(
        "version-2",
        "version 2, clusters of 512 bytes: many L2 tables, and compressed clusters at odd offsets",
        "compat=0.10,cluster_size=512",
        "200k",
        io("write -P 1 0 9k", *[f"write -c -s text {10240 + number * 512} 512" for number in range(8)]),
        snapshot("one"),
        io("write -P 2 4k 1k", "write -P 3 199k 1k"),
    ),
    image(
        "resized",
        "a snapshot smaller, and one larger, than the active disk; VM state after the first",
        "cluster_size=4k",
        "256k",
        io("write -P 0x11 0 256k", "write -b -P 0xbb 0 64k"),
        snapshot("256k"),
        "qemu-img resize -q image.qcow2 1M",
        io("write -P 0x22 1020k 4k"),
        snapshot("1M"),
        "qemu-img resize -q --shrink image.qcow2 100352",
        io("write -P 0x33 0 512"),
    ),
    image(
        "names",
        "names as users make them: twice the same, another's id, a path, not UTF-8, a number of odd lengths",
        "cluster_size=1k",
        "16k",
        *[
            line
            for number, name in enumerate(["one", "one", "4", "two/../x y", "..", os.fsdecode(b"\xff\xfe"), "x" * 255])
            for line in (io(f"write -P {number + 1} 0 1k"), snapshot(name))
        ],
    ),
    image(
        "zstd",
        "zstd streams, one of them not compressible",
        "compression_type=zstd,cluster_size=4k",
        "64k",
        io("write -c -s text 0 16k", "write -c -P 7 16k 4k", "write -c -s noise 20k 8k", "write -z 32k 4k"),
        snapshot("one"),
        io("write -P 9 2k 4k"),
    ),
    image(
        "extended",
        "extended L2 entries: subclusters of 512 bytes that are data, zeros and nothing",
        "extended_l2=on,cluster_size=16k",
        "128k",
        io("write -P 1 512 512", "write -P 2 2k 1536", "write -z 1k 512", "write -z -u 16k 16k", "write -P 3 48k 100"),
        snapshot("one"),
        io("write -P 4 50k 1k", "discard 2k 512", "write -P 5 127k 1k"),
    ),
    image(
        "extended-compressed",
        "extended L2 entries of compressed clusters, zlib",
        "extended_l2=on,cluster_size=16k",
        "100k",
        io("write -c -s text 0 64k", "write -P 6 20k 512"),
    ),
    image(
        "refcounts-of-1-bit",
        "the narrowest refcounts",
        "refcount_bits=1,cluster_size=2k",
        "64k",
        io("write -s noise 1k 8k", "write -z 4k 4k"),
    ),
    image(
        "dirty",
        "refcounts left behind by a process that died: incompatible feature bit 0",
        "lazy_refcounts=on,cluster_size=4k",
        "64k",
        io("write -P 5 0 8k", "abort"),
    ),
    image(
        "data-file",
        "an external data file, by a relative name",
        "data_file=data.bin,cluster_size=4k",
        "64k",
        io("write -s noise 4k 8k", "write -z 8k 4k", "discard 32k 4k"),
    ),
    image(
        "data-file-raw",
        "an external data file that is the disk by itself",
        "data_file=data.raw,data_file_raw=on,cluster_size=4k",
        "64k",
        io("write -s noise 4k 8k", "write -z 8k 4k"),
    ),
    Recipe(
        "version-1",
        "qcow version 1, compressed clusters too",
        (
            "qemu-img create -q -f qcow image.qcow 100352",
            io(
                "write -s noise 0 8k",
                "write -c -s text 12k 4k",
                "write -P 8 96k 2k",
                file="image.qcow",
                image_format="qcow",
            ),
        ),
        (("image.qcow", "qcow"),),
    ),
    Recipe(
        "chain",
        "version 3 over version 2 over raw; shorter, longer, with other clusters, and a snapshot in each qcow2",
        (
            "dd if=noise of=base.raw bs=7003 count=1 status=none",
            "qemu-img create -q -f qcow2 -o compat=0.10,cluster_size=1k -b base.raw -F raw middle.qcow2 16k",
            io("write -P 1 2k 1k", "write -P 2 12k 1k", file="middle.qcow2"),
            "qemu-img snapshot -c m middle.qcow2",
            io("write -P 3 0 512", file="middle.qcow2"),
            "qemu-img create -q -f qcow2 -o cluster_size=4k -b middle.qcow2 -F qcow2 top.qcow2 32k",
            io("write -z 12k 1k", "write -P 4 20k 2k", file="top.qcow2"),
            "qemu-img snapshot -c t top.qcow2",
            io("discard 20k 4k", "write -P 5 5k 512", file="top.qcow2"),
        ),
        (("top.qcow2", "qcow2"), ("middle.qcow2", "qcow2"), ("base.raw", "raw")),
    ),
)


def main() -> None:
    """Make all images and the manifest."""
    for old in GOLDEN.glob("*/*.gz"):
        old.unlink()
    version = qemu("qemu-img", "--version").stdout.decode().split()[2]
    images = {recipe.name: made(recipe) for recipe in RECIPES}
    text = json.dumps({"qemu": version, "images": images}, indent=1) + "\n"
    MANIFEST.write_text(RUN.sub(lambda run: " ".join(run[0].split()), text))


def made(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe and keep its files; return what the manifest says of them."""
    folder = GOLDEN / recipe.name
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work, contextlib.chdir(work):
        Path("text").write_bytes(TEXT)
        Path("noise").write_bytes(NOISE)
        for line in recipe.lines:
            qemu(*shlex.split(line), check="abort" not in line)
        Path("text").unlink()
        Path("noise").unlink()
        files = {path.name: kept(path, folder) for path in sorted(Path().iterdir())}
        return {
            "about": recipe.about,
            "lines": recipe.lines,
            "top": recipe.top,
            "files": files,
            "points": [point for depth in range(len(recipe.layers)) for point in points(recipe, depth)],
        }


def kept(path: Path, folder: Path) -> str:
    """Keep a file gzipped; return the hash of what it holds."""
    data = path.read_bytes()
    (folder / f"{path.name}.gz").write_bytes(gzip.compress(data, mtime=0))
    return hashlib.sha256(data).hexdigest()


def points(recipe: Recipe, depth: int) -> list[dict[str, Any]]:
    """Return what QEMU says of a layer's active state and of its snapshots."""
    name, image_format = recipe.layers[depth]
    layer = Path(name)
    found = [{"depth": depth, "id": None, "name": None, **state(layer, image_format, depth)}]
    told = json.loads(qemu("qemu-img", "info", "--output=json", "-f", image_format, layer).stdout)
    for entry in told.get("snapshots", []):
        with reverted(layer, entry["id"]) as copy:
            found.append({"depth": depth, "id": entry["id"], "name": entry["name"], **state(copy, image_format, depth)})
    return found


def state(layer: Path, image_format: str, depth: int) -> dict[str, Any]:
    data = convert(layer, image_format)
    assert data is not None
    runs = [run._replace(depth=run.depth + depth) for run in runs_of_qemu(qemu_map(layer, image_format))]
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "map": runs}


if __name__ == "__main__":
    if shutil.which("qemu-img") is None:
        raise SystemExit("qemu-img: not installed")
    main()

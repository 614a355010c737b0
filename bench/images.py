"""The images that are measured: each is made once, in a folder of its own, with what QEMU reads from it beside it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench import contents, scattered
from bench.programs import run
from tests.mount.images import with_many_snapshots

MIB, GIB, TIB = 1 << 20, 1 << 30, 1 << 40
SIZE, DATA = GIB, 512 * MIB  # of most images: more data than any cache of a daemon, and small enough for the kernel's
SNAPSHOTS, MEASURED_SNAPSHOT = 50, "s10"
BEFORE, AFTER = "before", "after"  # snapshots of the image whose points are compared
# Of the images with two such points: of the larger one, comparing all takes long beside the start of any program, and
# it is as large as the memory of a usual machine can hold, once as an image and once as a raw file.
CHURNED = {"churn": 4 * GIB, "churn8": 8 * GIB}
TABLES = 20_480
RECIPE = 1  # raise it when an image is made in another way, so that kept ones are made again


@dataclass(frozen=True)
class Image:
    """An image and the truth about it.

    Attributes:
        name: of the recipe.
        path: the image, the topmost of a chain.
        raw: what `qemu-img convert` makes of it: holes where no data is.
        snapshot: the internal snapshot that is measured, or "" for the active state.
    """

    name: str
    path: Path
    raw: Path
    snapshot: str = ""

    def files(self) -> list[Path]:
        """Return all files of the image, without what is beside it for the benchmark."""
        return sorted(self.path.parent.glob("*.qcow2"))


class Images:
    """Makes images on demand in `directory`, and finds those that an earlier run made there."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Image:
        """Return an image that is complete and checked."""
        folder = self._directory / f"{name}-{RECIPE}"
        image = self._in(folder, name)
        if not folder.exists():
            self._make(folder, name)
        return image

    def _in(self, folder: Path, name: str) -> Image:
        snapshot = MEASURED_SNAPSHOT if name == "snapshots" else ""
        return Image(name, folder / "image.qcow2", folder / "truth.raw", snapshot)

    def _make(self, folder: Path, name: str) -> None:
        """Make it under another name first: an interrupted run leaves nothing that looks complete."""
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        image = self._in(partial, name)
        RECIPES[name](image.path, self)
        for leftover in partial.glob("*.content"):
            leftover.unlink()
        write_truth(image)
        partial.rename(folder)


def write_truth(image: Image) -> None:
    """Let QEMU check the image and say what is in it."""
    if image.name != "thousand":  # its snapshots share an L1 table, see with_many_snapshots
        run("qemu-img", "check", "-q", image.path)
    state = ("-l", f"snapshot.name={image.snapshot}") if image.snapshot else ()
    run("qemu-img", "convert", "-f", "qcow2", *state, "-O", "raw", image.path, image.raw)


def converted(path: Path, write: Callable[[Path], None], *options: str) -> None:
    """Make a raw file, and an image of it with qemu-img."""
    raw = path.with_suffix(".content")
    write(raw)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options, raw, path)


def plain(path: Path, images: Images) -> None:
    """Random data, uncompressed, clusters of 64 KiB, in order."""
    converted(path, lambda raw: contents.write_random(raw, SIZE, DATA))


def plain_of_2_gib(path: Path, images: Images) -> None:
    """The same with 2 GiB: more than what starting a program takes shows beside it."""
    converted(path, lambda raw: contents.write_random(raw, 2 * GIB, 2 * GIB))


def half(path: Path, images: Images) -> None:
    """Half of it holes, in runs of 64 KiB to 1 MiB."""
    converted(path, lambda raw: contents.write_sparse(raw, SIZE, 64 << 10, 16))


def zlib(path: Path, images: Images) -> None:
    """Realistic data, compressed with zlib."""
    converted(path, lambda raw: contents.write_realistic(raw, DATA), "-c")


def zstd(path: Path, images: Images) -> None:
    """Realistic data, compressed with zstd."""
    converted(path, lambda raw: contents.write_realistic(raw, DATA), "-c", "-o", "compression_type=zstd")


def extended(path: Path, images: Images) -> None:
    """Extended L2 entries: runs of 4 to 32 KiB, so that most clusters are partly allocated."""
    options = ("-S", "4k", "-o", "extended_l2=on,cluster_size=64k")
    converted(path, lambda raw: contents.write_sparse(raw, SIZE, 4096, 8, share=0.6), *options)


def chain(layers: int) -> Callable[[Path, Images], None]:
    """Return the recipe of a chain whose every data cluster lies in one of `layers` layers, at random."""

    def make(path: Path, images: Images) -> None:
        choose = random.Random(layers)
        placed: list[list[int]] = [[] for _ in range(layers)]
        for cluster in range(DATA // scattered.CLUSTER):
            placed[choose.randrange(layers)].append(cluster * scattered.CLUSTER)
        names = [*(f"layer-{number:02}.qcow2" for number in range(1, layers)), path.name]
        for name, backing, offsets in zip(names, ["", *names[:-1]], placed, strict=True):
            scattered.write(path.with_name(name), SIZE, offsets, backing=backing)

    return make


def snapshots(path: Path, images: Images) -> None:
    """The plain image with 50 internal snapshots, and 32 clusters written after each."""
    shutil.copyfile(images.get("plain").path, path)
    choose = random.Random(SNAPSHOTS)
    for number in range(1, SNAPSHOTS + 1):
        run("qemu-img", "snapshot", "-q", "-c", f"s{number}", path)
        places = (choose.randrange(DATA >> 16) << 16 for _ in range(32))
        commands = [word for place in places for word in ("-c", f"write -P {number} {place} 64k")]
        run("qemu-io", "-f", "qcow2", *commands, path)


def copy_of(path: Path) -> Path:
    """Return where an image has its copy."""
    return path.with_name("copy.qcow2")


def changed(size: int) -> int:
    """Return how many bytes of so large an image are written between its two points: 2 %, in clusters."""
    return (size // 50) >> 16 << 16


def churn(size: int) -> Callable[[Path, Images], None]:
    """Return the recipe of random data with two internal snapshots, and 2 % of its clusters written between them."""

    def make(path: Path, images: Images) -> None:
        converted(path, lambda raw: contents.write_random(raw, size, size))
        run("qemu-img", "snapshot", "-q", "-c", BEFORE, path)
        places = random.Random(2).sample(range(size >> 16), changed(size) >> 16)
        commands = [word for place in places for word in ("-c", f"write -P 2 {place << 16} 64k")]
        run("qemu-io", "-f", "qcow2", *commands, path)
        run("qemu-img", "snapshot", "-q", "-c", AFTER, path)

    return make


def one_tib(path: Path, images: Images) -> None:
    """1 TiB with 1 GiB of data in 64 places, and a copy of the file, which shares nothing with it."""
    run("qemu-img", "create", "-q", "-f", "qcow2", path, str(TIB))
    commands = [word for number in range(64) for word in ("-c", f"write -P {number + 1} {number * 16}G 16M")]
    run("qemu-io", "-f", "qcow2", *commands, path)
    shutil.copyfile(path, copy_of(path))


def four_tib(path: Path, images: Images) -> None:
    """4,096 full clusters at random places of 4 TiB."""
    choose = random.Random(4)
    clusters = choose.sample(range(4 * TIB // scattered.CLUSTER), 4096)
    scattered.write(path, 4 * TIB, [cluster * scattered.CLUSTER for cluster in clusters])


def twelve_tib(path: Path, images: Images) -> None:
    """12 TiB with 20,480 L2 tables, each with a cluster of which 4 KiB are written: every read wants another table."""
    choose = random.Random(12)
    tables = choose.sample(range(12 * TIB // scattered.COVERED), TABLES)
    offsets = [table * scattered.COVERED + choose.randrange(scattered.ENTRIES) * scattered.CLUSTER for table in tables]
    scattered.write(path, 12 * TIB, offsets, filled=4096)


def thousand(path: Path, images: Images) -> None:
    """1,000 internal snapshots."""
    with_many_snapshots(path, 1000)


def ext4(path: Path, images: Images) -> None:
    """An ext4 with 200 MB of small files."""
    converted(path, lambda raw: contents.write_file_system(raw, 512 * MIB, 200_000_000))


def ten_gib(path: Path, images: Images) -> None:
    """An ext4 of 10 GiB with 100 MB of small files: what a store that keeps objects in memory takes."""
    converted(path, lambda raw: contents.write_file_system(raw, 10 * GIB, 100_000_000))


RECIPES: dict[str, Callable[[Path, Images], None]] = {
    "plain": plain,
    "plain2": plain_of_2_gib,
    "half": half,
    "zlib": zlib,
    "zstd": zstd,
    "extended": extended,
    "chain10": chain(10),
    "chain40": chain(40),
    "snapshots": snapshots,
    **{name: churn(size) for name, size in CHURNED.items()},
    "10gib": ten_gib,
    "1tib": one_tib,
    "4tib": four_tib,
    "12tib": twelve_tib,
    "thousand": thousand,
    "ext4": ext4,
}

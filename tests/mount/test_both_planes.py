"""The data plane answers as the plain path does: bytes, sizes, attributes and errors, side by side."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.mount.images import MIB, Story
from tests.mount.views import MountView
from tests.support import need
from tests.support.mounts import force_unmount, mounted, need_fuse, qemu
from tests.support.qemu import qemu_io
from tests.support.tables import COPIED, Tables

CLUSTER = 65536
Pair = tuple[MountView, MountView]


def pair(image: Path, folder: Path, stack: ExitStack) -> Pair:
    """Mount `image` twice: with the data plane, and without."""
    need_fuse()
    views = []
    for name, more in (("plane", []), ("plain", ["--no-data-plane"])):
        target = folder / name
        target.mkdir()
        stack.callback(force_unmount, target)
        views.append(MountView(stack.enter_context(mounted(image, target, *more))))
    return views[0], views[1]


@pytest.fixture(scope="module")
def both(story: Story, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with ExitStack() as stack:
        yield pair(story.image, tmp_path_factory.mktemp("both"), stack)


def test_names_attributes_and_links_are_the_same(both: Pair) -> None:
    plane, plain = both

    assert plane.names() == plain.names()
    for name in plane.names():
        assert plane.status(name) == plain.status(name)
        if name == "latest.raw":
            assert plane.link(name) == plain.link(name)
        else:
            assert plane.xattrs(name) == plain.xattrs(name)
    assert plane.space() == plain.space()


def test_reads_of_any_length_anywhere_are_the_same(both: Pair) -> None:
    plane, plain = both
    dice = random.Random(1)
    for name in sorted(plane.names()):
        size = 6 * MIB
        for _ in range(30):
            offset, length = dice.randrange(size + 10), dice.choice([1, 511, 4096, 70_000, MIB + 1, 3 * MIB])
            assert plane.read(name, offset, length) == plain.read(name, offset, length)


@pytest.mark.parametrize("flags", [0, os.O_DIRECT])
def test_a_damaged_image_fails_in_the_same_ranges(tmp_path: Path, flags: int) -> None:
    """A bad entry, a bad stream, and a chain over both: each fails its own cluster, and no other."""
    need("qemu-img", "qemu-io")
    base, image = tmp_path / "base.qcow2", tmp_path / "bad.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", base, 16 * CLUSTER)
    commands = [f"write {'-c ' if number == 9 else ''}-P 5 {number * CLUSTER} {CLUSTER}" for number in range(12)]
    qemu_io(base, *commands)
    tables = Tables(base)
    tables.l2(3, COPIED | 0x1_2345_0200)
    tables.l2(9, tables.compressed(tables.append(b"\xff" * 512), 512))
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", image)
    with ExitStack() as stack:
        plane, plain = pair(image, tmp_path, stack)
        found = [[answer(view, number, flags) for number in range(16)] for view in (plane, plain)]

    assert found[0] == found[1]
    assert {3, 9} == {number for number, said in enumerate(found[0]) if said == "EIO"}


def answer(view: MountView, number: int, flags: int) -> str | bytes:
    """Return what a read of a cluster, into a buffer that is aligned to a page, brings: bytes, or an error's name."""
    file = os.open(view.path("current.raw"), os.O_RDONLY | flags)
    try:
        with mmap.mmap(-1, CLUSTER) as buffer:
            return buffer[: os.preadv(file, [buffer], number * CLUSTER)]
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    finally:
        os.close(file)


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC])
def test_what_is_refused_is_refused_alike(both: Pair, flags: int) -> None:
    for view in both:
        with pytest.raises(OSError) as failure:
            os.open(view.path("current.raw"), flags)
        assert failure.value.errno == errno.EROFS

"""Chains on block devices: a LUN of the kernel's initiator, a logical volume. QEMU judges; loop devices stand in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs.chain import open_chain
from qcowfs.errors import GateRefused
from qcowfs.gate import Policy, load_policy
from qcowfs.snapshot import open_disk, points
from tests.support import need
from tests.support.disks import attached
from tests.support.qemu import convert, qemu, qemu_io

SIZE = 30 << 20
DEVICE_SIZE = 64 << 20


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    """Return a directory in /dev like one of a volume group: links to the devices `base` and `top`."""
    need("qemu-img", "qemu-io", "losetup")
    if os.geteuid():
        pytest.skip("only root attaches loop devices")
    directory = Path(f"/dev/qcowfs-tests-{os.getpid()}")
    directory.mkdir()
    with ExitStack() as stack:
        stack.callback(directory.rmdir)
        for name in ("base", "top"):
            path = tmp_path / name
            os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), DEVICE_SIZE)
            link = directory / name
            link.symlink_to(stack.enter_context(attached(path)))
            stack.callback(link.unlink)
        yield directory


def chain_of(group: Path, backing_name: str) -> Path:
    """Make an overlay on `top` over an image on `base`, which it calls `backing_name`; both hold data."""
    base, top = group / "base", group / "top"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", base, str(SIZE))
    qemu_io(base, "write -P 1 0 1M", "write -P 2 20M 1M")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", backing_name, "-F", "qcow2", top)
    qemu_io(top, "write -P 3 512k 1M")
    return top


@pytest.mark.parametrize("absolute", [True, False], ids=["device path", "bare name"])
def test_a_chain_on_devices_is_what_qemu_reads(group: Path, absolute: bool) -> None:
    top = chain_of(group, str(group / "base") if absolute else "base")

    with open_chain(str(top), load_policy([str(group)], [])) as chain:
        disk = open_disk(chain, points(chain)[0], Cache(1 << 20))

        assert [DEVICE_SIZE, DEVICE_SIZE] == [layer.disk_size for layer in chain.layers]
        assert ["top", "base"] == [layer.name for layer in chain.layers]
        assert convert(top, "qcow2") == disk.pread(0, SIZE)


@pytest.mark.parametrize("word", ["", "/base"])
def test_a_word_about_a_group_or_a_volume_holds_whatever_device_it_is_today(group: Path, word: str) -> None:
    top = chain_of(group, "base")

    with open_chain(str(top), load_policy([f"{group}{word}"], [])) as chain:
        assert 2 == len(chain.layers)


def test_without_a_word_no_device_is_opened_and_the_hint_is_no_wider_than_it_must_be(group: Path) -> None:
    top = chain_of(group, "base")

    with pytest.raises(GateRefused, match="a block device needs to be allowed") as caught:
        open_chain(str(top), Policy())

    assert caught.value.hint == f"--allow-backing {group}/base allows it"


def test_a_link_that_anybody_can_make_does_not_widen_a_word(group: Path) -> None:
    top = chain_of(group, "base")
    group.chmod(0o1777)  # like /dev/shm

    with pytest.raises(GateRefused):
        open_chain(str(top), load_policy([str(group)], []))

"""Where the images of a machine lie: whose word is believed, and how far. The machine here is this very process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qcowfs.chain import open_chain
from qcowfs.errors import MonitorError
from qcowfs.policy import Policy
from qcowfs.qmp import files
from qcowfs.qmp.address import Address
from qcowfs.qmp.devices import Device, Image
from qcowfs.qmp.files import locate, require_same

SOCKET = Address(path="/run/vm.qmp")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(4096))
    return path


def device_on(path: Path) -> Device:
    return Device(name="d", qdev="", node="n", images=(Image(name=str(path), format="raw", virtual_size=4096),))


@pytest.mark.parametrize(
    ("flags", "held"), [(os.O_RDONLY, True), (os.O_RDWR, True), (os.O_WRONLY, False), (os.O_PATH, False)]
)
def test_only_a_file_that_its_process_reads_bears_its_word_out(image: Path, flags: int, held: bool) -> None:
    """With O_PATH, who may not read a file can have it open: no reason for root to read it for him."""
    descriptor = os.open(image, flags)
    try:
        if held:
            assert (str(image),) == locate(SOCKET, device_on(image), os.getpid()).vouched
        else:
            with pytest.raises(MonitorError, match="is not what it has open"):
                locate(SOCKET, device_on(image), os.getpid())
    finally:
        os.close(descriptor)


def test_a_descriptor_that_is_another_one_by_then_bears_nothing_out(image: Path) -> None:
    with image.open("rb") as opened:
        facts = f"/proc/self/fdinfo/{opened.fileno()}"

        assert files._can_be_read(facts, os.stat(image).st_ino)
        assert not files._can_be_read(facts, os.stat(image).st_ino + 1)


def test_a_file_that_is_put_in_the_place_of_the_one_that_was_looked_at_is_not_taken(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU may own the directory, and change it between any two looks."""
    secret = image.with_name("secret")
    secret.write_bytes(b"secret" * 1000)
    found = files._found

    def swapped(*words: object) -> object:
        image.unlink()
        image.symlink_to(secret)
        return found(*words)  # type: ignore[arg-type]

    with image.open("rb"):
        monkeypatch.setattr(files, "_found", swapped)
        with pytest.raises(MonitorError):
            located = locate(SOCKET, device_on(image), os.getpid())
            with open_chain(located.path, Policy(), image_format="raw") as chain:
                require_same(located, chain)

"""What is checked before mounting, and what is read from the kernel's table. Nothing is mounted here."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import pytest

from qcowfs import mountpoint
from qcowfs.errors import MountpointError
from qcowfs.mountpoint import Mount

TABLE = b"""\
21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
42 21 0:39 / /mnt/a\\040b ro,nosuid,nodev - fuse.qcowfs /images/a\\134b,\\012c.qcow2 ro,user_id=0
43 21 0:40 / /mnt/over rw shared:3 master:1 propagate_from:2 - tmpfs tmpfs rw
44 43 0:41 / /mnt/over ro - fuse.qcowfs /images/caf\xe9.img ro
"""


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mountpoint, "open", lambda path, mode: io.BytesIO(TABLE), raising=False)
    monkeypatch.setattr(mountpoint, "real", lambda path: path)


@pytest.mark.usefixtures("table")
class TestTheKernelsTable:
    def test_escapes_are_undone(self) -> None:
        expected = Mount("/mnt/a b", "0:39", "fuse.qcowfs", "/images/a\\b,\nc.qcow2")

        assert expected == mountpoint.find("/mnt/a b")

    def test_the_uppermost_mount_is_found(self) -> None:
        expected = Mount("/mnt/over", "0:41", "fuse.qcowfs", "/images/caf\udce9.img")

        assert expected == mountpoint.find("/mnt/over")

    @pytest.mark.parametrize("path", ["/mnt", "/mnt/a", "/mnt/over/x"])
    def test_what_is_no_mount_is_not_found(self, path: str) -> None:
        assert mountpoint.find(path) is None


def test_an_empty_directory_is_right_and_made_real(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    assert mountpoint.check(f"{tmp_path}/link/") == os.path.realpath(tmp_path / "real")


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MountpointError, match="No such file or directory") as failure:
        mountpoint.check(str(tmp_path / "nope"))

    assert failure.value.exit_code == 14


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(MountpointError, match="not a directory"):
        mountpoint.check(str(tmp_path / "file"))


def test_a_directory_with_entries_is_refused_unless_nonempty(tmp_path: Path) -> None:
    (tmp_path / ".hidden").touch()

    with pytest.raises(MountpointError, match="not empty") as failure:
        mountpoint.check(str(tmp_path))

    assert "-o nonempty" in str(failure.value.hint)
    assert mountpoint.check(str(tmp_path), nonempty=True) == os.path.realpath(tmp_path)


def test_a_mount_point_is_refused_unless_nonempty() -> None:
    with pytest.raises(MountpointError, match=r"already a mount point \(type proc\)"):
        mountpoint.check("/proc")

    assert mountpoint.check("/proc", nonempty=True) == "/proc"


@pytest.mark.timeout(20)
def test_holders_name_the_processes_that_are_inside(tmp_path: Path) -> None:
    (tmp_path / "held").touch()
    with (tmp_path / "held").open() as held, subprocess.Popen(["sleep", "60"], stdin=held) as sleeper:
        try:
            found = mountpoint.holders(Mount(str(tmp_path), "0:0", "x", "y"))
        finally:
            sleeper.kill()

    assert found == [f"{sleeper.pid} (sleep)"]


def test_a_directory_whose_name_only_begins_alike_holds_nobody(tmp_path: Path) -> None:
    (tmp_path / "mnt").mkdir()
    with (tmp_path / "mnt2").open("w"):
        assert mountpoint.holders(Mount(str(tmp_path / "mnt"), "0:0", "x", "y")) == []

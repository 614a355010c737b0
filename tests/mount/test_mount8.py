"""mount(8): `mount -t qcowfs`, `mount -t fuse.qcowfs`, fstab lines, by root and by an ordinary user.

mount(8) looks for its helpers in system directories only. They are put there in a mount namespace of the test's own,
so that this machine's directories stay as they are.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support import need
from tests.support.mounts import PATIENCE, Person, call, one_line, script

PRELUDE = """
set -eu
mount -t tmpfs tmpfs "$UPPER"
mkdir "$UPPER/up" "$UPPER/work" "$UPPER/bin"
mount -t overlay -o "lowerdir=/usr/sbin,upperdir=$UPPER/up,workdir=$UPPER/work" overlay /usr/sbin
ln -s "$HELPER" /usr/sbin/mount.qcowfs
mkdir -p /usr/local/bin
mount --bind "$UPPER/bin" /usr/local/bin
ln -s "$QCOWFS" /usr/local/bin/qcowfs
"""


@pytest.fixture(autouse=True)
def root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    need("unshare", "mount", "findmnt", "mount.fuse3", "setpriv")


def in_namespace(tmp_path: Path, commands: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `commands` where qcowfs is installed; `arguments` are $1, $2, ..."""
    (tmp_path / "upper").mkdir()
    environment = {
        **os.environ,
        "UPPER": str(tmp_path / "upper"),
        "QCOWFS": str(script(tmp_path / "qcowfs")),
        "HELPER": str(script(tmp_path / "mount.qcowfs", "qcowfs.cli.mount", "mount_helper")),
    }
    words = ["unshare", "--mount", "sh", "-c", PRELUDE + commands, "sh", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False)


@pytest.mark.parametrize("kind", ["qcowfs", "fuse.qcowfs"])
@pytest.mark.parametrize("options", ["defaults", "ro,noatime,nofail,_netdev,x-systemd.automount,comment=a", "rw,exec"])
def test_mount_by_type(image: Path, target: Path, tmp_path: Path, kind: str, options: str) -> None:
    commands = """
        mount -t "$3" -o "$4" "$1" "$2"
        findmnt -nro SOURCE,FSTYPE "$2"
        ls "$2"
        umount "$2"
        ls "$2"
    """
    done = in_namespace(tmp_path, commands, image, target, kind, options)

    assert done.stderr == ""
    assert (done.returncode, done.stdout) == (0, f"{image} fuse.qcowfs\ncurrent.raw\n")


@pytest.mark.parametrize("kind", ["qcowfs", "fuse.qcowfs"])
def test_a_line_of_fstab(image: Path, target: Path, tmp_path: Path, kind: str) -> None:
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{image} {target} {kind} ro,noauto,x-systemd.automount,allow_other 0 0\n")
    commands = """
        findmnt --verify --tab-file "$2" >&2
        mount --fstab "$2" "$1"
        findmnt -nro OPTIONS "$1"
        umount "$1"
    """
    done = in_namespace(tmp_path, commands, target, fstab)

    assert done.returncode == 0, done.stderr
    assert {"ro", "nosuid", "nodev", "allow_other", "default_permissions"} <= set(done.stdout.strip().split(","))


def test_an_ordinary_user_mounts_a_line_of_fstab_that_says_user(
    image: Path, target: Path, tmp_path: Path, ordinary: Person
) -> None:
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{image} {target} fuse.qcowfs ro,noauto,user 0 0\n")
    fstab.chmod(0o644)
    ordinary.own(target)
    script(tmp_path / "qcowfs.user", person=ordinary)
    commands = """
        ln -sf "$1.user" /usr/local/bin/qcowfs
        mount --bind "$2" /etc/fstab
        as_user="setpriv --reuid=$4 --regid=$5 --clear-groups"
        $as_user mount "$3"
        findmnt -nro OPTIONS "$3"
        $as_user ls "$3"
        $as_user umount "$3"
    """
    done = in_namespace(tmp_path, commands, tmp_path / "qcowfs", fstab, target, str(ordinary.uid), str(ordinary.gid))

    assert done.returncode == 0, done.stderr
    assert f"user_id={ordinary.uid}" in done.stdout
    assert done.stdout.endswith("\ncurrent.raw\n")


@pytest.mark.parametrize(
    ("options", "source", "code", "message"),
    [
        ("ro", "/nope.qcow2", 32, "qcowfs: /nope.qcow2: "),
        ("ro,allow_othr", "", 1, "qcowfs: unknown mount option 'allow_othr'\n"),
    ],
)
def test_what_fails_has_the_exit_code_of_mount(
    image: Path, target: Path, tmp_path: Path, options: str, source: str, code: int, message: str
) -> None:
    done = in_namespace(tmp_path, 'mount -t qcowfs -o "$3" "$1" "$2"', source or image, target, options)

    assert done.returncode == code
    assert done.stderr.startswith(message)


class TestTheHelper:
    def helper(self, tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        program = script(tmp_path / "mount.qcowfs", "qcowfs.cli.mount", "mount_helper")
        return call(*arguments, command=[str(program)])

    def test_only_checks_with_f(self, image: Path, target: Path, tmp_path: Path) -> None:
        right = self.helper(tmp_path, image, target, "-f", "-o", "rw")
        wrong = self.helper(tmp_path, tmp_path / "nope", target, "-f", "-o", "rw")

        assert (right.returncode, right.stderr, os.listdir(target)) == (0, "", [])
        assert wrong.returncode == 32

    def test_ignores_unknown_options_with_s(self, image: Path, target: Path, tmp_path: Path) -> None:
        done = self.helper(tmp_path, image, target, "-sfnv", "-t", "qcowfs", "-o", "rw,bogus")

        assert (done.returncode, done.stderr) == (0, "")

    def test_an_image_may_be_called_like_a_verb(self, image: Path, target: Path, tmp_path: Path) -> None:
        image.rename(tmp_path / "list")
        program = script(tmp_path / "mount.qcowfs", "qcowfs.cli.mount", "mount_helper")

        done = call("list", target, "-f", command=[str(program)], cwd=tmp_path)

        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("arguments", [[], ["image"], ["image", "mnt", "more"], ["image", "mnt", "-x"]])
    def test_wrong_arguments_are_1(self, tmp_path: Path, arguments: list[str]) -> None:
        done = self.helper(tmp_path, *arguments)

        assert done.returncode == 1
        assert one_line(done)

"""What cannot be mounted: one clear line, the documented exit code, nothing mounted, no traceback."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from qcowfs import mountpoint
from tests.support import lacking, need
from tests.support.mounts import Person, call, launcher, me, mounted, one_line, qemu

USAGE, SOURCE, IMAGE, UNSUPPORTED, MOUNTPOINT, FUSE, GATE = 2, 10, 11, 12, 14, 15, 16


def refused(*arguments: str | Path, person: Person | None = None, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Return the exit code and the line of a mount that must fail."""
    done = call("mount", *arguments, person=person, env=env)

    assert done.returncode != 0, "it mounted"
    assert "Traceback" not in done.stderr
    return done.returncode, one_line(done)


class TestTheImage:
    def test_is_missing(self, target: Path, tmp_path: Path) -> None:
        code, line = refused(tmp_path / "nope.qcow2", target)

        assert code == SOURCE
        assert re.fullmatch(r"qcowfs: \S+/nope.qcow2: .*No such file or directory", line)

    def test_is_a_directory(self, target: Path, tmp_path: Path) -> None:
        code, line = refused(tmp_path, target)

        assert code == SOURCE
        assert "directory" in line

    @pytest.mark.parametrize("content", [b"", b"not an image", b"QFI\xfb", bytes(4096)])
    def test_is_not_one(self, target: Path, tmp_path: Path, content: bytes) -> None:
        image = tmp_path / "odd"
        image.write_bytes(content)

        code, line = refused(image, target)

        assert code == IMAGE
        assert str(image) in line

    def test_may_not_be_read(self, image: Path, target: Path, ordinary: Person) -> None:
        image.chmod(0)
        ordinary.own(target)

        code, line = refused(image, target, person=ordinary)

        assert code == SOURCE
        assert line.endswith("Permission denied")

    def test_lacks_its_backing_file(self, target: Path, tmp_path: Path) -> None:
        need("qemu-img")
        image = tmp_path / "top.qcow2"
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "gone.qcow2", "-F", "qcow2", image, "1M")

        code, line = refused(image, target)

        assert code == SOURCE
        assert "gone.qcow2" in line

    def test_names_a_file_that_is_not_allowed(self, target: Path, tmp_path: Path) -> None:
        need("qemu-img")
        image = tmp_path / "top.qcow2"
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw", image, "1M")

        code, line = refused(image, target)

        assert code == GATE
        assert "/etc/passwd" in line

    def test_names_a_file_that_a_mount_option_allows(self, target: Path, tmp_path: Path) -> None:
        need("qemu-img")
        (tmp_path / "there, far").mkdir()
        (tmp_path / "here").mkdir()
        base, image = tmp_path / "there, far" / "base.raw", tmp_path / "here" / "top.qcow2"
        base.write_bytes(b"\x05" * 1024)
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", str(base), "-F", "raw", image, "1k")

        code, _ = refused(image, target)
        allowed = str(base.parent).replace(",", "\\,")
        with mounted(image, target, "-o", f"allow_backing={allowed}") as mount:
            content = (mount / "current.raw").read_bytes()

        assert code == GATE
        assert content == b"\x05" * 1024

    def test_is_encrypted(self, target: Path, tmp_path: Path) -> None:
        need("qemu-img")
        image = tmp_path / "secret.qcow2"
        secret, options = "secret,id=k,data=passw0rd", "encrypt.format=aes,encrypt.key-secret=k"
        qemu("qemu-img", "create", "-q", "--object", secret, "-f", "qcow2", "-o", options, image, "1M")

        code, line = refused(image, target)

        assert code == UNSUPPORTED
        assert "encrypted" in line

    def test_is_based_on_an_encrypted_one(self, target: Path, tmp_path: Path) -> None:
        need("qemu-img")
        base, image = tmp_path / "secret.qcow2", tmp_path / "top.qcow2"
        secret, options = "secret,id=k,data=passw0rd", "encrypt.format=aes,encrypt.key-secret=k"
        qemu("qemu-img", "create", "-q", "--object", secret, "-f", "qcow2", "-o", options, base, "1M")
        qemu("qemu-img", "create", "-q", "-f", "qcow2", "-u", "-b", base.name, "-F", "qcow2", image, "1M")

        code, line = refused(image, target)

        assert code == UNSUPPORTED
        assert "secret.qcow2" in line and "encrypted" in line


class TestTheMountPoint:
    def test_does_not_exist(self, image: Path, tmp_path: Path) -> None:
        assert refused(image, tmp_path / "nope") == (
            MOUNTPOINT,
            f"qcowfs: {tmp_path}/nope: No such file or directory",
        )

    def test_is_a_file(self, image: Path) -> None:
        assert refused(image, image) == (MOUNTPOINT, f"qcowfs: {image}: not a directory")

    def test_is_not_empty(self, image: Path, tmp_path: Path) -> None:
        code, line = refused(image, tmp_path)

        assert (code, line) == (MOUNTPOINT, f"qcowfs: {tmp_path}: the directory is not empty")

    def test_is_a_mount_already(self, image: Path, target: Path) -> None:
        with mounted(image, target):
            code, line = refused(image, target)

        assert (code, line) == (MOUNTPOINT, f"qcowfs: {target}: already a mount point (type fuse.qcowfs)")

    def test_is_not_the_persons(self, image: Path, target: Path, ordinary: Person) -> None:
        if ordinary.is_me:
            target.chmod(0o555)

        code, line = refused(image, target, person=ordinary)

        assert (code, line) == (MOUNTPOINT, f"qcowfs: {target}: no write permission, which mounting needs")

    def test_is_a_shared_directory_of_another_user(self, image: Path, target: Path, ordinary: Person) -> None:
        if ordinary.is_me:
            pytest.skip("needs root")
        target.chmod(0o1777)

        code, line = refused(image, target, person=ordinary)

        assert (code, line) == (MOUNTPOINT, f"qcowfs: {target}: a shared directory (sticky bit) of another user")

    def test_is_in_a_directory_that_the_person_cannot_enter(
        self, image: Path, tmp_path: Path, ordinary: Person
    ) -> None:
        (tmp_path / "closed" / "mnt").mkdir(parents=True)
        (tmp_path / "closed").chmod(0)

        code, line = refused(image, tmp_path / "closed" / "mnt", person=ordinary)
        (tmp_path / "closed").chmod(0o700)

        assert code == MOUNTPOINT
        assert line.endswith("Permission denied")


class TestTheCommandLine:
    def test_has_an_unknown_mount_option(self, image: Path, target: Path) -> None:
        done = call("mount", "-o", "ro,allow_othr", image, target)

        assert done.returncode == USAGE
        assert one_line(done) == "qcowfs: unknown mount option 'allow_othr'"
        assert "allow_other" in done.stderr.splitlines()[1]

    def test_lacks_the_mount_point(self, image: Path) -> None:
        code, line = refused(image)

        assert code == USAGE
        assert "MOUNTPOINT" in line

    def test_names_a_log_file_that_cannot_be_written(self, image: Path, target: Path) -> None:
        code, line = refused("--log-file", "/nope/log", image, target)

        assert (code, line) == (1, "qcowfs: /nope/log: cannot open the log file: No such file or directory")

    def test_asks_for_both_kinds_of_others(self, image: Path, target: Path) -> None:
        code, line = refused("--allow-other", "-o", "allow_root", image, target)

        assert code == USAGE
        assert "exclude" in line


def hidden(image: Path, target: Path, file: str, by: Path, person: Person) -> tuple[int, str]:
    """Mount, as `person`, in a mount namespace of its own where `by` covers `file`. Needs root."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    need("unshare", "mount")
    words = [*launcher(person), "mount", str(image), str(target)]
    if not person.is_me:
        need("setpriv")
        words = ["setpriv", f"--reuid={person.uid}", f"--regid={person.gid}", "--clear-groups", *words]
    command = f"mount --bind {shlex.quote(str(by))} {file}\nexec {shlex.join(words)}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", command],
        capture_output=True,
        text=True,
        env=person.environment(),
        timeout=20,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, one_line(done)


class TestTheMachine:
    def test_has_no_dev_fuse(self, image: Path, target: Path) -> None:
        code, line = hidden(image, target, "/dev/fuse", Path("/dev/null"), me())

        assert (code, line) == (FUSE, "qcowfs: /dev/fuse: not the FUSE device")

    def test_does_not_let_the_person_use_dev_fuse(
        self, image: Path, target: Path, tmp_path: Path, ordinary: Person
    ) -> None:
        ordinary.own(target)
        device = tmp_path / "fuse"
        os.mknod(device, 0o020600, os.makedev(10, 229))

        code, line = hidden(image, target, "/dev/fuse", device, ordinary)

        assert (code, line) == (FUSE, "qcowfs: /dev/fuse: no permission to use it")

    def test_has_no_fusermount3(self, image: Path, target: Path, ordinary: Person) -> None:
        ordinary.own(target)
        program = mountpoint.fusermount()
        assert program is not None

        code, line = hidden(image, target, program, Path("/dev/null"), ordinary)

        assert (code, line) == (FUSE, "qcowfs: fusermount3: not found")

    def test_has_no_fusermount3_and_root_does_not_need_it(self, image: Path, target: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        need("unshare")
        program = mountpoint.fusermount()
        mount, umount = (shlex.join([*launcher(), verb]) for verb in ("mount", "umount"))
        command = f'mount --bind /dev/null {program}; {mount} "$1" "$2"; ls "$2"; {umount} "$2"'
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-ec", command, "sh", image, target],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

        assert (done.returncode, done.stdout, done.stderr) == (0, "current.raw\n", "")

    def test_has_no_pyfuse3(self, image: Path, target: Path, tmp_path: Path) -> None:
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "pyfuse3.py").write_text("raise ImportError('libfuse3.so.3: not there')")

        code, line = refused(image, target, env={"PYTHONPATH": str(tmp_path / "broken")})

        assert (code, line) == (FUSE, "qcowfs: pyfuse3 cannot be imported: libfuse3.so.3: not there")

    @pytest.mark.parametrize("options", [["--allow-other"], ["-o", "allow_other"], ["-o", "allow_root"]])
    def test_does_not_let_ordinary_users_admit_others(
        self, image: Path, target: Path, options: list[str], ordinary: Person
    ) -> None:
        ordinary.own(target)
        if "\nuser_allow_other" in "\n" + Path("/etc/fuse.conf").read_text():
            lacking("/etc/fuse.conf allows it")

        code, line = refused(*options, image, target, person=ordinary)

        assert code == FUSE
        assert line.endswith("not allowed to ordinary users on this machine")

    def test_refuses_for_a_reason_that_only_fuse_knows(self, image: Path, target: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        need("setpriv")
        # Root without the right to mount, as in most containers.
        words = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *launcher(), "mount", image, target]
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)

        assert done.returncode == FUSE
        assert re.fullmatch(rf"qcowfs: {target}: FUSE refused: .*Operation not permitted", one_line(done))
        assert "Traceback" not in done.stderr

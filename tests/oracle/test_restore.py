"""`restore` against the kernel's mounts of the same bytes: what rsync and `cp -a` make of them, as root and not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qcowfs import cli
from tests.support import crash, need
from tests.support.disks import run
from tests.support.guests import Guest, bare_image, loop_mounted, make_tree, partitioned_image, volume_group
from tests.support.images import qemu
from tests.support.mounts import Person, call, launcher, me, ordinary_user
from tests.support.tables import Tables
from tests.support.terminal import on_a_terminal
from tests.support.trees import describe

MIB = 1 << 20


class Bare(NamedTuple):
    image: Path
    before: Guest
    now: Guest


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    directory = tmp_path_factory.mktemp("bare")
    directory.chmod(0o711)
    image = directory / "bare.qcow2"
    return Bare(image, *bare_image(directory, image))


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A directory to restore into, which has files of its own."""
    directory = tmp_path / "there"
    (directory / "etc").mkdir(parents=True)
    (directory / "etc/fstab").write_bytes(b"ours")
    (directory / "etc").chmod(0o750)
    return directory


def restore(*words: str | Path) -> int:
    return cli.main(["restore", *map(str, words)])


def rsync_says(source: Path, target: Path) -> str:
    """Return what rsync would change to make `target` what `source` is."""
    need("rsync")
    return run("rsync", "-aHAXn", "--delete", "--itemize-changes", f"{source}/", f"{target}/")


def comparable(guest: Guest) -> dict[bytes, Any]:
    """Return what has to be the same on every file system, and what looking at a tree does not change."""
    told = {}
    for path, (mode, nlink, uid, gid, rdev, size, _, (mtime, _, atime), xattrs, content) in guest.items():
        directory, file = stat.S_ISDIR(mode), stat.S_ISREG(mode)
        facts = (mode, 0 if directory else nlink, uid, gid, rdev, 0 if directory else size, mtime)
        told[path] = (*facts, atime if file else 0, xattrs, content)
    return told


def imaged(raw: Path) -> Path:
    image = raw.with_suffix(".qcow2")
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    return image


def test_a_whole_file_system_is_as_the_kernel_shows_it(bare: Bare, tmp_path: Path) -> None:
    for point, guest in (("before", bare.before), ("current", bare.now)):
        target = tmp_path / point

        assert restore("--verify", bare.image, f"{point}:", target) == 0
        assert comparable(guest) == comparable(describe(target, atime=True))
    with loop_mounted(bare.image.with_name("before.raw")) as at:
        assert "" == rsync_says(at, tmp_path / "before")
        (tmp_path / "before/etc/fstab").unlink()
        assert "fstab" in rsync_says(at, tmp_path / "before")


def test_partitions_are_as_the_kernel_shows_them(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    directory = tmp_path_factory.mktemp("parts")  # a socket's path is short
    image = directory / "parts.qcow2"
    guests, _, parts = partitioned_image(directory, image)

    assert restore(image, "before:p1", "before:p2", "before:p1.raw", tmp_path) == 0
    for name in ("p1", "p2"):
        assert comparable(guests[name]) == comparable(describe(tmp_path / name))
    assert (tmp_path / "p1.raw").read_bytes() == parts["p1"].read_bytes()
    assert restore(image, "before:", tmp_path / "whole") == 0
    assert {"p1", "p2", "p1.raw", "p2.raw"} == set(os.listdir(tmp_path / "whole"))


def test_an_ordinary_user_gets_what_cp_gets(bare: Bare, tmp_path: Path) -> None:
    """And more than that: who may read the image needs no permission of the guest's."""
    person = ordinary_user()
    directory = person.own(tmp_path)
    with loop_mounted(bare.image.with_name("before.raw")) as at:
        words = ["cp", "-a", str(at), str(directory / "cp")]
        subprocess.run(words, capture_output=True, env=person.environment(), **person.popen_arguments())  # type: ignore[call-overload]
    done = call("restore", bare.image, "before:", directory / "ours", person=person)

    theirs, ours = (comparable(describe(directory / name)) for name in ("cp", "ours"))
    assert (0, "") == (done.returncode, done.stdout)
    assert ["qcowfs: warning"] == [line[:15] for line in done.stderr.splitlines()]
    assert "devices can only be made by root" in done.stderr
    assert {b"chr", b"blk"} == {path for path in bare.before if path not in ours}
    assert theirs == {path: facts for path, facts in ours.items() if path in theirs}
    assert len(theirs) > 700
    assert 0o751 == stat.S_IMODE(ours[b"large"][0]), "the set-user-ID bit would be another user's"


def everything_else(root: Path) -> None:
    """Write what needs care about the order in which it is restored."""
    need("setfacl", "setfattr", "setcap")
    for path in ("a/b", "c", "read only"):
        (root / path).mkdir(parents=True)
    (root / "a/b/one").write_bytes(b"linked" * 1000)
    (root / "c/two").hardlink_to(root / "a/b/one")
    (root / "z three").hardlink_to(root / "a/b/one")
    (root / "link").symlink_to("nowhere")
    os.link(root / "link", root / "c/link", follow_symlinks=False)
    os.mkfifo(root / "pipe")
    (root / "c/pipe").hardlink_to(root / "pipe")
    (root / "a/suid").write_bytes(b"#!")
    os.chown(root / "a/suid", 1234, 5678)
    os.chmod(root / "a/suid", 0o6711)
    run("setcap", "cap_net_raw=ep", root / "c/two")
    (root / "read only/file").write_bytes(b"x")
    os.setxattr(root / "read only/file", "user.long", os.urandom(900))
    os.setxattr(root / "read only/file", "trusted.one", b"\0\xff")
    os.setxattr(root / "link", "trusted.of a link", b"value", follow_symlinks=False)
    (root / "read only/file").chmod(0o400)
    run("setfacl", "-m", "u:4242:rw,g:77:r,m::rw", root / "read only/file")
    run("setfacl", "-m", "u:4242:rwx,d:u:77:rx", root / "c")
    (root / "c/inherits").mkdir()
    (root / "read only").chmod(0o555)
    (root / "a").chmod(0o2777)
    os.utime(root / "a", ns=(10**18 + 1, 10**18 + 123456789))
    with (root / "sparse").open("wb") as file:
        file.write(b"first")
        file.seek(1 << 40)
        file.write(b"last")


def test_links_attributes_and_modes_come_in_the_right_order(tmp_path: Path) -> None:
    raw, target = tmp_path / "disk.raw", tmp_path / "target"
    guest = make_tree(raw, 32 * MIB, everything_else)
    run("setfacl", "-m", "d:u:99:rwx,u:98:r", tmp_path)  # what is made here would inherit that

    assert restore("--verify", imaged(raw), "current:", target) == 0
    assert comparable(guest) == comparable(describe(target))
    with loop_mounted(raw) as at:
        assert "" == rsync_says(at, target)
    assert os.stat(target / "a/b/one").st_ino == os.stat(target / "c/two").st_ino == os.stat(target / "z three").st_ino
    assert (1 << 40) + 4 == os.stat(target / "sparse").st_size
    assert os.stat(target / "sparse").st_blocks <= 64
    assert restore(imaged(raw), "current:read only/file", "current:a/suid", "current:pipe", tmp_path) == 0
    for name, path in (("file", b"read only/file"), ("suid", b"a/suid"), ("pipe", b"pipe")):
        (facts,) = comparable({b"": describe(tmp_path)[os.fsencode(name)]}).values()
        assert (guest[path][0], guest[path][8]) == (facts[0], facts[8])


def test_a_thousand_directories_in_each_other(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"

    def fill(root: Path) -> None:
        at = os.open(root, os.O_RDONLY)
        for number in range(1000):
            name = f"{number:04}" + "d" * 200
            os.mkdir(name, dir_fd=at)
            below = os.open(name, os.O_RDONLY, dir_fd=at)
            os.close(at)
            at = below
        os.close(os.open("bottom", os.O_CREAT | os.O_WRONLY, dir_fd=at))
        os.close(at)

    raw.touch()
    os.truncate(raw, 32 * MIB)
    run("mke2fs", "-q", "-t", "ext4", raw)
    with loop_mounted(raw, "rw") as at:
        fill(at)
    image = str(imaged(raw))
    words = ["bash", "-c", 'ulimit -Sn 256 && exec "$@"', "bash", *launcher(), "restore", "--json", image, "current:"]

    done = subprocess.run([*words, tmp_path / "target"], capture_output=True, text=True)

    told = json.loads(done.stdout)
    assert (0, "", [], 1002) == (done.returncode, done.stderr, told["errors"], told["directories"])
    assert told["restored"][0]["path"].endswith("/bottom") or told["restored"][1]["path"].endswith("/bottom")
    run("rm", "-rf", tmp_path / "target")  # shutil's calls itself too often


def test_a_crashed_machines_files_are_those_after_recovery(tmp_path: Path) -> None:
    need("mkfs.ext4", "qemu-img")
    image = crash.crash(tmp_path, crash.Kind("ext4", (), stops=(crash.LOGFLUSH,)), seed=1)
    at_boot = tmp_path / "at-boot"
    shutil.copy(image, at_boot)
    qcow2 = imaged(image)

    assert restore(qcow2, "current:", tmp_path / "recovered") == 0
    assert restore("--norecovery", qcow2, "current:", tmp_path / "not recovered") == 0
    with crash.mounted(at_boot) as mounted:
        assert "" == rsync_says(mounted, tmp_path / "recovered")
    with crash.mounted(image, "ro,noload") as mounted:
        assert "" == rsync_says(mounted, tmp_path / "not recovered")
    assert set(os.listdir(tmp_path / "recovered")) != set(os.listdir(tmp_path / "not recovered"))


def test_a_volume_group_of_two_images(tmp_path: Path) -> None:
    need("lvm", "qemu-img")
    guest, images = volume_group(tmp_path)

    assert restore("--with", images[1], images[0], "both:vg-lv", tmp_path) == 0
    assert comparable(guest) == comparable(describe(tmp_path / "vg-lv"))


@pytest.mark.parametrize(
    ("place", "dest", "made"),
    [
        ("before:etc", "there/", "there/etc/second"),
        ("before:etc", "new", "new/second"),
        ("before:etc", "new/", "new/second"),
        ("before:etc/", "new", "new/second"),
        ("before:etc/", "there", "there/second"),
        ("before:etc/.", "there", "there/second"),
        ("before:etc/apt/..", "there", "there/second"),
        ("before:etc/second", "there", "there/second"),
        ("before:etc/second", "there/new", "there/new"),
        ("before:etc/second", ".", "second"),
        ("before:var/run/second", "there", "there/second"),
        ("before:var/run/", "there", "there/second"),
    ],
)
def test_the_destination_is_understood_as_cp_does(
    bare: Bare,
    there: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    dest: str,
    made: str,
) -> None:
    monkeypatch.chdir(there.parent)
    shutil.rmtree(there / "etc")

    assert restore("--json", bare.image, place, dest) == 0
    paths = [entry["path"] for entry in json.loads(capsys.readouterr().out)["restored"]]
    typed = dest.rstrip("/")
    assert all(path == typed or path.startswith(f"{typed}/") for path in paths)
    assert Path(made).read_bytes() == b"UUID=1 / ext4 defaults 0 1\n"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("before:etc/second", "no/new"), 1, "no: no such directory"),
        (("before:etc/second", "there/etc/fstab/"), 1, "there/etc/fstab/: not a directory"),
        (("before:etc/second", "before:var", "new"), 1, "new: not a directory, and several sources need one"),
        (("before:etc/fstab/", "there"), 17, "before:etc/fstab/: Not a directory"),
        (("before:etc", "there/etc/fstab"), 1, "there/etc/fstab: a file that is no directory is there already"),
        (("--json", "before:etc/fstab", "-"), 2, "standard output can have the bytes of a file, and nothing else"),
        (("before:etc/fstab", "before:etc/second", "-"), 2, "standard output can have one file"),
        (("before:etc", "-"), 1, "before:etc: Is a directory"),
        (("bfore:etc", "there"), 17, "no point bfore: not a name, an id or a snapshot's name"),
    ],
)
def test_what_cannot_be_is_one_line(
    bare: Bare, there: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(there.parent)

    assert code == restore(bare.image, *words)
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith(message)
    assert len(said) == 1 or said[1].startswith("hint: ")
    assert ["there"] == os.listdir(".")
    assert b"ours" == Path("there/etc/fstab").read_bytes()


def test_points_that_have_the_path_are_named(bare: Bare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert restore(bare.image, "current:etc/second", tmp_path) == 17
    assert "current:etc/second: No such file or directory\nhint: it is in before\n" in capsys.readouterr().err
    assert restore(bare.image, "current:etc/fstb", tmp_path) == 17
    assert "hint: did you mean fstab?" in capsys.readouterr().err


def test_one_file_goes_to_standard_output(bare: Bare, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    assert restore(bare.image, "before:chain", "-") == 0
    assert b"UUID=1 / ext4 defaults 0 1\n" == capsysbinary.readouterr().out


def test_what_is_there_is_kept(bare: Bare, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there / "etc/apt").symlink_to("/nowhere")

    assert restore(bare.image, "before:etc", there) == 1
    said = capsys.readouterr().err.splitlines()
    assert {f"qcowfs: {there}/etc/fstab: it is there already",
            f"qcowfs: {there}/etc/apt: a file that is no directory is there already",
            "hint: --force replaces files, --backup renames them",
            "hint: --backup renames it"} == set(said)  # fmt: skip
    assert b"ours" == (there / "etc/fstab").read_bytes()
    assert 0o750 == stat.S_IMODE((there / "etc").stat().st_mode)
    assert {"apt", "fstab", "second"} == set(os.listdir(there / "etc"))


def test_what_is_there_is_renamed(bare: Bare, there: Path) -> None:
    (there / "etc/fstab.~8~").write_bytes(b"older")
    (there / "etc/apt").write_bytes(b"a file")
    (there / "etc/second").mkdir()

    assert restore("--backup", bare.image, "before:etc", there) == 0
    assert restore("--backup", bare.image, "before:etc/fstab", there / "etc") == 0
    names = ["apt", "apt.~1~", "fstab", "fstab.~10~", "fstab.~8~", "fstab.~9~", "second", "second.~1~"]
    assert names == sorted(os.listdir(there / "etc"))
    assert b"ours" == (there / "etc/fstab.~9~").read_bytes()
    assert (there / "etc/second.~1~").is_dir()
    assert 0o750 == stat.S_IMODE((there / "etc").stat().st_mode)


def test_what_is_there_is_replaced(bare: Bare, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there / "etc/second").mkdir()
    (there / "etc/apt").write_bytes(b"no directory")
    elsewhere = there.parent / "elsewhere"
    elsewhere.write_bytes(b"not to be touched")
    (there / "etc/fstab").unlink()
    (there / "etc/fstab").symlink_to(elsewhere)

    assert restore("--force", bare.image, "before:etc", there) == 1
    said = capsys.readouterr().err.splitlines()
    assert {f"qcowfs: {there}/etc/second: a directory is there already",
            f"qcowfs: {there}/etc/apt: a file that is no directory is there already"} == {*said[::2]}  # fmt: skip
    assert {"hint: --backup renames it"} == {*said[1::2]}
    assert b"not to be touched" == elsewhere.read_bytes()
    assert not (there / "etc/fstab").is_symlink()
    assert b"UUID=1 / ext4 defaults 0 1\n" == (there / "etc/fstab").read_bytes()
    assert bare.before[b"etc"][0] == (there / "etc").stat().st_mode
    assert {"apt", "fstab", "second"} == set(os.listdir(there / "etc"))
    assert restore("--force", bare.image, "before:", there / "whole") == 0
    assert restore("--force", bare.image, "before:", there / "whole") == 0
    assert comparable(bare.before) == comparable(describe(there / "whole"))


def test_links_that_somebody_left_there_lead_nowhere(bare: Bare, there: Path) -> None:
    outside = there.parent / "outside"
    outside.mkdir()
    (there / "var").symlink_to(outside)
    (there / "many").mkdir()
    (there / "many/file 1").symlink_to(outside / "made")

    for words in ((), ("--force",), ("--backup",)):
        restore(*words, bare.image, "before:var", "before:many", there)
        assert [] == os.listdir(outside)
    (there / "to").symlink_to(outside)  # but what a person typed is meant
    assert restore(bare.image, "before:etc/fstab", there / "to") == 0
    assert ["fstab"] == os.listdir(outside)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB."""
    at = tmp_path / "small"
    at.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=2m", "small", at)
    yield at
    run("umount", at)


def test_a_full_file_system_gets_no_half_files(bare: Bare, small: Path) -> None:
    done = call("restore", "--json", bare.image, "before:", small / "x")

    told = json.loads(done.stdout)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert "No space left on device: it needs " in line
    assert line.endswith("; what comes after it is not restored")
    assert complete(small / "x", bare.before)
    assert not (small / "x/large").exists()
    assert 1 == len(told["errors"])


def complete(directory: Path, guest: Guest, *, killed: bool = False) -> int:
    """Return how many files are there; all of them have to be as they are in the guest.

    Further links of theirs may be to come. What is no regular file has its name from the start, but for its metadata.
    """
    found = {path: facts for path, facts in comparable(describe(directory)).items() if not stat.S_ISDIR(facts[0])}
    wanted = comparable(guest)
    for path, facts in found.items():
        assert (stat.S_IFMT(facts[0]), facts[-1]) == (stat.S_IFMT(wanted[path][0]), wanted[path][-1]), path
        if stat.S_ISREG(facts[0]) or not killed:
            assert (facts[0], *facts[2:]) == (wanted[path][0], *wanted[path][2:]), path
    return len(found)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_signal_leaves_complete_files_only(bare: Bare, tmp_path: Path, number: int, code: int) -> None:
    left = []
    for attempt in range(5):
        target = tmp_path / str(attempt)
        words = [*launcher(), "restore", str(bare.image), "before:", str(target)]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
            while not target.exists() and process.poll() is None:
                time.sleep(0.001)
            time.sleep(0.004 * attempt)
            process.send_signal(number)
            said = process.communicate(timeout=20)[1]
        if process.returncode == code:
            left.append(complete(target, bare.before, killed=number == signal.SIGKILL))
            assert "Traceback" not in said
            assert number == signal.SIGKILL or f"ended by {signal.Signals(number).name}" in said
    assert any(0 < count < len(bare.before) - 20 for count in left), left


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """An image in which the second cluster of one of two files cannot be read."""
    need("debugfs")
    raw = tmp_path / "broken.raw"

    def fill(root: Path) -> None:
        for name in ("bad", "good"):
            (root / name).write_bytes(b"".join(bytes([n + 1]) * 65536 for n in range(4)))

    make_tree(raw, 32 * MIB, fill, "-t", "ext4", "-b", "4096")
    image = imaged(raw)
    block = int(run("debugfs", "-R", "bmap /bad 20", raw).split()[-1])
    assert int(run("debugfs", "-R", "bmap /bad 0", raw).split()[-1]) == block - 20
    Tables(image).l2(block * 4096 // 65536, (1 << 63) | 0x1_2345_0200)
    return image


def test_what_cannot_be_read_is_named_and_the_rest_restored(broken: Path, tmp_path: Path) -> None:
    whole = b"".join(bytes([n + 1]) * 65536 for n in range(4))
    done = call("restore", "--json", broken, "current:", tmp_path / "without")
    kept = call("restore", "--json", "--keep-damaged", broken, "current:", tmp_path / "with")

    for result in (done, kept):
        (error,) = json.loads(result.stdout)["errors"]
        assert result.returncode == 1
        assert error["path"].endswith("/bad")
    assert ": not restored: bytes " in done.stderr
    assert "hint: --keep-damaged restores such files" in done.stderr
    assert ": restored with zeros: bytes " in kept.stderr
    assert {"good", "lost+found"} == set(os.listdir(tmp_path / "without"))
    assert whole == (tmp_path / "without/good").read_bytes() == (tmp_path / "with/good").read_bytes()
    start, end = map(int, error["error"].partition("bytes ")[2].partition(" cannot")[0].split(" to "))
    data = (tmp_path / "with/bad").read_bytes()
    assert 65536 == end + 1 - start
    assert whole[:start] + bytes(65536) + whole[end + 1 :] == data


def test_a_document_tells_what_was_restored(bare: Bare, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert restore("--json", bare.image, "before:etc", there) == 1

    told = json.loads(capsys.readouterr().out)
    assert (1, str(bare.image), str(there)) == (told["version"], told["image"], told["destination"])
    assert [f"{there}/etc/second", f"{there}/etc/apt"] == [entry["path"] for entry in told["restored"]]
    assert ["file", "directory"] == [entry["type"] for entry in told["restored"]]
    assert [{"path": f"{there}/etc/fstab", "error": "it is there already"}] == told["errors"]
    assert (1, 1, 27, [], []) == tuple(told[key] for key in ("files", "directories", "bytes", "skipped", "warnings"))


def test_an_ordinary_user_hears_once_what_only_root_can_set(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    guest = make_tree(raw, 32 * MIB, everything_else)
    image = imaged(raw)
    person: Person = ordinary_user()
    person.own(tmp_path)

    done = call("restore", "--verify", image, "current:", tmp_path / "target", person=person)

    found = describe(tmp_path / "target")
    warnings = [line for line in done.stderr.splitlines() if "warning" in line]
    assert (0, len(warnings)) == (done.returncode, len(done.stderr.splitlines()))
    if person != me():
        assert {"trusted", "security"} == {line.partition("attributes ")[2].partition(".")[0] for line in warnings}
    file = b"read only/file"
    assert guest[file][8]["user.long"] == found[file][8]["user.long"]
    assert guest[file][8]["system.posix_acl_access"] == found[file][8]["system.posix_acl_access"]
    assert guest[file][0] == found[file][0]
    assert 0o2777 == stat.S_IMODE(guest[b"a"][0])


def test_nohup_keeps_it_going(bare: Bare, tmp_path: Path) -> None:
    words = ["nohup", *launcher(), "restore", str(bare.image), "before:", str(tmp_path / "target")]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            process.send_signal(signal.SIGHUP) if (tmp_path / "target").exists() else time.sleep(0.001)

    assert process.returncode == 0
    assert comparable(bare.before).keys() == comparable(describe(tmp_path / "target")).keys()


def test_a_reader_of_the_document_that_goes_away_ends_it(bare: Bare, tmp_path: Path) -> None:
    words = [*launcher(), "restore", "--json", str(bare.image), "before:"]
    env = {**os.environ, "PYTHONUNBUFFERED": ""}  # what cannot be written is found out in the middle
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*words, str(tmp_path / "pipe")], env=env, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.close()
        assert process.stderr.read() == b""
    to_full = ["sh", "-c", 'exec "$@" >/dev/full', "sh", *words, str(tmp_path / "full")]
    full = subprocess.run(to_full, env=env, capture_output=True, text=True)

    assert process.returncode == 141
    assert (1, "qcowfs: standard output: No space left on device\n") == (full.returncode, full.stderr)
    for name in ("pipe", "full"):
        assert 0 < complete(tmp_path / name, bare.before) < len(bare.before) - 100


def test_a_terminal_sees_where_it_is(bare: Bare, tmp_path: Path) -> None:
    (tmp_path / "fstab").write_bytes(b"ours")
    words = [*launcher(), "restore", str(bare.image), "before:etc/", "before:many", "before:large", str(tmp_path)]
    code, said = on_a_terminal(words, "stderr")

    assert code == 1
    assert re.search(rb"\r\x1b\[K\d+ files, [\d.]+ \w+, [\d.]+ \w+/s  /[^\r]+\r\x1b\[K", said)
    assert f"\x1b[Kqcowfs: {tmp_path}/fstab: it is there already\r\n".encode() in said
    assert said.endswith(b"\r\x1b[K")


def memory(*words: str | Path) -> int:
    """Return the bytes that a restore had at most, without those of its worker, whose limit is another matter."""
    peak = 0
    with subprocess.Popen([*launcher(), "restore", *map(str, words)]) as process:
        while process.poll() is None:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found[1]) * 1024 if found else 0)  # none: it has ended, and nobody has asked how
            time.sleep(0.01)
    assert process.returncode == 0
    return peak


def test_memory_does_not_grow_with_what_a_directory_holds(tmp_path: Path) -> None:
    """A listing that is held takes 500 bytes or more for each entry, and its pages are 1 MiB."""
    count = 20_000
    raw = tmp_path / "disk.raw"
    raw.touch()
    os.truncate(raw, 64 * MIB)
    run("mke2fs", "-q", "-t", "ext4", "-N", str(count + 1000), raw)
    with loop_mounted(raw, "rw") as at:
        for name in ("few/file", "many/file"):
            (at / name).parent.mkdir()
            (at / name).touch()
        for number in range(count):
            os.mknod(at / f"many/{number:040}", stat.S_IFREG | 0o644)

    few, many = (memory("--image-format", "raw", raw, f"current:{name}", tmp_path) for name in ("few", "many"))
    assert count + 1 == len(os.listdir(tmp_path / "many"))
    assert many - few < count * 300

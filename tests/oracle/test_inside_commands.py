"""`ls`, `cat` and `list -v` against the kernel's mounts of the same bytes, as root and as an ordinary user."""

from __future__ import annotations

import base64
import json
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qcowfs import cli
from qcowfs.errors import UnsupportedImage
from tests.oracle.test_lock import typing
from tests.support import crash, need
from tests.support.disks import run
from tests.support.guests import Guest, bare_image, loop_mounted, make_tree, partitioned_image, volume_group
from tests.support.images import qemu
from tests.support.mounts import REPOSITORY, Person, call, launcher, me, one_line, ordinary_user
from tests.support.sparse import digest
from tests.support.terminal import on_a_terminal

TYPES = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "symlink": stat.S_IFLNK,
    "character-device": stat.S_IFCHR,
    "block-device": stat.S_IFBLK,
    "fifo": stat.S_IFIFO,
    "socket": stat.S_IFSOCK,
}
SECOND = 10**9


class Bare(NamedTuple):
    image: Path
    before: Guest
    now: Guest


class Partitioned(NamedTuple):
    image: Path
    before: dict[str, Guest]
    now: dict[str, Guest]
    parts: dict[str, Path]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    directory = tmp_path_factory.mktemp("bare")
    directory.chmod(0o711)
    image = directory / "bare.qcow2"
    return Bare(image, *bare_image(directory, image))


@pytest.fixture(scope="module")
def partitioned(tmp_path_factory: pytest.TempPathFactory) -> Partitioned:
    directory = tmp_path_factory.mktemp("parts")
    directory.chmod(0o711)
    image = directory / "parts.qcow2"
    return Partitioned(image, *partitioned_image(directory, image))


@pytest.fixture(params=["me", "ordinary"])
def person(request: pytest.FixtureRequest) -> Person:
    return me() if request.param == "me" else ordinary_user()


def output(*words: str | Path, person: Person | None = None) -> bytes:
    """Return what a command that succeeds prints."""
    who = person or me()
    command = [*launcher(who), *map(str, words)]
    done = subprocess.run(command, capture_output=True, timeout=60, env=who.environment(), **who.popen_arguments())
    assert (0, b"") == (done.returncode, done.stderr)
    return done.stdout


def raw(entry: dict[str, Any], key: str) -> bytes:
    """Return the bytes of a text of the document."""
    return base64.b64decode(entry[f"{key}_b64"]) if f"{key}_b64" in entry else os.fsencode(entry[key])


def nanoseconds(text: str) -> int:
    whole, fraction = text.removesuffix("Z").split(".")
    return int(datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp()) * SECOND + int(fraction)


def told(entry: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a document says of an entry, in the form of `expected`."""
    return (
        TYPES[entry["type"]] | int(entry["mode"], 8),
        *(entry[key] for key in ("nlink", "uid", "gid")),
        os.makedev(*entry.get("device", (0, 0))),
        *(entry[key] for key in ("size", "blocks")),
        tuple(nanoseconds(entry[key]) for key in ("mtime", "ctime", "atime")),
        raw(entry, "target") if "target" in entry else None,
    )


def expected(guest: Guest, prefix: bytes = b"") -> dict[bytes, tuple[Any, ...]]:
    """Return all below the root of what the kernel showed, without xattrs and contents of files."""
    return {
        prefix + path: (*facts[:8], facts[9] if stat.S_ISLNK(facts[0]) else None)
        for path, facts in guest.items()
        if path
    }


def entries(document: bytes) -> dict[bytes, dict[str, Any]]:
    found = json.loads(document)
    assert (1, []) == (found["version"], found["errors"])
    named = {raw(entry, "path"): entry for entry in found["entries"]}
    assert len(found["entries"]) == len(named)
    return named


def test_every_entry_of_a_bare_disk_is_as_the_kernel_shows_it(bare: Bare, person: Person) -> None:
    for point, guest in (("before", bare.before), ("current", bare.now)):
        found = entries(output("ls", "-R", "--json", bare.image, point, person=person))

        assert expected(guest) == {path: told(entry) for path, entry in found.items()}
        assert all(raw(entry, "name") == path.rpartition(b"/")[2] for path, entry in found.items())
    assert len(bare.before) > 700


def test_every_entry_of_two_partitions_is_as_the_kernel_shows_it(partitioned: Partitioned, person: Person) -> None:
    found = entries(output("ls", "-R", "--json", partitioned.image, "before", person=person))

    both = {p: expected(guest, p.encode() + b"/") for p, guest in partitioned.before.items()}
    roots = {name: found.pop(name) for name in (b"p1", b"p2", b"p1.raw", b"p2.raw")}
    assert both["p1"] | both["p2"] == {path: told(entry) for path, entry in found.items()}
    for name in ("p1", "p2"):
        assert partitioned.before[name][b""][:8] == told(roots[name.encode()])[:8]
        assert ("file", "0444", 40 << 20) == tuple(roots[f"{name}.raw".encode()][k] for k in ("type", "mode", "size"))


def test_every_file_is_as_the_kernel_reads_it(bare: Bare, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    files = {path: facts[9] for path, facts in bare.before.items() if stat.S_ISREG(facts[0])}
    small = random.Random(1).sample([path for path in files if path.startswith(b"many/")], 20)
    chosen = [path for path in files if not path.startswith(b"many/")] + small

    for path in chosen:
        assert cli.main(["cat", str(bare.image), "before:" + os.fsdecode(path)]) == 0
        assert files[path] == digest([(0, capsysbinary.readouterr().out)]), path
    assert len(chosen) > 30


def test_cat_streams_files_and_partitions(partitioned: Partitioned, person: Person) -> None:
    content = digest([(0, output("cat", partitioned.image, "before:p2/large", person=person))])

    assert partitioned.before["p2"][b"large"][9] == content
    for name, path in partitioned.parts.items():
        assert path.read_bytes() == output("cat", partitioned.image, f"before:{name}.raw", person=person)


@pytest.mark.parametrize(
    "path",
    [
        "absolute",
        "relative",
        "above",
        "chain",
        "var/run/fstab",
        "var/log/up/fstab",
        "//etc/./apt/../fstab",
        "etc/second",
    ],
)
def test_links_lead_to_the_guests_files_and_no_others(
    partitioned: Partitioned, bare: Bare, path: str, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    for image, place in ((bare.image, "before:" + path), (partitioned.image, "before:p2/" + path)):
        assert cli.main(["cat", str(image), place]) == 0
        assert capsysbinary.readouterr().out == b"UUID=1 / ext4 defaults 0 1\n"


def listed(capsys: pytest.CaptureFixture[str], *words: str | Path) -> list[str]:
    assert cli.main(["ls", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_link_at_the_end_is_shown_and_followed_with_a_slash(bare: Bare, capsys: pytest.CaptureFixture[str]) -> None:
    assert ["var/run"] == listed(capsys, bare.image, "before:var/run")
    assert ["apt", "fstab", "second"] == listed(capsys, bare.image, "before:var/run/")
    assert listed(capsys, "-l", bare.image, "before:var/run")[0].endswith(" var/run -> /etc")


def test_names_in_a_pipe_are_those_that_ls_prints(bare: Bare, tmp_path: Path) -> None:
    names = sorted(path for path in bare.before if path and b"/" not in path)

    assert b"".join(name + b"\n" for name in names) == output("ls", bare.image, "before")


def test_names_on_a_terminal_are_escaped(bare: Bare) -> None:
    code, said = on_a_terminal([*launcher(), "ls", str(bare.image), "before"], "stdout")

    assert code == 0
    assert {rb"\xff\xfe", rb"new\x0aline", rb"back\\slash", rb"\x1b[31mred", b"etc"} <= set(said.split(b"\r\n"))


def test_long_lines_are_those_of_ls(bare: Bare, tmp_path: Path) -> None:
    """All but the date, whose form is another, and the names, which ls quotes in no pipe either."""
    raw_image = bare.image.with_name("before.raw")
    with loop_mounted(raw_image) as at:
        words = ["ls", "-lnA", "--time-style=long-iso", "--block-size=1", "."]
        said = subprocess.run(words, cwd=at, env={**os.environ, "LC_ALL": "C"}, capture_output=True, check=True).stdout

    ours = output("ls", "-l", bare.image, "before").split(b"\n")
    theirs = said.split(b"\n")
    assert [line.split() for line in theirs[1:]] == [line.split() for line in ours[1:]]
    assert int(theirs[0].split()[1]) // 1024 == int(ours[0].split()[1])


def test_directories_are_listed_one_after_the_other_as_ls_does(bare: Bare, tmp_path: Path) -> None:
    with loop_mounted(bare.image.with_name("before.raw")) as at:
        words = ["ls", "-1AR", "."]
        said = subprocess.run(words, cwd=at, env={**os.environ, "LC_ALL": "C"}, capture_output=True, check=True).stdout

    ours = output("ls", "-R", bare.image, "before").replace(b"before:", b"./").replace(b"\n./:\n", b"\n.:\n")
    assert said.removeprefix(b".:\n") == ours.removeprefix(b"./\n")


def test_a_crashed_machines_files_are_those_after_recovery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And with --norecovery those that are in their place already."""
    need("mkfs.ext4", "qemu-img")
    image = crash.crash(tmp_path, crash.Kind("ext4", (), stops=(crash.LOGFLUSH,)), seed=1)
    at_boot = tmp_path / "at-boot"
    shutil.copy(image, at_boot)
    with crash.mounted(at_boot) as mounted:
        names = {name.name for name in mounted.iterdir()}
    with crash.mounted(image, "ro,noload") as mounted:
        unrecovered = {name.name for name in mounted.iterdir()}
    qcow2 = tmp_path / "disk.qcow2"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", image, qcow2)

    assert names == set(listed(capsys, qcow2))
    assert unrecovered == set(listed(capsys, "--norecovery", qcow2))
    assert names != unrecovered
    assert "recovered (jbd2: " in verbose(capsys, qcow2)
    assert "not clean" in verbose(capsys, qcow2, "--norecovery")


def verbose(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    assert cli.main(["list", "-v", *map(str, words)]) == 0
    return capsys.readouterr().out


def test_list_tells_what_is_inside_each_point(partitioned: Partitioned, person: Person) -> None:
    document = json.loads(output("list", "-v", "--json", partitioned.image, person=person))

    for point in document["points"]:
        assert (None, []) == (point["trouble"], point["notes"])
        assert [("p1", "ext2"), ("p2", "ext4")] == [(v["name"], v["file_system"]["type"]) for v in point["volumes"]]
        for volume in point["volumes"]:
            assert ("partition", 40 << 20, None, None) == tuple(
                volume[key] for key in ("kind", "size", "recovery", "trouble")
            )
            assert volume["file_system"]["clean"]
    said = run("blkid", "-o", "value", "-s", "UUID", partitioned.parts["p2"])
    assert said.strip() == document["points"][1]["volumes"][1]["file_system"]["uuid"]


def test_a_volume_group_of_two_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    need("lvm", "qemu-img")
    guest, images = volume_group(tmp_path)
    found = entries(output("ls", "-R", "--json", "--with", images[1], images[0], "both:vg-lv"))
    assert expected(guest, b"vg-lv/") == {path: told(entry) for path, entry in found.items()}
    for place in ("both:vg-lv", "both:vg-lv.raw"):
        assert cli.main(["ls", str(images[0]), place]) == 1
        said = capsys.readouterr().err.splitlines()
        assert re.fullmatch(f"qcowfs: {place}: the physical volume [-\\w]+ is missing", said[0])
        assert said[1].startswith("hint: --with adds")
    assert "no files: " in verbose(capsys, images[0])


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """An image in which the inode of /dir/bad has a wrong checksum, and /dir/good has not."""
    need("debugfs", "qemu-img")
    disk, image = tmp_path / "disk.raw", tmp_path / "disk.qcow2"

    def fill(root: Path) -> None:
        (root / "dir").mkdir()
        for name in ("bad", "good"):
            (root / "dir" / name).write_bytes(name.encode())

    make_tree(disk, 16 << 20, fill, "-t", "ext4", "-O", "metadata_csum")
    said = run("debugfs", "-R", "imap /dir/bad", disk)
    block, offset = re.search(r"located at block (\d+), offset 0x([0-9a-f]+)", said).groups()  # type: ignore[union-attr]
    size = int(re.search(r"Block size: +(\d+)", run("dumpe2fs", "-h", disk)).group(1))  # type: ignore[union-attr]
    with open(disk, "r+b") as file:
        file.seek(int(block) * size + int(offset, 16) + 2)  # i_uid
        file.write(b"\x11\x22")
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, image)
    return image


def test_a_damaged_entry_is_shown_and_told_and_the_rest_is_listed(damaged: Path) -> None:
    for words in (("-l",), ("-R",), ("-R", "--json"), ()):
        done = call("ls", *words, damaged, "current:dir")

        assert done.returncode == 1
        assert one_message(done).startswith("qcowfs: current:dir/bad: ")
        assert "bad" in done.stdout
        assert "good" in done.stdout
    document = json.loads(call("ls", "--json", damaged, "current:dir").stdout)
    assert ["bad"] == [entry["name"] for entry in document["entries"] if "error" in entry]
    assert ["dir/bad"] == [error["path"] for error in document["errors"]]
    assert b"good" == output("cat", damaged, "current:dir/good")
    assert one_line(call("cat", damaged, "current:dir/bad")).startswith("qcowfs: current:dir/bad: ")


def one_message(done: subprocess.CompletedProcess[str]) -> str:
    (line,) = done.stderr.splitlines()
    return line


@pytest.mark.parametrize(
    ("verb", "place", "code", "message", "hint"),
    [
        ("cat", "before:p2/etc/fstb", 17, "before:p2/etc/fstb: No such file or directory", "did you mean fstab?"),
        ("ls", "before:p2/etc/fstab/x", 17, "before:p2/etc/fstab/x: Not a directory", None),
        ("ls", "before:p2/etc/fstab/", 17, "before:p2/etc/fstab/: Not a directory", None),
        ("ls", "before:p1.raw/", 17, "before:p1.raw/: Not a directory", None),
        ("ls", "before:p11", 17, "before:p11: No such file or directory", "did you mean p1?"),
        ("cat", "before:p2/loop", 1, "before:p2/loop: Too many levels of symbolic links", None),
        ("cat", "before:p2/etc", 1, "before:p2/etc: Is a directory", None),
        ("cat", "before:", 1, "before: Is a directory", None),
        ("cat", "before:p2/fifo", 1, "before:p2/fifo: not a regular file", None),
        ("cat", "before:p2/chr", 1, "before:p2/chr: not a regular file", None),
        ("cat", "bfore:p2/etc", 17, "no point bfore: not a name, an id or a snapshot's name", "did you mean before?"),
    ],
)
def test_what_is_not_there_is_one_line(
    partitioned: Partitioned, verb: str, place: str, code: int, message: str, hint: str | None
) -> None:
    done = call(verb, partitioned.image, place)

    assert one_line(done).endswith(message)
    assert code == done.returncode
    assert hint is None or f"hint: {hint}" in done.stderr


def test_a_reader_that_goes_away_is_no_error(partitioned: Partitioned) -> None:
    for words in (("cat", partitioned.image, "before:p2.raw"), ("ls", "-R", "--json", partitioned.image, "before")):
        command = [*launcher(), *map(str, words)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            assert process.stdout.read(1)
            process.stdout.close()
            assert process.stderr.read() == b""
        assert process.returncode == 141


@pytest.mark.parametrize("words", [["ls"], ["cat", "before:p2/etc/fstab"], ["list", "-v"]])
def test_output_that_goes_nowhere_is_told(partitioned: Partitioned, words: list[str]) -> None:
    verb, *place = words
    command = [*launcher(), verb, str(partitioned.image), *place]
    full = subprocess.run(["sh", "-c", 'exec "$@" >/dev/full', "sh", *command], capture_output=True, text=True)
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True)

    assert (1, "qcowfs: standard output: No space left on device\n") == (full.returncode, full.stderr)
    if verb != "list":
        assert (1, "qcowfs: standard output is closed\n") == (closed.returncode, closed.stderr)


def test_no_fuse_is_needed(partitioned: Partitioned) -> None:
    code = "import sys; sys.modules.update(pyfuse3=None, trio=None); from qcowfs.cli import main; sys.exit(main())"
    for words in (["ls", "-R"], ["list", "-v"]):
        command = [sys.executable, "-c", code, *words, str(partitioned.image)]
        done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": str(REPOSITORY)})

        assert (0, b"") == (done.returncode, done.stderr)


def test_an_interrupt_ends_the_command_and_its_workers(partitioned: Partitioned) -> None:
    command = [*launcher(), "cat", str(partitioned.image), "before:p2.raw"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr.read() == b""  # also of whoever inherited it
        process.stdout.close()
    assert process.returncode == 130


def test_what_is_being_written_is_not_looked_into(bare: Bare, tmp_path: Path) -> None:
    """And its snapshots are, which the writer does not touch."""
    need("qemu-io", "stdbuf")
    image = tmp_path / "disk.qcow2"
    shutil.copy(bare.image, image)
    with typing(image, tmp_path):
        refused = [call(*words) for words in (("ls", image), ("cat", image, "current:etc/fstab"))]
        snapshot = output("cat", image, "before:etc/fstab")
        points = json.loads(output("list", "-v", "--json", image))["points"]

    for done in refused:
        assert one_line(done).endswith("cannot look into current: another process has it open for writing")
        assert UnsupportedImage.exit_code == done.returncode
    assert b"UUID=1 / ext4 defaults 0 1\n" == snapshot
    assert [None, "ext4"] == [point["volumes"] and point["volumes"][0]["file_system"]["type"] for point in points]
    assert points[0]["trouble"].endswith("another process has it open for writing")


def test_a_point_whose_name_has_colons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "disk.qcow2"
    bare_disk = tmp_path / "disk.raw"
    make_tree(bare_disk, 16 << 20, lambda root: (root / "file").write_bytes(b"there"), "-t", "ext2")
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", bare_disk, image)
    for name in ("a", "a:b"):
        qemu("qemu-img", "snapshot", "-c", name, image)

    assert ["file", "lost+found"] == listed(capsys, image, "a:b")
    assert ["file"] == listed(capsys, image, "a:b:file")
    assert ["file"] == listed(capsys, image, "a:file")
    assert cli.main(["ls", str(image), "a:c"]) == 17
    assert "a:c: No such file or directory" in capsys.readouterr().err


def test_a_disk_with_nothing_known_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "empty.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "8M")

    assert cli.main(["ls", str(image)]) == 17
    assert "current: no partition, no logical volume and no file system is found in it" in capsys.readouterr().err
    assert "no partition, no logical volume" in verbose(capsys, image)

"""NAME/: the files of each point in a real mount, with and without the data plane. A loop mount is the judge."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import need
from tests.support.crash import Kind, crash
from tests.support.crash import mounted as loop_mounted
from tests.support.disks import run
from tests.support.guests import volume_group
from tests.support.mounts import Mounted, Person, call, mounted, qemu, shell, wait_until
from tests.support.trees import describe

MIB = 1 << 20
FIRST = 1 * MIB  # where p1 begins
PLANES = pytest.mark.parametrize("more", [[], ["--no-data-plane"]], ids=["data plane", "plain"])


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return two ext4 file systems: as it was once, and with changes."""
    need("mke2fs", "mount", "setfacl", "qemu-img", "sfdisk")
    folder = tmp_path_factory.mktemp("states")
    old, new = folder / "old.raw", folder / "new.raw"
    run("truncate", "-s", "40M", old)
    run("mke2fs", "-q", "-t", "ext4", "-b", "1024", "-L", "home", "-U", "11111111-2222-3333-4444-555555555555", old)
    with loop_mounted(old) as root:
        fill(root)
    shutil.copy(old, new)
    with loop_mounted(new) as root:
        (root / "etc" / "fstab").write_text("changed\n")
        (root / "gone").unlink()
        (root / "new").write_text("new\n")
    return old, new


def fill(root: Path) -> None:
    """Make one of each kind of thing."""
    for name in ("etc", "many", "deep/er/and/deeper"):
        (root / name).mkdir(parents=True)
    (root / "etc" / "fstab").write_text("first\n")
    (root / "gone").write_text("soon\n")
    for number in range(400):
        (root / "many" / f"file {number}").write_bytes(bytes([number % 256]) * (number * 5))
    (root / "deep" / "er" / "random").write_bytes(os.urandom(3 * MIB + 17))
    with (root / "sparse").open("wb") as file:
        file.seek(1 << 25)
        file.write(b"end")
    with (root / "fragments").open("wb") as file:
        for number in range(40):
            file.seek(number * 3 * 4096)
            file.write(bytes([number + 1]) * 4096)
    (root / "empty").touch()
    (root / "fast").symlink_to("etc/fstab")
    (root / "slow").symlink_to("t" * 700)
    os.link(root / "etc" / "fstab", root / "deep" / "hard")
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mkfifo(root / "pipe")
    awkward = os.fsencode(root) + b"/\xff\xfe\nname" + b"x" * 200
    os.close(os.open(awkward, os.O_CREAT | os.O_WRONLY, 0o600))
    os.chmod(awkward, 0o4711)
    os.chown(awkward, 70000, 4_000_000_000)
    os.utime(awkward, ns=(-1_500_000_001, 9_000_000_000_123_456_789))
    os.setxattr(root / "empty", "user.some", b"v" * 300)
    os.setxattr(root / "empty", "trusted.some", b"")
    run("setfacl", "-m", "u:70001:rw", root / "gone")
    run("setfacl", "-d", "-m", "u:70001:rw", root / "etc")
    (root / "secret").write_text("root's\n")
    os.chmod(root / "secret", 0)


@pytest.fixture(scope="module")
def bare(states: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an image that is one file system, whose snapshot is an earlier state of it."""
    return stacked(tmp_path_factory.mktemp("bare"), *states)


@pytest.fixture(scope="module")
def partitioned(states: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same in a partition."""
    folder = tmp_path_factory.mktemp("partitioned")
    return stacked(folder, *(in_partition(folder / path.name, path) for path in states))


def stacked(folder: Path, old: Path, new: Path) -> Path:
    """Return a backing file `data` that holds `old`, with the snapshot "one", under an overlay that holds `new`."""
    folder.chmod(0o711)  # an ordinary user mounts it too
    base, top = folder / "data.qcow2", folder / "top.qcow2"
    qemu("qemu-img", "convert", "-O", "qcow2", old, base)
    qemu("qemu-img", "snapshot", "-c", "one", base)
    qemu("qemu-img", "convert", "-O", "qcow2", "-B", base, "-F", "qcow2", new, top)
    return top


def in_partition(path: Path, filesystem: Path) -> Path:
    run("truncate", "-s", "64M", path)
    run("sfdisk", "-q", path, text="label: gpt\n1 : start=2048\n")
    with path.open("r+b") as disk:
        disk.seek(FIRST)
        disk.write(filesystem.read_bytes())
    return path


@pytest.fixture
def judged(states: tuple[Path, Path]) -> Iterator[tuple[Path, Path]]:
    """Return where the kernel shows both states."""
    with loop_mounted(states[0], "ro") as old, loop_mounted(states[1], "ro") as new:
        yield old, new


@PLANES
def test_a_bare_file_system_is_shown_as_the_kernel_shows_it(
    bare: Path, judged: tuple[Path, Path], target: Path, more: list[str]
) -> None:
    with mounted(bare, target, *more):
        assert sorted(os.listdir(target)) == sorted(
            ["current", "current.raw", "data", "data.raw", "data@one", "data@one.raw", "latest.raw"]
        )
        assert describe(target / "current") == describe(judged[1])
        assert describe(target / "data") == describe(target / "data@one") == describe(judged[0])


@PLANES
def test_a_partition_is_a_file_and_a_directory(
    partitioned: Path, judged: tuple[Path, Path], target: Path, more: list[str]
) -> None:
    with mounted(partitioned, target, *more):
        assert sorted(os.listdir(target / "current")) == ["p1", "p1.raw"]
        assert describe(target / "current" / "p1") == describe(judged[1])
        assert describe(target / "data@one" / "p1") == describe(judged[0])


def test_a_name_is_found_before_anything_was_listed(bare: Path, target: Path) -> None:
    with mounted(bare, target):
        assert (target / "data@one" / "deep" / "hard").read_text() == "first\n"
        assert not (target / "data@one" / "new").exists()


@PLANES
def test_holes_are_kept(bare: Path, target: Path, more: list[str]) -> None:
    with mounted(bare, target, *more):
        sparse = os.open(target / "current" / "sparse", os.O_RDONLY)
        try:
            assert os.pread(sparse, 10, (1 << 25) - 5) == b"\0" * 5 + b"end"
            if not more:
                assert os.lseek(sparse, 0, os.SEEK_DATA) == 1 << 25
                assert os.lseek(sparse, 0, os.SEEK_HOLE) == 0
        finally:
            os.close(sparse)


def test_whoever_mounts_reads_everything(bare: Path, target: Path, person: Person) -> None:
    person.own(target.parent)
    with mounted(bare, target, person=person) as mount:
        assert shell("cat $1", mount / "current" / "secret", person=person) == "root's\n"
        assert shell("ls $1", mount / "current" / "lost+found", person=person) == ""
        assert "2" in shell("stat -c %h $1", mount / "current" / "etc" / "fstab", person=person)


def test_the_root_says_what_it_is(bare: Path, target: Path) -> None:
    with mounted(bare, target):
        told = {
            name: os.getxattr(target / "current", f"user.qcowfs.{name}") for name in ("filesystem", "label", "uuid")
        }
        assert os.listxattr(target / "current") == []
    assert told == {
        "filesystem": b"ext4",
        "label": b"home",
        "uuid": b"11111111-2222-3333-4444-555555555555",
    }


def test_nothing_can_be_written_and_nothing_of_it_is_obeyed(bare: Path, target: Path) -> None:
    with mounted(bare, target):
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
            with pytest.raises(OSError, match="Read-only file system"):
                os.open(target / "current" / "etc" / "fstab", flags)
        with pytest.raises(OSError, match="Read-only file system"):
            os.unlink(target / "current" / "empty")
        with pytest.raises(OSError, match="Permission denied"):  # nodev
            os.open(target / "current" / "null", os.O_RDONLY)
        options = shell("findmnt -no OPTIONS $1", target).strip().split(",")
    assert {"nosuid", "nodev", "ro"} <= set(options)


@pytest.mark.parametrize("tool", ["cp -a", "rsync -aHAX", "tar"])
def test_tools_copy_a_tree_as_it_is(
    bare: Path, judged: tuple[Path, Path], target: Path, tmp_path: Path, tool: str
) -> None:
    need("rsync", "tar")
    copies = tmp_path / "ours", tmp_path / "theirs"
    with mounted(bare, target):
        for source, copy in zip((target / "current", judged[1]), copies, strict=True):
            copy.mkdir()
            if tool == "tar":
                told = "tar -C $1 --sparse --xattrs --acls -cf - . | tar -C $2 --xattrs --acls -xpSf -"
                subprocess.run(["sh", "-ec", told, "sh", source, copy], check=True)
            else:
                run(*tool.split(), f"{source}/.", copy)
    # A copy has a ctime of its own, reading it gives it an atime, and how it is laid out is up to the copier.
    ours, theirs = ({name: without_layout(facts) for name, facts in describe(copy).items()} for copy in copies)
    assert ours == theirs


def without_layout(facts: tuple) -> tuple:
    mode, nlink, uid, gid, rdev, size, _blocks, (mtime, _ctime, _atime), *rest = facts
    return mode, nlink, uid, gid, rdev, size if stat.S_ISREG(mode) else 0, mtime, *rest


def test_diff_finds_no_difference(bare: Path, judged: tuple[Path, Path], target: Path) -> None:
    with mounted(bare, target):
        told = shell("diff -r --no-dereference $1 $2 || true", target / "current", judged[1])
    # Two pipes always differ for diff.
    assert ["is a fifo"] == [line[-9:] for line in told.splitlines()], told


@PLANES
def test_owners_and_modes_can_be_mapped(bare: Path, target: Path, more: list[str]) -> None:
    with mounted(bare, target, "-o", "uid=1234,gid=5678,umask=077", *more):
        listed = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(target / "current")}
        for name in ("etc", "secret", "empty", "fast"):
            for found in (listed[name], os.lstat(target / "current" / name)):
                assert (found.st_uid, found.st_gid) == (1234, 5678)
                assert stat.S_ISLNK(found.st_mode) or not found.st_mode & 0o077
        assert (listed["fast"].st_mode, listed["etc"].st_mode) == (stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o700)


@PLANES
def test_links_are_text_unless_they_shall_be_contained(
    states: tuple[Path, Path], target: Path, tmp_path: Path, more: list[str]
) -> None:
    raw = tmp_path / "disk.raw"
    shutil.copy(states[0], raw)
    with loop_mounted(raw) as root:
        (root / "deep" / "absolute").symlink_to("/etc/fstab")
        (root / "deep" / "out").symlink_to("../../../../../../etc/passwd")
        (root / "deep" / "to-root").symlink_to("/")
        os.link(root / "deep" / "absolute", root / "deep" / "er" / "hard", follow_symlinks=False)
    with mounted(raw, target, "--image-format", "raw", *more):
        assert os.readlink(target / "current" / "deep" / "absolute") == "/etc/fstab"
    with mounted(raw, target, "--image-format", "raw", "-o", "symlinks=contain", *more):
        deep = target / "current" / "deep"
        assert (deep / "er" / "hard").read_text() == "first\n"
        assert (deep / "absolute").read_text() == "first\n"
        assert os.readlink(deep / "absolute") == "../etc/fstab"
        assert os.readlink(deep / "out") == "../etc/passwd"
        assert not (deep / "out").exists()
        assert sorted(os.listdir(deep / "to-root")) == sorted(os.listdir(target / "current"))


@PLANES
def test_a_directory_in_two_places_does_not_lead_a_contained_link_out(
    states: tuple[Path, Path], target: Path, tmp_path: Path, more: list[str]
) -> None:
    raw = tmp_path / "disk.raw"
    shutil.copy(states[0], raw)
    with loop_mounted(raw) as root:
        (root / "deep" / "er" / "and" / "twice").mkdir()
        (root / "deep" / "er" / "and" / "twice" / "link").symlink_to("/etc/fstab")
    run("debugfs", "-w", "-R", "link /deep/er/and/twice /twice", raw)
    with mounted(raw, target, "--image-format", "raw", "-o", "symlinks=contain", *more):
        top = target / "current"
        assert (top / "deep" / "er" / "and" / "twice" / "link").read_text() == "first\n"
        with pytest.raises(OSError, match="Input/output error"):
            os.listdir(top / "twice")
        assert "twice" in os.listdir(top)
        with pytest.raises(OSError, match="Input/output error"):
            os.readlink(top / "twice" / "link")
        assert (top / "deep" / "er" / "and" / "twice" / "link").read_text() == "first\n"


def test_a_journal_is_replayed_unless_it_shall_not_be(target: Path, tmp_path: Path) -> None:
    image = crash(tmp_path, Kind("mounted", ("-t", "ext4"), steps=300), 7)
    recovered = tmp_path / "recovered"
    shutil.copy(image, recovered)
    with mounted(image, target, "--image-format", "raw"):
        found = describe(target / "current", atime=False)
        assert os.getxattr(target / "current", "user.qcowfs.recovery").startswith(b"jbd2: ")
    with loop_mounted(recovered) as root:
        assert found == describe(root, atime=False)
    with mounted(image, target, "--image-format", "raw", "-o", "norecovery"), loop_mounted(image, "ro,noload") as root:
        assert os.getxattr(target / "current", "user.qcowfs.recovery") == b"not done, though it is needed"
        assert names(target / "current") == names(root) != found.keys()


def names(path: Path) -> set[bytes]:
    top = os.fsencode(path)
    return {b"", *(os.path.relpath(os.path.join(at, n), top) for at, ds, fs in os.walk(top) for n in (*ds, *fs))}


@pytest.mark.expect_warnings
@pytest.mark.parametrize("words", [["--with"], ["-o"]], ids=["--with", "-o with="])
def test_a_volume_on_two_disks_is_whole_with_both(target: Path, tmp_path: Path, words: list[str]) -> None:
    need("lvm", "qemu-img")
    guest, images = volume_group(tmp_path)
    option = f"with={images[1]}" if words == ["-o"] else str(images[1])
    with mounted(images[0], target, *words, option):
        assert sorted(os.listdir(target / "both")) == ["vg-lv", "vg-lv.raw"]
        assert describe(target / "both" / "vg-lv") == guest
        assert "vg-lv" not in (os.listdir(target / "current") if (target / "current").exists() else [])


class TestWhatCannotBeShown:
    @pytest.fixture
    def image(self, states: tuple[Path, Path], tmp_path: Path) -> Path:
        """Return a bare file system that is about to be damaged."""
        path = tmp_path / "disk.raw"
        shutil.copy(states[0], path)
        return path

    @PLANES
    @pytest.mark.expect_warnings
    def test_a_tree_with_an_unknown_feature_has_no_directory(self, image: Path, target: Path, more: list[str]) -> None:
        run("debugfs", "-w", "-R", "ssv feature_incompat 0x4000000", image)
        with mounted(image, target, "--image-format", "raw", *more) as mount:
            assert sorted(os.listdir(target)) == ["current.raw"]
            with pytest.raises(FileNotFoundError):
                os.stat(target / "current")
            wait_until(lambda: "current: " in mount.log.read_text(), "the log does not say why")

    @PLANES
    def test_a_damaged_directory_is_an_error_and_its_siblings_are_there(
        self, image: Path, target: Path, more: list[str]
    ) -> None:
        (block,) = run("debugfs", "-R", "blocks /etc", image).split()
        with image.open("r+b") as disk:
            disk.seek(int(block) * 1024)
            disk.write(b"\xff" * 1024)
        with mounted(image, target, "--image-format", "raw", *more) as mount:
            with pytest.raises(OSError, match="Input/output error"):
                os.listdir(target / "current" / "etc")
            assert (target / "current" / "gone").read_text() == "soon\n"
            assert "current: " in mount.log.read_text()


def test_many_points_are_listed_without_opening_each(states: tuple[Path, Path], target: Path, tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu("qemu-img", "convert", "-O", "qcow2", states[0], image)
    for number in range(40):
        qemu("qemu-img", "snapshot", "-c", f"s{number}", image)
    with mounted(image, target) as mount:
        assert len([name for name in os.listdir(target) if not name.endswith(".raw")]) == 41
        assert workers(mount) == 0
        for number in range(40):
            assert (target / f"s{number}" / "etc" / "fstab").read_text() == "first\n"
        assert 0 < workers(mount) <= 16
        assert stat.S_IMODE(os.stat(target / "s3").st_mode) == 0o755


def workers(mount: Mounted) -> int:
    """Return how many processes read trees for a mount."""
    told = run("ps", "-eo", "pid=,ppid=")
    parents = [tuple(map(int, line.split())) for line in told.splitlines()]
    launchers = {pid for pid, parent in parents if parent == mount.pid}
    return sum(parent in launchers for _, parent in parents)


@pytest.mark.expect_warnings
def test_a_worker_that_is_killed_costs_nothing_but_time(bare: Path, target: Path) -> None:
    with mounted(bare, target) as mount:
        os.listdir(target / "current" / "many")
        for name in ("etc", "deep"):
            shell("pkill -KILL -P $(pgrep -P $1)", str(mount.pid))
            try:
                found = os.listdir(target / "current" / name)
            except OSError:  # it was noticed by this request
                found = os.listdir(target / "current" / name)
            assert found
        assert call("umount", target).returncode == 0
        mount.wait_gone()
        assert run("pgrep", "-P", str(mount.pid), check=False) == ""


@PLANES
@pytest.mark.expect_warnings
def test_a_tree_that_nobody_can_open_now_is_an_error_and_not_absent(
    bare: Path, partitioned: Path, target: Path, more: list[str]
) -> None:
    for image, inside in ((bare, target / "current"), (partitioned, target / "current" / "p1")):
        with mounted(image, target, *more) as mount:
            shell("pkill -KILL -P $1", str(mount.pid))
            for _ in range(2):
                for look in (os.stat, os.listdir):
                    with pytest.raises(OSError, match="Input/output error"):
                        look(inside)
                assert inside.name in os.listdir(inside.parent)
            assert "cannot be started" in mount.log.read_text()

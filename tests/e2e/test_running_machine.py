"""Images that a running virtual machine uses: what is shown of them, and who may disturb whom.

Evidence: a chosen scenario on a real virtual machine; QEMU's own locks and `qemu-img convert -U` are the judges.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import need
from tests.support.mounts import Person, call, launcher, mounted, qemu, shell
from tests.support.vm import Machine, MachineError

pytestmark = pytest.mark.slow

MIB = 1 << 20
ATTEMPTS = 'wc -c <"$1/disk/gone"; cat "$1/disk/etc/shadow" 2>/dev/null || echo refused'  # what another user tries
WARNING = (
    "qcowfs: warning: {}: current.raw is left out: another process has the image open for writing; "
    "--live shows it as it is at each read\n"
)


def write(machine: Machine, letter: str, place: int = 0) -> None:
    """Let the guest fill the MiB at `place` (in MiB) of its first disk with a letter, down to the image."""
    source = f"tr '\\0' {letter} </dev/zero | head -c {MIB}"
    machine.run(f"{source} | dd of=/dev/vda bs={MIB} seek={place} iflag=fullblock conv=fsync")


def first_letter(disk: Path) -> bytes:
    with disk.open("rb") as file:
        return os.pread(file.fileno(), 1, 4096)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return an image with the internal snapshot `before`, in which the first MiB is all A."""
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "64M")
    qemu("qemu-io", "-c", f"write -P 0x41 0 {MIB}", path)
    qemu("qemu-img", "snapshot", "-c", "before", path)
    return path


@pytest.fixture
def machine(image: Path, tmp_path: Path) -> Iterator[Machine]:
    """Return a running machine that has the image open for writing."""
    with Machine([image], directory=tmp_path) as running:
        yield running


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


def test_only_frozen_points_of_a_running_machines_image_are_shown(
    machine: Machine, image: Path, target: Path, tmp_path: Path
) -> None:
    """`current.raw` is left out, the snapshot reads as QEMU reads it, and the guest goes on writing."""
    write(machine, "B")

    with mounted(image, target):
        names = sorted(os.listdir(target))
        write(machine, "C")
        qemu("qemu-img", "convert", "-U", "-l", "before", "-O", "raw", image, tmp_path / "before.raw")
        same = filecmp.cmp(tmp_path / "before.raw", target / "before.raw", shallow=False)
        write(machine, "D", place=1)

    assert ["before.raw", "latest.raw"] == names
    assert same


def test_one_line_names_live_for_a_running_machines_image(machine: Machine, image: Path, target: Path) -> None:
    done = call("mount", image, target)
    ended = call("umount", target)

    assert (0, 0) == (done.returncode, ended.returncode)
    assert 1 == len(done.stderr.splitlines())
    assert "--live" in done.stderr


def test_live_shows_what_the_guest_writes_at_each_read(machine: Machine, image: Path, target: Path) -> None:
    seen = []

    with mounted(image, target, "--live"):
        for letter in "BCD":
            write(machine, letter)
            seen.append(first_letter(target / "current.raw"))
        before = first_letter(target / "before.raw")

    assert [b"B", b"C", b"D"] == seen
    assert b"A" == before


def test_a_layer_that_the_machine_no_longer_writes_is_shown_whole(
    machine: Machine, image: Path, target: Path, tmp_path: Path
) -> None:
    """After blockdev-snapshot-sync QEMU holds the old image as a reader, and so may we: the guest writes elsewhere."""
    write(machine, "B")
    machine.qmp("blockdev-snapshot-sync", device="disk0", snapshot_file=str(tmp_path / "overlay.qcow2"), format="qcow2")

    with mounted(image, target):
        write(machine, "C")
        names = sorted(os.listdir(target))
        letter = first_letter(target / "current.raw")

    assert ["before.raw", "current.raw", "latest.raw"] == names
    assert b"B" == letter


@pytest.fixture
def frozen(machine: Machine, tmp_path: Path) -> tuple[Path, str]:
    """Let the machine write files and be snapshotted, with its file system mounted; return the overlay, and a checksum.

    Since then it has deleted one of the files, and written another.
    """
    machine.run("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt && mkdir /mnt/etc")
    machine.run("echo hunter2 >/mnt/etc/shadow && chmod 600 /mnt/etc/shadow")
    machine.run("head -c 3000000 /dev/urandom >/mnt/gone && sync")
    checksum = machine.run("sha256sum /mnt/gone").split()[0]
    overlay = tmp_path / "overlay.qcow2"
    machine.qmp("blockdev-snapshot-sync", device="disk0", snapshot_file=str(overlay), format="qcow2")
    machine.run("rm /mnt/gone && echo later >/mnt/later && sync")
    return overlay, checksum


def test_files_of_a_running_machines_frozen_layer_are_shown(
    machine: Machine, frozen: tuple[Path, str], target: Path
) -> None:
    """The layer was frozen with a journal that is not empty; the machine writes on meanwhile, and never notices."""
    overlay, checksum = frozen

    with mounted(overlay, target):
        names = sorted(os.listdir(target))
        recovery = os.getxattr(target / "disk", "user.qcowfs.recovery")
        before = sorted(os.listdir(target / "disk"))
        machine.run("head -c 3000000 /dev/urandom >/mnt/more && rm /mnt/later && sync")
        read = hashlib.sha256((target / "disk" / "gone").read_bytes()).hexdigest()
        after = sorted(os.listdir(target / "disk"))

    assert machine.run("ls -A /mnt").split() == ["etc", "lost+found", "more"]
    assert names == ["disk", "disk.raw", "disk@before.raw", "latest.raw"]
    assert recovery.startswith(b"jbd2: ")
    assert before == after == ["etc", "gone", "lost+found"]
    assert read == checksum


def test_another_machine_boots_with_the_exports(machine: Machine, frozen: tuple[Path, str], tmp_path: Path) -> None:
    """A chain, a lone image, a raw disk: its kernel replays their journals, and its checksums are the first one's."""
    overlay, checksum = frozen
    machine.poweroff()
    chain, based = tmp_path / "chain", tmp_path / "based.qcow2"
    for words in (
        ("--all", chain, overlay),
        ("-O", "qcow2", "--compression", "zstd", overlay, "disk", tmp_path / "alone.qcow2"),
        (overlay, "disk", tmp_path / "disk.raw"),
    ):
        assert call("export", *words).returncode == 0
    # A machine writes to what it boots with; an overlay's backing file is to stay as it is.
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", chain / "disk.qcow2", "-F", "qcow2", based)
    for path in (*chain.iterdir(), tmp_path / "alone.qcow2"):
        qemu("qemu-img", "check", "-q", "-f", "qcow2", path)

    disks = [chain / "current.qcow2", based, tmp_path / "alone.qcow2", tmp_path / "disk.raw"]
    with Machine(disks, directory=tmp_path) as another:
        another.run("cd /mnt; for disk in a b c d; do mkdir $disk && mount /dev/vd$disk $disk || exit; done")
        files = another.run("cd /mnt; ls -d */gone */later").split()
        checksums = another.run("cd /mnt; sha256sum */gone").split()[::2]
        later = another.run("cat /mnt/a/later")
        another.poweroff()

    assert {"current.qcow2", "disk.qcow2", "disk@before.qcow2"} == set(os.listdir(chain))
    assert ["a/later", "b/gone", "c/gone", "d/gone"] == sorted(files)
    assert [checksum] * 3 == checksums
    assert later == "later\n"


def test_whoever_mounts_reads_all_files_and_others_what_modes_let_them(
    frozen: tuple[Path, str], target: Path, ordinary: Person
) -> None:
    if ordinary.is_me:
        pytest.skip("needs root")
    overlay, _checksum = frozen

    with mounted(overlay, target, "--allow-other") as mount:
        mine = shell('cat "$1/disk/etc/shadow"', mount.path)
        theirs = shell(ATTEMPTS, mount.path, person=ordinary)

    assert mine == "hunter2\n"
    assert theirs.splitlines() == ["3000000", "refused"]


def test_modes_bind_even_an_ordinary_user_who_lets_others_in(
    frozen: tuple[Path, str], target: Path, ordinary: Person
) -> None:
    """Where /etc/fuse.conf lets them: in a namespace of its own, the machine's file stays as it is."""
    need("unshare", "setpriv")
    if ordinary.is_me:
        pytest.skip("needs root")
    overlay, _checksum = frozen
    ordinary.own(target)
    conf = target.with_name("fuse.conf")
    conf.write_text("user_allow_other\n")
    become = [
        "setpriv",
        "--reuid",
        str(ordinary.uid),
        "--regid",
        str(ordinary.gid),
        "--clear-groups",
        *launcher(ordinary),
    ]
    steps = f"""
        mount --bind "$1" /etc/fuse.conf; overlay=$2; target=$3; shift 3
        "$@" mount --allow-other "$overlay" "$target"
        trap '"$@" umount "$target"' EXIT
        cat "$target/disk/etc/shadow"
        setpriv --reuid 65533 --regid 65533 --clear-groups sh -c '{ATTEMPTS}' sh "$target"
    """

    done = subprocess.run(
        ["unshare", "--mount", "sh", "-euc", steps, "sh", conf, overlay, target, *become],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (0, "") == (done.returncode, done.stderr.replace(WARNING.format(overlay), ""))
    assert ["hunter2", "3000000", "refused"] == done.stdout.splitlines()


def test_a_machine_does_not_start_on_a_mounted_image_but_after_it(image: Path, target: Path, tmp_path: Path) -> None:
    with mounted(image, target), pytest.raises(MachineError, match='Failed to get "write" lock'):
        Machine([image], directory=tmp_path).start()

    with Machine([image], directory=tmp_path) as machine:
        write(machine, "B")


def test_no_lock_lets_a_machine_start_on_a_mounted_image(image: Path, target: Path, tmp_path: Path) -> None:
    with mounted(image, target, "--no-lock"), Machine([image], directory=tmp_path) as machine:
        write(machine, "B")
        before = first_letter(target / "before.raw")

    assert b"A" == before

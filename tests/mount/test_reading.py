"""Ordinary programs read the points: cp, cmp, dd, mmap, many readers at once, and the kernel through a loop device."""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mount.images import MIB, Story
from tests.support import lacking, need
from tests.support.mounts import Mounted, Person, call, mounted, one_line, qemu, shell, wait_until


@pytest.fixture(params=["data plane", "no data plane"])
def mount(request: pytest.FixtureRequest, story: Story, target: Path) -> Iterator[Mounted]:
    with mounted(story.image, target, *(["--no-data-plane"] if request.param == "no data plane" else [])) as found:
        yield found


def content(story: Story, name: str) -> bytes:
    expected = next(found for found in story.expected if found.name == name)
    return expected.content.read_bytes()[: expected.size]


def test_cp_copies_bytes_and_date(mount: Mounted, story: Story, tmp_path: Path) -> None:
    shell('cp -p "$1" "$2"', mount / "data.raw", tmp_path / "copy")

    assert (tmp_path / "copy").read_bytes() == content(story, "data.raw")
    assert (tmp_path / "copy").stat().st_mtime_ns == (mount / "data.raw").stat().st_mtime_ns


def test_cmp_finds_points_equal_and_different(mount: Mounted, story: Story) -> None:
    shell('cmp "$1" "$2"', mount / "current.raw", story.expected[0].content)
    done = subprocess.run(["cmp", "-s", mount / "one#3.raw", mount / "one#4.raw"], check=False)

    assert done.returncode == 1


@pytest.mark.parametrize("flags", ["", "iflag=direct", "iflag=nonblock"])
@pytest.mark.parametrize("size", [512, 4096, 65536, 3 * MIB])
def test_dd_reads_blocks_of_any_size(mount: Mounted, story: Story, size: int, flags: str) -> None:
    command = f'dd if="$1" bs={size} {flags} status=none | cksum'

    assert shell(command, mount / "current.raw") == shell('cksum < "$1"', story.expected[0].content)


def test_a_mapping_shows_the_bytes(mount: Mounted, story: Story) -> None:
    with (mount / "current.raw").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
        assert len(view) == 6 * MIB
        assert hashlib.sha256(view).digest() == hashlib.sha256(content(story, "current.raw")).digest()


def test_tail_and_seek_to_the_end_find_the_end(mount: Mounted, story: Story) -> None:
    last = content(story, "current.raw")[-1000:]
    with (mount / "current.raw").open("rb") as file:
        assert file.seek(0, os.SEEK_END) == 6 * MIB
        file.seek(-1000, os.SEEK_END)
        assert file.read() == last


def test_tar_keeps_every_point(mount: Mounted, story: Story, tmp_path: Path) -> None:
    need("tar")
    shell('tar -C "$1" -cf - . | tar -C "$2" -xf - ', mount.path, made(tmp_path / "out"))

    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(mount.path))
    assert (tmp_path / "out" / "2.raw").read_bytes() == content(story, "2.raw")
    assert os.readlink(tmp_path / "out" / "latest.raw") == story.latest


def test_tar_reads_a_sparse_point_that_has_nothing_of_its_own(tmp_path: Path, target: Path) -> None:
    """A new overlay. GNU tar -S archives a file without blocks as one hole, and never reads it."""
    need("tar", "qemu-img", "qemu-io")
    base, image = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", base)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", image)

    with mounted(image, target) as mount:
        shell('tar -C "$1" -cSf - current.raw | tar -C "$2" -xf -', mount.path, made(tmp_path / "out"))

    assert (tmp_path / "out" / "current.raw").read_bytes() == bytes([7]) * MIB


def made(path: Path) -> Path:
    path.mkdir()
    return path


def test_many_threads_read_right_at_random(mount: Mounted, story: Story) -> None:
    names = ["current.raw", "data.raw", "2.raw", "one#3.raw"]
    bytes_of = {name: content(story, name) for name in names}

    def read(seed: int) -> int:
        dice = random.Random(seed)
        name = dice.choice(names)
        descriptor = os.open(mount / name, os.O_RDONLY | (os.O_DIRECT if seed % 2 else 0))
        view = mmap.mmap(-1, 65536)  # page-aligned, as O_DIRECT wants its buffer
        try:
            for _ in range(100):
                offset, length = dice.randrange(len(bytes_of[name]) // 4096) * 4096, dice.choice([4096, 16384, 65536])
                count = os.preadv(descriptor, [memoryview(view)[:length]], offset)
                assert view[:count] == bytes_of[name][offset : offset + length]
        finally:
            view.close()
            os.close(descriptor)
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(read, range(16))) == 16


def test_many_processes_read_right_at_once(mount: Mounted, story: Story) -> None:
    code = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())"
    names = [found.name for found in story.expected]
    readers = [
        subprocess.Popen([sys.executable, "-c", code, str(mount / name)], stdout=subprocess.PIPE, text=True)
        for name in names
    ]
    found = {name: reader.communicate()[0].strip() for name, reader in zip(names, readers, strict=True)}

    assert found == {name: hashlib.sha256(content(story, name)).hexdigest() for name in names}


def test_an_ordinary_user_reads_too(story: Story, target: Path, tmp_path: Path, ordinary: Person) -> None:
    ordinary.own(tmp_path)
    ordinary.own(target)
    for folder in (story.image.parent, *(() if ordinary.is_me else (story.image.parent.parent,))):
        folder.chmod(0o755)

    with mounted(story.image, target, person=ordinary):
        found = shell('dd if="$1/current.raw" bs=64k status=none | cksum', target, person=ordinary)
        owner = shell('stat -c "%u %g %a" "$1/current.raw"', target, person=ordinary)

    assert found == shell('cksum < "$1"', story.expected[0].content)
    assert owner == f"{ordinary.uid} {ordinary.gid} 444\n"


def test_a_second_reader_asks_nothing_of_the_daemon(mount: Mounted) -> None:
    """keep_cache: what the kernel has read once, it need not ask for again."""
    path = mount / "current.raw"
    path.read_bytes()

    before = wake_ups(mount)
    for _ in range(20):
        path.read_bytes()
        path.stat()

    # An open and a release each time, and nothing else: 6 MiB in requests of 128 KiB would be 960 more.
    assert wake_ups(mount) - before < 200


def wake_ups(mount: Mounted) -> int:
    """Return how often the daemon was given the processor: at least once for each request that it waited for."""
    lines = Path(f"/proc/{mount.pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)


@pytest.fixture
def file_system(tmp_path: Path) -> Path:
    """Return an overlay over an ext4, with a file that only the backing file still has."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    need("mkfs.ext4", "losetup", "mount", "qemu-img", "qemu-io", "debugfs")
    tree = made(tmp_path / "tree")
    (tree / "data1.dat").write_bytes(random.Random(1).randbytes(MIB))
    raw, base, top = (tmp_path / name for name in ("ext4.raw", "data.qcow2", "top.qcow2"))
    shell('mkfs.ext4 -q -d "$1" "$2" 16M', tree, raw)
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, base)
    shell('debugfs -w -R "rm data1.dat" "$1" 2>/dev/null', raw)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    changed = tmp_path / "changed.qcow2"
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-B", base.name, "-F", "qcow2", raw, changed)
    changed.rename(top)
    return top


def test_the_kernel_mounts_a_point_and_a_deleted_file_is_there(file_system: Path, target: Path, tmp_path: Path) -> None:
    inside = made(tmp_path / "inside")
    found = {}
    with mounted(file_system, target) as mount:
        for name in ("data.raw", "current.raw"):
            shell('mount -o ro,loop,noload "$1" "$2"', mount / name, inside)
            try:
                found[name] = sorted(os.listdir(inside))
                if name == "data.raw":
                    digest = hashlib.sha256((inside / "data1.dat").read_bytes()).digest()
            finally:
                shell('umount "$1"', inside)
        wait_until(lambda: not loops(target), "the loop device still holds the file")

    assert found == {"data.raw": ["data1.dat", "lost+found"], "current.raw": ["lost+found"]}
    assert digest == hashlib.sha256((tmp_path / "tree" / "data1.dat").read_bytes()).digest()


def test_a_loop_device_that_keeps_the_mount_busy_is_named(file_system: Path, target: Path) -> None:
    if not os.path.isdir("/sys/block"):
        lacking("sysfs is not mounted")
    with mounted(file_system, target) as mount:
        device = shell('losetup -r -f --show "$1"', mount / "data.raw").strip()
        try:
            done = call("umount", target)
        finally:
            shell('losetup -d "$1"', device)
        wait_until(lambda: not loops(target), "the loop device still holds the file")

    assert done.returncode == 14
    assert f"busy: in use by {device}" in one_line(done)


def loops(target: Path) -> list[str]:
    """Return the loop devices over files below `target`."""
    return [line for line in shell("losetup -a").splitlines() if str(target) in line]

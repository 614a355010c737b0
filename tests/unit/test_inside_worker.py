"""A tree that is read by a real, confined worker: what it answers, what it may not do, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qcowfs import limits
from qcowfs.errors import ReadFault, TreeFault
from qcowfs.inside import readers
from qcowfs.inside.blocks import Blocks
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from qcowfs.inside.reader import DIGEST, INLINE
from qcowfs.inside.record import ENTRY, INODE, Extent
from tests.support import fakereader
from tests.support.workers import children, eventually, is_alive, launcher_pid, pid_of

SIZE = 8 << 20
KIND = "fake"
BAD = 5 << 20  # a read of this place fails


def volume(offset: int, length: int) -> bytes:
    if offset <= BAD < offset + length:
        raise ReadFault("disk", 0, BAD, "lost", errno.EREMOTEIO)
    words = range(offset // 8, -(-(offset + length) // 8))
    return struct.pack(f"<{len(words)}Q", *words)[offset % 8 :][:length]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launcher]:
    monkeypatch.setitem(readers.READERS, KIND, (fakereader.__name__, "", "nothing"))
    found = Launcher()
    yield found
    found.close()


@pytest.fixture
def tree(launcher: Launcher) -> Iterator[Tree]:
    found = Tree(launcher, "disk/p1", KIND, SIZE, volume, True)
    yield found
    found.close()


def test_what_the_reader_answers_arrives(tree: Tree) -> None:
    assert fakereader.ROOT == tree.root
    assert "none" == tree.facts()["recovery"]
    assert fakereader.inode(7) == tree.stat(7)
    assert b"/etc/\xff" == tree.readlink(7)
    assert {b"user.a": b"", b"security.b": b"\0" * 30000} == tree.xattrs(7)
    assert ([Extent(0, 10, 20), Extent(10, 3, INLINE)], 100, b"abc") == tree.extents(7, 0, 9)
    assert tree.extents(fakereader.ROOT, 0, 9) is None


def test_all_entries_of_a_directory_arrive(tree: Tree) -> None:
    names, cookie = [], 0
    while body := tree.entries(2, cookie, 100_000):
        place = 0
        while place < len(body):
            cookie, name_length, count, length = ENTRY.unpack_from(body, place)
            start = place + ENTRY.size + INODE.size + 24 * count
            names.append(body[start : start + name_length])
            place += length

    assert [b"file-%06d" % number for number in range(fakereader.MANY)] == names


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (65535, 2), (3, 1 << 20), (SIZE - 5, 5), (1000, 300_000)])
def test_bytes_of_the_volume_arrive(tree: Tree, offset: int, length: int) -> None:
    assert volume(offset, length) == tree.read(2, offset, length)


def test_a_failed_read_of_the_volume_is_an_answer(tree: Tree) -> None:
    with pytest.raises(TreeFault) as caught:
        tree.read(2, BAD, 8)

    assert errno.EREMOTEIO == caught.value.errno
    assert volume(BAD - 70000, 10) == tree.read(2, BAD - 70000, 10)


def test_what_lies_beside_a_place_that_cannot_be_read_can_be(tree: Tree) -> None:
    """Reads are joined to blocks, and may not fail for a byte that nobody has asked for."""
    for place in (BAD - 8, BAD + 8, BAD - 65536):
        assert volume(place, 8) == tree.read(2, place, 8)
    with pytest.raises(TreeFault):
        tree.read(2, BAD - 8, 24)


def test_a_volume_that_could_not_be_read_once_is_tried_again(launcher: Launcher) -> None:
    failing = [True, True]

    def now_and_then(offset: int, length: int) -> bytes:
        if failing:
            failing.pop()
            raise ReadFault("disk", 0, offset, "lost", errno.EREMOTEIO)
        return bytes(length)

    tree = Tree(launcher, "disk", KIND, 14, now_and_then, True)
    with pytest.raises(TreeFault, match="it cannot be read") as caught:
        tree.stat(7)

    assert errno.EREMOTEIO == caught.value.errno
    assert fakereader.inode(7) == tree.stat(7)


def test_an_error_is_told_with_its_text_and_nothing_raw(tree: Tree) -> None:
    with pytest.raises(TreeFault, match=r"disk/p1: no such\\x0aname") as caught:
        tree.lookup(2, b"absent")

    assert errno.ENOENT == caught.value.errno


@pytest.mark.parametrize(("name", "number"), [(b"memory", errno.ENOMEM), (b"bug", errno.EIO)])
def test_a_slip_of_the_reader_ends_one_request(tree: Tree, name: bytes, number: int) -> None:
    with pytest.raises(TreeFault) as caught:
        tree.lookup(2, name)

    assert number == caught.value.errno
    assert fakereader.inode(7) == tree.stat(7)


@pytest.mark.parametrize(
    "ask",
    [
        lambda tree: tree.stat(fakereader.NONSENSE),
        lambda tree: tree.entries(fakereader.NONSENSE, 0, 1000),
        lambda tree: tree.readlink(fakereader.NONSENSE),
        lambda tree: tree.xattrs(fakereader.NONSENSE),
        lambda tree: tree.extents(fakereader.NONSENSE, 0, 9),
        lambda tree: tree.unproven(fakereader.NONSENSE),
    ],
    ids=["stat", "entries", "readlink", "xattrs", "extents", "unproven"],
)
def test_nonsense_of_a_damaged_volume_ends_one_request(tree: Tree, ask: Callable[[Tree], object]) -> None:
    tree.stat(7)
    worker = pid_of(tree)
    with pytest.raises(TreeFault) as caught:
        ask(tree)

    assert errno.EIO == caught.value.errno
    assert "crashed" not in str(caught.value)
    assert fakereader.inode(7) == tree.stat(7)
    assert worker == pid_of(tree)


def test_every_worker_is_told_what_is_suspect(tree: Tree) -> None:
    layout = tree.layout()
    untold = tree.unproven(7)
    tree.suspect(bytes(32))
    told = tree.unproven(7)
    tree.retire()

    assert (b"d" * DIGEST, [(4096, 8192), (8192, SIZE)]) == layout
    assert untold is None
    assert told is not None
    assert (False, b"m" * DIGEST) == told[1:]
    assert fakereader.inode(42) in told.entries
    assert told == tree.unproven(7)


def test_a_volume_that_cannot_be_read_is_opened_once(launcher: Launcher) -> None:
    tree = Tree(launcher, "disk", KIND, 13, volume, True)
    for _ in range(2):
        with pytest.raises(TreeFault, match=r"thirteen\\x1b bytes") as caught:
            tree.stat(2)
        assert errno.ENOTSUP == caught.value.errno


def test_a_reader_that_is_not_installed_says_what_to_do(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(readers.READERS, "absent", ("qcowfs.inside.nothere", "", "install it"))
    launcher.close()
    after = Launcher()

    assert "install it" == readers.available("absent")
    assert "" == readers.available(KIND)
    assert readers.available("zfs")
    with pytest.raises(TreeFault, match="install it"):
        Tree(after, "disk", "absent", SIZE, volume, True).stat(2)
    after.close()


@pytest.mark.parametrize("name", [b"open", b"create", b"unlink", b"stat", b"dup", b"setuid", b"pipe"])
def test_what_a_library_may_try_is_refused(tree: Tree, name: bytes) -> None:
    assert tree.lookup(2, name) in (errno.EPERM, errno.EACCES)
    assert not Path("/tmp/qcowfs-sandbox-test").exists()


@pytest.mark.expect_warnings
@pytest.mark.parametrize("name", [b"exec", b"fork", b"socket", b"kill", b"unshare"])
def test_what_only_an_attacker_tries_kills(tree: Tree, name: bytes) -> None:
    with pytest.raises(TreeFault, match="its reader crashed: SIGSYS"):
        tree.lookup(2, name)


@pytest.mark.expect_warnings
def test_a_crash_is_told_and_another_worker_starts_but_not_for_ever(
    tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(limits.INSIDE_RESTARTS + 1):
        assert fakereader.inode(7) == tree.stat(7)
        with pytest.raises(TreeFault, match="its reader crashed: SIGSEGV") as caught:
            tree.lookup(2, b"segv")
        assert errno.EIO == caught.value.errno

    assert limits.INSIDE_RESTARTS + 1 == len(caplog.records)
    with pytest.raises(TreeFault, match="again and again"):
        tree.stat(7)


@pytest.mark.expect_warnings
def test_a_worker_that_spins_ends_by_its_own_timer(monkeypatch: pytest.MonkeyPatch, launcher: Launcher) -> None:
    monkeypatch.setattr(limits, "INSIDE_REQUEST_SECONDS", 0.2)
    launcher.close()
    after = Launcher()
    tree = Tree(after, "disk", KIND, SIZE, volume, True)

    with pytest.raises(TreeFault, match="it took longer than"):
        tree.lookup(2, b"spin")
    after.close()


def test_the_time_that_a_disk_takes_is_not_the_workers(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """One read that takes longer than a worker may, and many that do so together."""
    monkeypatch.setattr(limits, "INSIDE_ANSWER_SECONDS", 1)

    def far_away(offset: int, length: int) -> bytes:
        time.sleep(1.2 if offset == 0 else 0.15)
        return volume(offset, length)

    tree = Tree(launcher, "disk", KIND, SIZE, far_away, True)

    assert volume(0, 100) == tree.read(2, 0, 100)
    for place in range(1 << 20, 3 << 20, 1 << 18):
        tree.read(2, place, 100)
    assert volume(0, 1 << 20) == tree.read(2, 0, 1 << 20)


@pytest.mark.expect_warnings
def test_a_disk_may_not_take_for_ever(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INSIDE_TOTAL_SECONDS", 0.3)

    def far_away(offset: int, length: int) -> bytes:
        time.sleep(0.4)
        return volume(offset, length)

    with pytest.raises(TreeFault, match=r"one request took more than 0\.3 s"):
        Tree(launcher, "disk", KIND, SIZE, far_away, True).read(2, 0, 100)


def test_many_threads_ask_one_tree(tree: Tree) -> None:
    def ask(number: int) -> bool:
        place = number * 7919 % (BAD - 100)
        return volume(place, 64) == tree.read(2, place, 64) and fakereader.inode(number) == tree.stat(number)

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(ask, range(1, 400)))


def test_an_exchange_that_this_side_broke_off_is_not_gone_on_with(launcher: Launcher) -> None:
    def interrupted(offset: int, length: int) -> bytes:
        raise KeyboardInterrupt

    tree = Tree(launcher, "disk", KIND, SIZE, interrupted, True)
    with pytest.raises(KeyboardInterrupt):
        tree.read(2, 0, 10)

    assert set() == children(launcher)
    assert fakereader.inode(7) == tree.stat(7)


def test_nothing_is_left_after_close(launcher: Launcher, tree: Tree) -> None:
    tree.stat(2)
    pids = [launcher_pid(launcher), *children(launcher)]
    launcher.close()

    assert 2 == len(pids)
    assert [] == [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    with pytest.raises(TreeFault, match="cannot be started"):
        tree.stat(2)


@pytest.mark.expect_warnings
def test_a_launcher_that_was_killed_is_eio(launcher: Launcher, tree: Tree) -> None:
    tree.stat(2)
    os.kill(launcher_pid(launcher), signal.SIGKILL)
    deadline = time.monotonic() + 20
    with pytest.raises(TreeFault) as caught:
        while time.monotonic() < deadline:  # the worker ends with the launcher, as soon as it has a processor
            tree.stat(2)
    with pytest.raises(TreeFault) as again:
        tree.stat(2)
    assert [errno.EIO, errno.EIO] == [caught.value.errno, again.value.errno]


def test_the_longest_idle_worker_gives_way(launcher: Launcher) -> None:
    trees = [Tree(launcher, f"p{n}", KIND, SIZE, volume, True) for n in range(limits.INSIDE_WORKERS + 3)]
    for tree in trees:
        tree.stat(2)

    assert limits.INSIDE_WORKERS == len(children(launcher))
    assert fakereader.inode(7) == trees[0].stat(7)
    launcher.places.idle(0)
    assert set() == children(launcher)
    assert fakereader.inode(7) == trees[0].stat(7)


def test_a_worker_has_no_rights_and_no_descriptors(launcher: Launcher, tree: Tree) -> None:
    tree.stat(2)
    (pid,) = children(launcher)
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())

    assert "1" == status["NoNewPrivs"]
    assert "2" == status["Seccomp"]
    assert 0 == int(status["CapPrm"], 16) == int(status["CapEff"], 16)
    if os.geteuid() == 0:
        assert ["65534"] * 4 == status["Uid"].split()
        assert "" == status["Groups"].strip()
        targets = {name: os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
        assert {"0", "1", "2", "3"} == set(targets)
        assert {"/dev/null"} == {targets[name] for name in "012"}
    assert "seccomp" in tree.facts()["sandbox"]


def test_nothing_is_left_when_the_mount_process_is_killed() -> None:
    code = f"""
import sys, time
from qcowfs.inside import readers
readers.READERS["fake"] = ("{fakereader.__name__}", "", "")
from qcowfs.inside.launcher import Launcher
from qcowfs.inside.client import Tree
launcher = Launcher()
Tree(launcher, "x", "fake", 4096, lambda o, n: bytes(n), True).stat(2)
print(launcher._pid, *open(f"/proc/{{launcher._pid}}/task/{{launcher._pid}}/children").read().split(), flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(word) for word in process.stdout.readline().split()]
        process.send_signal(signal.SIGKILL)
    assert 2 == len(pids)

    assert eventually(lambda: not any(is_alive(pid) for pid in pids))


def test_the_launcher_imports_nothing_heavy() -> None:
    code = (
        "import sys; import qcowfs.inside.client, qcowfs.inside.worker;"
        "print(sorted({'trio', 'pyfuse3', 'ctypes', 'multiprocessing'} & sys.modules.keys()))"
    )

    assert "[]\n" == subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_sequential_small_reads_cost_few_questions() -> None:
    asked = []

    def ask(offset: int, length: int) -> bytes:
        asked.append((offset, length))
        return bytes(length)

    blocks = Blocks(8 << 20, ask)
    for offset in range(0, 6 << 20, 4096):
        assert 4096 == len(blocks.read(offset, 4096))

    assert len(asked) <= 100


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, SIZE + 1), (SIZE, 1), (1 << 70, 1), (0, -1)])
def test_a_read_past_the_volume_is_eio(offset: int, length: int) -> None:
    with pytest.raises(OSError, match="not within"):
        Blocks(SIZE, volume).read(offset, length)

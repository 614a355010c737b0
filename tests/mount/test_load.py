"""Every way to end, while several processes read and seek without a pause: no hang, no lost answer, nothing left."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.mount.images import MIB, with_many_snapshots
from tests.support import load, need
from tests.support.mounts import (
    PATIENCE,
    RUNNER,
    Mounted,
    Person,
    call,
    in_foreground,
    interpreter,
    is_running,
    mounted,
    qemu,
    shell,
    wait_until,
)
from tests.support.qemu import qemu_io

CONNECTIONS = Path("/sys/fs/fuse/connections")
READERS = 3
PLANES = {"data plane": (), "no data plane": ("--no-data-plane",)}
CUT_OFF = {"ENOTCONN", "ECONNABORTED"}
OF_RUNNER = 2 if RUNNER else 0  # threads: a sanitizer's own, and one more of trio's, as all is slower there


@dataclass(frozen=True)
class Busy:
    """A chain with plain and compressed clusters, and what is in it."""

    image: Path
    raw: Path


@pytest.fixture(scope="session")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Busy:
    """Return an image that is read-only to all tests, and to everybody."""
    need("qemu-img", "qemu-io")
    folder = tmp_path_factory.mktemp("busy")
    folder.chmod(0o755)
    base, top, raw = folder / "base.qcow2", folder / "top.qcow2", folder / "top.raw"
    words = random.Random(1).choices([b"alpha ", b"beta ", b"gamma ", b"delta "], k=MIB)
    raw.write_bytes(b"".join(words)[: 5 * MIB])
    qemu("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, base)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top, 8 * MIB)
    qemu_io(top, "write -P 1 1M 300k", "write -P 2 6M 64k", "write -z 3M 128k")
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", top, raw)
    return Busy(top, raw)


@pytest.fixture(params=PLANES)
def options(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the mount's options: each rule here holds with the data plane and without."""
    return (*PLANES[request.param], "--cache-size", "1M")


class Readers:
    """Processes that read."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self.processes = processes

    def end(self) -> list[int]:
        """Let all of them end, and return their exit codes."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        return [process.wait(PATIENCE) for process in self.processes]

    def last_words(self) -> set[str]:
        """Wait until all of them ended by themselves, and return what they were told."""
        for process in self.processes:
            process.wait(PATIENCE)
        return {process.stdout.read().strip() for process in self.processes if process.stdout is not None}

    def all_read(self) -> bool:
        return all(process.poll() is None for process in self.processes)


@contextmanager
def reading(mount: Mounted, busy: Busy, *options: str, count: int = READERS) -> Iterator[Readers]:
    """Let processes read `mount` until they are told to end."""
    script = mount.path.with_name("load.py")
    shutil.copyfile(load.__file__, script)
    processes = []
    try:
        for seed in range(count):
            words = [
                interpreter(mount.person),
                str(script),
                str(mount.path),
                str(seed),
                "--like",
                str(busy.raw),
                *options,
            ]
            processes.append(started(words, mount.person))
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "reading\n"
        yield Readers(processes)
    finally:
        for process in processes:
            process.kill()
            process.__exit__(None, None, None)


def started(words: list[str], person: Person) -> subprocess.Popen[str]:
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **person.popen_arguments()
    )


def unmounted_lazily(mount: Mounted) -> None:
    shell('umount -l "$1"' if os.geteuid() == 0 else 'fusermount3 -u -z "$1"', mount.path)


class TestUnmounting:
    def test_a_lazy_unmount_lets_readers_read_on(
        self, busy: Busy, target: Path, options: tuple[str, ...], person: Person
    ) -> None:
        with mounted(busy.image, target, *options, person=person) as mount:
            with reading(mount, busy) as readers:
                unmounted_lazily(mount)
                assert not mount.is_mounted() and mount.is_alive()
                assert [0] * READERS == readers.end()
            mount.wait_gone()

    def test_a_busy_mount_is_not_unmounted_and_readers_hear_nothing(
        self, busy: Busy, target: Path, options: tuple[str, ...], person: Person
    ) -> None:
        with mounted(busy.image, target, *options, person=person) as mount, reading(mount, busy) as readers:
            for words in (["fusermount3", "-u", str(target)], ["umount", str(target)]):
                tried = subprocess.run(words, capture_output=True, **person.popen_arguments())  # type: ignore[call-overload]
                assert tried.returncode != 0
            assert mount.is_mounted() and readers.all_read()
            assert [0] * READERS == readers.end()

    def test_a_signal_lets_readers_read_on(
        self, busy: Busy, target: Path, options: tuple[str, ...], person: Person
    ) -> None:
        with mounted(busy.image, target, *options, person=person) as mount:
            with reading(mount, busy) as readers:
                mount.signal(signal.SIGTERM)
                wait_until(lambda: not mount.is_mounted(), "it is still mounted")
                assert readers.all_read()
                assert [0] * READERS == readers.end()
            mount.wait_gone()

    def test_a_second_signal_cuts_readers_off(
        self, busy: Busy, target: Path, options: tuple[str, ...], person: Person
    ) -> None:
        with mounted(busy.image, target, *options, person=person) as mount, reading(mount, busy) as readers:
            mount.signal(signal.SIGTERM)
            wait_until(lambda: not mount.is_mounted(), "it is still mounted")
            mount.signal(signal.SIGTERM)
            mount.wait_gone()
            assert readers.last_words() <= CUT_OFF

    def test_the_exit_code_of_a_forced_end_says_so(self, busy: Busy, target: Path, options: tuple[str, ...]) -> None:
        with in_foreground(busy.image, target, *options) as mount, reading(mount, busy) as readers:
            mount.signal(signal.SIGTERM)
            wait_until(lambda: not mount.is_mounted(), "it is still mounted")
            mount.signal(signal.SIGTERM)
            mount.wait_gone()
            assert readers.last_words() <= CUT_OFF

        assert mount.process is not None
        assert mount.process.returncode == 128 + signal.SIGTERM


@pytest.fixture(scope="module")  # mounted again and again, it sometimes lacked the newest connection
def connections() -> Iterator[Path]:
    """Return where the kernel lets its FUSE mounts be aborted."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    made = not os.path.ismount(CONNECTIONS)
    if made:
        shell('mount -t fusectl fusectl "$1"', CONNECTIONS)
    yield CONNECTIONS
    if made:
        shell('umount "$1"', CONNECTIONS)


class TestDeath:
    def test_an_abort_cuts_readers_off_and_leaves_a_dead_mount_that_umount_heals(
        self, busy: Busy, target: Path, options: tuple[str, ...], person: Person, connections: Path
    ) -> None:
        with mounted(busy.image, target, *options, person=person) as mount, reading(mount, busy) as readers:
            (connections / device_of(target) / "abort").write_text("1")
            assert readers.last_words() <= CUT_OFF
            wait_until(lambda: not mount.is_alive(), "the daemon still runs")
            assert mount.is_mounted()
            assert call("umount", target, person=person).returncode == 0

    def test_an_abort_ends_a_foreground_mount_with_0(
        self, busy: Busy, target: Path, options: tuple[str, ...], connections: Path
    ) -> None:
        with in_foreground(busy.image, target, *options) as mount, reading(mount, busy) as readers:
            (connections / device_of(target) / "abort").write_text("1")
            assert readers.last_words() <= CUT_OFF
            wait_until(lambda: not mount.is_alive(), "it still runs")
            assert call("umount", target).returncode == 0

        assert mount.process is not None
        assert mount.process.returncode == 0

    def test_a_killed_daemon_cuts_readers_off(
        self, busy: Busy, target: Path, options: tuple[str, ...], person: Person
    ) -> None:
        with mounted(busy.image, target, *options, person=person) as mount, reading(mount, busy) as readers:
            mount.signal(signal.SIGKILL)
            wait_until(lambda: not is_running(mount.pid), "SIGKILL did not kill")
            assert readers.last_words() <= CUT_OFF
            assert call("umount", target, person=person).returncode == 0

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
    def test_readers_may_die_at_any_time(self, busy: Busy, target: Path, options: tuple[str, ...], number: int) -> None:
        with mounted(busy.image, target, *options) as mount:
            with reading(mount, busy, count=1) as survivor:
                for _ in range(3):
                    with reading(mount, busy) as readers:
                        for process in readers.processes:
                            process.send_signal(number)
                            process.wait(PATIENCE)
                assert [0] == survivor.end()
            assert held_by(mount) == []


def device_of(target: Path) -> str:
    """Return the name of a mount's directory below `connections`: its device number."""
    line = next(line for line in Path("/proc/self/mountinfo").read_text().splitlines() if f" {target} " in line)
    return line.split()[2].removeprefix("0:")


def held_by(mount: Mounted) -> list[str]:
    """Return what of the daemon's threads and descriptors is too much for one that has nothing to do."""
    cores = len(os.sched_getaffinity(0))
    # main, workers, relay, helpers; two of trio's
    most = 1 + min(2 * cores, 16) + 1 + min(cores - 1, 3) + 2 + OF_RUNNER
    threads = len(os.listdir(f"/proc/{mount.pid}/task"))
    return [f"{threads} threads"] if threads > most else []


class TestFloods:
    def test_nothing_is_left_of_many_opened_and_closed_files(
        self, busy: Busy, target: Path, options: tuple[str, ...]
    ) -> None:
        with mounted(busy.image, target, *options) as mount:
            before = os.listdir(f"/proc/{mount.pid}/fd")
            for _ in range(2):
                with reading(mount, busy, "--reopen") as readers:
                    wait_until(lambda: len(os.listdir(f"/proc/{mount.pid}/fd")) == len(before), "descriptors leak")
                    opened_often(mount / "current.raw")
                    assert [0] * READERS == readers.end()

            assert held_by(mount) == []
            assert len(before) == len(os.listdir(f"/proc/{mount.pid}/fd"))

    def test_names_are_forgotten_by_the_thousand_while_others_read(
        self, target: Path, tmp_path: Path, options: tuple[str, ...]
    ) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        image, raw = tmp_path / "many.qcow2", tmp_path / "many.raw"
        with_many_snapshots(image, 1000)
        qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
        with mounted(image, target, *options) as mount, reading(mount, Busy(image, raw)) as readers:
            for _ in range(2):
                listed = shell('ls -l "$1" | wc -l', target)
                Path("/proc/sys/vm/drop_caches").write_text("2")  # names and inodes: a FORGET for each
            assert [0] * READERS == readers.end()
            assert int(listed) > 1000
            assert held_by(mount) == []


def opened_often(path: Path) -> None:
    for _ in range(500):
        os.close(os.open(path, os.O_RDONLY))


def test_a_machine_with_one_core_is_served_too(busy: Busy, target: Path) -> None:
    """Two threads are the most there, and none decompresses ahead."""
    core = str(min(os.sched_getaffinity(0)))
    for _ in range(3):
        with one_core(core), mounted(busy.image, target) as mount, reading(mount, busy) as readers:
            threads = len(os.listdir(f"/proc/{mount.pid}/task"))
            assert [0] * READERS == readers.end()
            assert threads <= 6 + OF_RUNNER


@contextmanager
def one_core(core: str) -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {int(core)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)

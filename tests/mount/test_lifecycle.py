"""From mount to unmount: every way to begin and to end, as root and as an ordinary user, and nothing left of it."""

from __future__ import annotations

import errno
import mmap
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from qcowfs import mountpoint
from tests.mount.images import CONTENT
from tests.support import need
from tests.support.mounts import (
    PATIENCE,
    Mounted,
    Person,
    call,
    in_foreground,
    is_running,
    launcher,
    me,
    mounted,
    one_line,
    shell,
    wait_until,
)


@contextmanager
def held(path: Path, person: Person, how: str = "exec sleep 60 <") -> Iterator[subprocess.Popen[bytes]]:
    """Keep `path` busy in another process."""
    words = ["sh", "-c", f'{how} "$1"', "sh", str(path)]
    with subprocess.Popen(words, **person.popen_arguments()) as holder:  # type: ignore[call-overload]
        wait_until(lambda: Path(f"/proc/{holder.pid}/comm").read_text() == "sleep\n", "the holder did not start")
        try:
            yield holder
        finally:
            holder.kill()


class TestBeginning:
    def test_the_mount_is_usable_when_the_command_returns(self, image: Path, target: Path, person: Person) -> None:
        with mounted(image, target, person=person) as mount:
            found = shell('ls "$1" && head -c 3 "$1/current.raw" | od -An -tx1', mount.path, person=person)

        assert found == "current.raw\n 00 01 02\n"

    def test_nothing_is_printed_where_nobody_looks(self, image: Path, target: Path, person: Person) -> None:
        done = call("mount", image, target, person=person)
        ended = call("umount", target, person=person)

        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")

    def test_a_terminal_is_told_how_to_unmount(self, image: Path, target: Path) -> None:
        terminal, side = pty.openpty()
        with closing(os.fdopen(terminal, "rb", buffering=0)) as reader:
            done = subprocess.run([*launcher(), "mount", image, target], stdin=side, stdout=side, timeout=PATIENCE)
            os.close(side)
            said = reader.read(4096).decode()
        call("umount", target)

        assert done.returncode == 0
        assert said == f"mounted {image} on {target} (1 point); unmount with: qcowfs umount {target}\r\n"

    def test_findmnt_shows_the_image_and_the_type(self, image: Path, target: Path, person: Person) -> None:
        need("findmnt")
        with mounted(image, target, person=person):
            found = shell('findmnt -nro SOURCE,FSTYPE,OPTIONS "$1"', target)

        source, kind, options = found.split()
        assert (source, kind) == (str(image), "fuse.qcowfs")
        assert {"ro", "nosuid", "nodev"} <= set(options.split(","))

    @pytest.mark.parametrize("name", ["a,b.raw", "a\\b.raw", "a b\n.raw", "caf\N{LATIN SMALL LETTER E WITH ACUTE}.raw"])
    def test_the_source_is_right_for_awkward_names(self, image: Path, target: Path, person: Person, name: str) -> None:
        image = image.rename(image.with_name(name))

        with mounted(image, target, person=person):
            found = mountpoint.find(str(target))

        assert found is not None
        assert found.source == str(image)

    def test_a_relative_image_and_mount_point_are_right(self, image: Path, target: Path) -> None:
        done = call("mount", image.name, target.name, cwd=image.parent)
        found = mountpoint.find(str(target))
        ended = call("umount", target.name, cwd=image.parent)

        assert (done.returncode, ended.returncode) == (0, 0)
        assert found is not None
        assert found.source == str(image)

    def test_others_cannot_enter_and_with_allow_other_they_can(
        self, image: Path, target: Path, ordinary: Person
    ) -> None:
        if ordinary.is_me:
            pytest.skip("needs root")

        for options, expected in (((), False), (("--allow-other",), True), (("-o", "allow_other"), True)):
            with mounted(image, target, *options) as mount:
                command = ["test", "-r", str(mount / "current.raw")]
                tried = subprocess.run(command, **ordinary.popen_arguments())  # type: ignore[call-overload]
                assert (tried.returncode == 0) is expected, options

    def test_allow_root_lets_root_in_and_nobody_else(self, image: Path, target: Path) -> None:
        with mounted(image, target, "-o", "allow_root") as mount:
            assert (mount / "current.raw").stat().st_size == len(CONTENT)

    def test_a_nonempty_directory_can_be_mounted_over_on_request(self, image: Path, target: Path) -> None:
        (target / "hidden").touch()

        with mounted(image, target, "-o", "nonempty") as mount:
            assert os.listdir(mount.path) == ["current.raw"]

        (target / "hidden").unlink()

    def test_a_bare_image_and_mount_point_mount_too(self, image: Path, target: Path) -> None:
        done = call(image, target, "-o", "rw,dev,suid")
        ended = call("umount", target)

        assert (done.returncode, done.stderr, ended.returncode) == (0, "", 0)

    def test_an_explicit_rw_gets_one_warning(self, image: Path, target: Path) -> None:
        done = call("mount", "-o", "rw", image, target)
        call("umount", target)

        assert done.returncode == 0
        assert done.stderr == "qcowfs: warning: the mount is read-only, whatever -o rw says\n"


class TestTheDaemon:
    def test_holds_nothing_of_the_shell_that_started_it(self, image: Path, target: Path) -> None:
        reader, writer = os.pipe()
        try:
            done = subprocess.run([*launcher(), "mount", image, target], pass_fds=[writer], timeout=PATIENCE)
            os.close(writer)
            pid = int(os.getxattr(target, "user.qcowfs.pid"))
            where, session = os.readlink(f"/proc/{pid}/cwd"), os.getsid(pid)
            standard = {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)}
            the_pipe_is_closed = os.read(reader, 1) == b""
        finally:
            os.close(reader)
            call("umount", target)

        assert done.returncode == 0
        assert (where, session, standard) == ("/", pid, {"/dev/null"})
        assert the_pipe_is_closed

    def test_serves_when_it_was_started_without_standard_descriptors(self, image: Path, target: Path) -> None:
        shell('exec "$@" <&- >&- 2>&-', *launcher(), "mount", image, target)

        assert (target / "current.raw").read_bytes() == CONTENT
        assert call("umount", target).returncode == 0

    def test_outlives_a_hangup(self, image: Path, target: Path) -> None:
        with mounted(image, target) as mount:
            mount.signal(signal.SIGHUP)

            assert (mount / "current.raw").read_bytes() == CONTENT
            assert mount.is_alive()

    def test_logs_a_fault_once_and_goes_on(self, target: Path, tmp_path: Path) -> None:
        need("qemu-img", "qemu-io")
        bad = tmp_path / "bad.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", bad, "1M"], check=True)
        command = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", bad]
        subprocess.run(command, check=True, capture_output=True)
        with bad.open("r+b") as file:  # the first entry of the first L2 table loses its alignment
            file.seek(0x40000)
            entry = bytearray(file.read(8))
            entry[6] ^= 0x02
            file.seek(0x40000)
            file.write(entry)

        with mounted(bad, target) as mount:
            for _ in range(2):
                with (mount / "current.raw").open("rb", buffering=0) as disk, pytest.raises(OSError) as failure:
                    disk.read(4096)
            with (mount / "current.raw").open("rb", buffering=0) as disk:
                disk.seek(65536)
                unharmed = disk.read(65536)

        assert failure.value.errno == errno.EIO
        assert unharmed == b"\x07" * 65536
        assert mount.log.read_text().count("current.raw: ") == 1


class TestEnding:
    @pytest.mark.parametrize("command", ["fusermount3 -u", "umount"])
    def test_other_ways_to_unmount_end_the_daemon_too(
        self, image: Path, target: Path, person: Person, command: str
    ) -> None:
        with mounted(image, target, person=person) as mount:
            shell(f'{command} "$1"', target, person=person)
            mount.wait_gone()

    def test_umount_returns_when_the_daemon_is_gone(self, image: Path, target: Path, person: Person) -> None:
        with mounted(image, target, person=person) as mount:
            done = call("umount", target, person=person)
            alive = is_running(mount.pid)

        assert (done.returncode, alive) == (0, False)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_unmounts(self, image: Path, target: Path, person: Person, number: int) -> None:
        with mounted(image, target, person=person) as mount:
            mount.signal(number)
            mount.wait_gone()

    def test_a_signal_lets_open_files_be_read_to_their_end(self, image: Path, target: Path) -> None:
        with mounted(image, target) as mount:
            with (mount / "current.raw").open("rb", buffering=0) as file:
                mount.signal(signal.SIGTERM)
                wait_until(lambda: not mount.is_mounted(), "it is still mounted")
                content = file.read()
            mount.wait_gone()

        assert content == CONTENT

    def test_a_second_signal_forces(self, image: Path, target: Path, person: Person) -> None:
        with mounted(image, target, person=person) as mount, held(mount / "current.raw", person):
            mount.signal(signal.SIGTERM)
            wait_until(lambda: not mount.is_mounted(), "it is still mounted")
            assert mount.is_alive()
            mount.signal(signal.SIGTERM)
            mount.wait_gone()

    def test_a_signal_leaves_what_was_mounted_over_it_alone(self, image: Path, target: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        with mounted(image, target) as mount:
            shell('mount -t tmpfs upper "$1"', target)
            mount.signal(signal.SIGTERM)
            wait_until(lambda: not mount.is_alive(), "the daemon still runs")
            upper = mountpoint.find(str(target))
            shell('umount "$1"', target)
            below = call("umount", target)

        assert upper is not None
        assert (upper.type, below.returncode) == ("tmpfs", 0)

    def test_a_signal_unmounts_what_was_moved_meanwhile(self, image: Path, tmp_path: Path, target: Path) -> None:
        folder = tmp_path / "folder"
        (folder / "mnt").mkdir(parents=True)
        with mounted(image, folder / "mnt") as mount:
            moved = folder.rename(tmp_path / "moved")
            assert mountpoint.find(str(moved / "mnt")) is not None
            mount.signal(signal.SIGTERM)
            wait_until(lambda: not mount.is_alive(), "the daemon still runs")

        assert mountpoint.find(str(moved / "mnt")) is None


class TestUmount:
    @pytest.mark.parametrize("how", ["exec sleep 60 <", "cd $(dirname $1); exec sleep 60 #"])
    def test_a_busy_mount_stays_and_its_holders_are_named(
        self, image: Path, target: Path, person: Person, how: str
    ) -> None:
        with mounted(image, target, person=person) as mount, held(mount / "current.raw", person, how) as holder:
            done = call("umount", target, person=person)

            assert done.returncode == 14
            assert f"busy: in use by {holder.pid} (sleep)" in one_line(done)
            assert "hint: -l " in done.stderr
            assert mount.is_mounted() and mount.is_alive()
            holder.kill()
            holder.wait()

    def test_a_mapped_file_is_busy(self, image: Path, target: Path) -> None:
        with mounted(image, target) as mount:
            with (mount / "current.raw").open("rb") as file:
                view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            busy = call("umount", target)
            view.close()

        assert busy.returncode == 14

    def test_lazily_a_busy_mount_goes_now_and_its_daemon_later(self, image: Path, target: Path, person: Person) -> None:
        with mounted(image, target, person=person) as mount:
            with held(mount / "current.raw", person):
                done = call("umount", "-l", target, person=person)
                assert (done.returncode, mount.is_mounted(), mount.is_alive()) == (0, False, True)
            mount.wait_gone()

    def test_several_are_unmounted_and_the_first_failure_is_told(self, image: Path, target: Path) -> None:
        with mounted(image, target) as mount:
            done = call("umount", target.parent, target)
            mount.wait_gone()

        assert done.returncode == 14
        assert one_line(done) == f"qcowfs: {target.parent}: not mounted"

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("/nope", "No such file or directory"),
            ("/proc", "not a mount of qcowfs (type proc)"),
            ("/usr", "not mounted"),
        ],
    )
    def test_what_is_not_mounted_is_a_clear_error(self, path: str, message: str) -> None:
        done = call("umount", path)

        assert (done.returncode, one_line(done)) == (14, f"qcowfs: {path}: {message}")

    def test_a_bind_mount_that_is_left_is_named_and_not_waited_for(
        self, image: Path, target: Path, tmp_path: Path
    ) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        (other := tmp_path / "other").mkdir()
        with mounted(image, target) as mount:
            shell('mount --bind "$1" "$2"', target, other)
            done = call("umount", target)
            found = (other / "current.raw").read_bytes()
            last = call("umount", other)
            mount.wait_gone()

        assert (done.returncode, last.returncode) == (0, 0)
        assert done.stderr == f"qcowfs: warning: {target}: unmounted, but still mounted on {other}\n"
        assert found == CONTENT

    def test_it_works_from_inside_with_a_dot(self, image: Path, target: Path) -> None:
        with mounted(image, target):
            done = call("umount", ".", cwd=target)

            assert done.returncode == 14
            assert "busy" in one_line(done)

    def test_it_does_not_need_pyfuse3(self, image: Path, target: Path, tmp_path: Path) -> None:
        broken = tmp_path / "broken"
        broken.mkdir()
        (broken / "pyfuse3.py").write_text("raise ImportError('not here')")
        with mounted(image, target) as mount:
            done = call("umount", target, env={"PYTHONPATH": str(broken)})
            mount.wait_gone()

        assert done.returncode == 0


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def watchers(pid: int) -> list[int]:
    """Return the children that are not what starts the readers of trees."""
    return [child for child in children(pid) if Path(f"/proc/{child}/comm").read_text() != "qcowfs-inside\n"]


def killed(mount: Mounted) -> None:
    mount.signal(signal.SIGKILL)
    wait_until(lambda: not is_running(mount.pid), "SIGKILL did not kill")


class TestDeath:
    def test_a_killed_daemon_leaves_a_dead_mount_that_umount_heals(
        self, image: Path, target: Path, person: Person
    ) -> None:
        with mounted(image, target, person=person) as mount:
            killed(mount)
            for command in ("ls", "find", "rmdir"):
                arguments = person.popen_arguments()
                tried = subprocess.run([command, target], capture_output=True, **arguments)  # type: ignore[call-overload]
                assert tried.returncode != 0, "an empty directory would invite rsync --delete"
            again = call("mount", image, target, person=person)
            healed = call("umount", target, person=person)
            empty = os.listdir(target)

        assert again.returncode == 14
        assert one_line(again) == f"qcowfs: {target}: a dead mount: its daemon is gone"
        assert f"hint: 'qcowfs umount {target}'" in again.stderr
        assert (healed.returncode, healed.stderr, empty) == (0, "", [])

    def test_a_fresh_mount_works_after_a_death(self, image: Path, target: Path, person: Person) -> None:
        with mounted(image, target, person=person) as mount:
            killed(mount)
            call("umount", target, person=person)
        with mounted(image, target, person=person):
            found = shell('cksum < "$1/current.raw"', target, person=person)

        assert found == "2572415250 1048576\n"

    def test_with_auto_unmount_a_killed_daemon_leaves_an_empty_directory(
        self, image: Path, target: Path, person: Person
    ) -> None:
        with mounted(image, target, "-o", "auto_unmount", person=person) as mount:
            killed(mount)
            wait_until(lambda: not mount.is_mounted(), "it is still mounted")

        assert os.listdir(target) == []

    def test_with_auto_unmount_an_unmount_leaves_no_helper(self, image: Path, target: Path, person: Person) -> None:
        with mounted(image, target, "-o", "auto_unmount", person=person) as mount:
            helpers, (watcher,) = children(mount.pid), watchers(mount.pid)
            call("umount", target, person=person)
            mount.wait_gone()

        assert watcher in helpers
        assert not any(is_running(helper) for helper in helpers)

    def test_with_auto_unmount_a_new_mount_in_the_same_place_is_left_alone(self, image: Path, target: Path) -> None:
        with mounted(image, target, "-o", "auto_unmount") as mount:
            (watcher,) = watchers(mount.pid)
            os.kill(watcher, signal.SIGSTOP)
            killed(mount)
            call("umount", target)
        with mounted(image, target) as second:
            os.kill(watcher, signal.SIGCONT)
            wait_until(lambda: not is_running(watcher), "the watcher still waits")

            assert second.is_mounted() and second.is_alive()


class TestForeground:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_unmounts_and_the_exit_code_is_0(self, image: Path, target: Path, number: int) -> None:
        with in_foreground(image, target) as mount:
            mount.signal(number)
            mount.wait_gone()

        assert mount.process is not None
        assert mount.process.returncode == 0

    def test_the_end_of_its_terminal_unmounts(self, image: Path, target: Path) -> None:
        terminal, ours = pty.openpty()
        words = [*launcher(), "mount", "-f", str(image), str(target)]
        with subprocess.Popen(words, stdin=ours, stdout=ours, stderr=ours, start_new_session=True) as process:
            try:
                os.close(ours)
                wait_until(lambda: mountpoint.find(str(target)) or process.poll() is not None, "it never mounted")
                os.getxattr(target, "user.qcowfs.pid")  # it answers
                os.close(terminal)
                process.send_signal(signal.SIGHUP)

                assert process.wait(PATIENCE) == 0
                assert mountpoint.find(str(target)) is None
            finally:
                process.kill()

    def test_a_hangup_without_a_terminal_is_no_end(self, image: Path, target: Path) -> None:
        with in_foreground(image, target) as mount:
            mount.signal(signal.SIGHUP)

            assert (mount / "current.raw").read_bytes() == CONTENT
            assert mount.is_alive()

    def test_a_second_signal_forces_and_the_exit_code_says_so(self, image: Path, target: Path) -> None:
        with in_foreground(image, target) as mount, held(mount / "current.raw", me()):
            mount.signal(signal.SIGINT)
            wait_until(lambda: not mount.is_mounted(), "it is still mounted")
            mount.signal(signal.SIGINT)
            mount.wait_gone()

        assert mount.process is not None
        assert mount.process.returncode == 128 + signal.SIGINT

    def test_an_unmount_ends_it_with_0(self, image: Path, target: Path) -> None:
        with in_foreground(image, target) as mount:
            assert call("umount", target).returncode == 0
            mount.wait_gone()

        assert mount.process is not None
        assert mount.process.returncode == 0

    def test_it_waits_for_open_files_and_says_so(self, image: Path, target: Path) -> None:
        with in_foreground(image, target) as mount:
            with held(mount / "current.raw", me()):
                mount.signal(signal.SIGTERM)
                assert mount.process is not None and mount.process.stderr is not None
                said = mount.process.stderr.readline()
            mount.wait_gone()

        assert said == (
            f"qcowfs: warning: {target}: unmounted, but files in it are still open; a second signal closes them\n"
        )

    @pytest.mark.parametrize("kind", ["path", "abstract"])
    def test_a_service_manager_hears_when_it_is_ready_and_when_it_stops(
        self, image: Path, target: Path, tmp_path: Path, kind: str
    ) -> None:
        address = str(tmp_path / "notify") if kind == "path" else f"@qcowfs-test-{os.getpid()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
            manager.bind(address.replace("@", "\0"))
            manager.settimeout(PATIENCE)
            with in_foreground(image, target, env={"NOTIFY_SOCKET": address}) as mount:
                started = manager.recv(4096)
                names = os.listdir(target)
                mount.signal(signal.SIGTERM)
                stopped = manager.recv(4096)
                mount.wait_gone()

        assert started.startswith(b"READY=1\n")
        assert names == ["current.raw"]
        assert stopped == b"STOPPING=1"

    def test_a_service_manager_that_does_not_listen_is_no_obstacle(self, image: Path, target: Path) -> None:
        with in_foreground(image, target, env={"NOTIFY_SOCKET": "/nope"}) as mount:
            assert os.listdir(mount.path) == ["current.raw"]


def test_ctrl_c_while_it_starts_leaves_nothing(image: Path, target: Path, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    # A pyfuse3 whose init() takes its time, so that the signal comes in the middle.
    (slow / "sitecustomize.py").write_text(
        "import signal, time, pyfuse3\ninit = pyfuse3.init\n"
        # A run in the background of a shell ignores the signal, and so does what it starts; Ctrl-C comes to others.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"def late(*args):\n    open({str(tmp_path / 'begun')!r}, 'w').close(); time.sleep(1); init(*args)\n"
        "pyfuse3.init = late\n"
    )
    env = {**os.environ, "PYTHONPATH": str(slow)}
    with subprocess.Popen([*launcher(), "mount", image, target], env=env, stderr=subprocess.PIPE) as process:
        wait_until((tmp_path / "begun").exists, "it never began")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=PATIENCE)

    assert process.returncode == 130
    assert b"Traceback" not in said
    assert mountpoint.find(str(target)) is None
    assert str(target) not in shell("ps -eo args= | grep -v grep || true").replace(sys.executable, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_who_is_killed_while_the_image_is_opened_leaves_nothing(
    image: Path, target: Path, tmp_path: Path, number: int
) -> None:
    """The daemon is another process by then, and in a session of its own."""
    code = (
        "import time, qcowfs.chain as c\nbefore = c.open_chain\n"
        f"def late(*args, **words):\n    open({str(tmp_path / 'begun')!r}, 'w').close(); time.sleep(2)\n"
        f"    open({str(tmp_path / 'went_on')!r}, 'w').close(); return before(*args, **words)\n"
        "c.open_chain = late\n"
    )
    env = {**os.environ, "QCOWFS_TEST_BEFORE": code}
    with subprocess.Popen([*launcher(), "mount", image, target], env=env, stderr=subprocess.PIPE) as process:
        wait_until((tmp_path / "begun").exists, "it never began")
        process.send_signal(number)
        _, said = process.communicate(timeout=PATIENCE)  # until the last of its processes is gone

    assert (process.returncode, said) == (-number, b"")
    assert not (tmp_path / "went_on").exists()

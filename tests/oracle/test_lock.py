"""The lock bytes, with QEMU on the other side: who disturbs whom, who is seen, and what is then frozen.

Own fixtures, and QEMU's own programs as writers and readers. The bytes are in docs/decisions/0003-lock-bytes.md.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from qcowfs import follow
from qcowfs.chain import open_chain
from qcowfs.errors import ReadFault
from qcowfs.gate import Policy
from qcowfs.snapshot import points
from tests.support import need
from tests.support.qemu import qemu
from tests.support.reader import open_point, read_all

# A program of QEMU that waits for ever must not hold up a run.
pytestmark = pytest.mark.timeout(90)

MIB = 1 << 20
PATIENCE = 30  # seconds that a QEMU may take to start, to answer or to end
LOCKED = b"lock"  # QEMU: Failed to get "write" lock


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("qemu-img", "qemu-io", "qemu-storage-daemon", "qemu-system-x86_64")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An overlay with the snapshot `one` full of 1, over a base that holds 9."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", base, "2M")
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 9 0 2M", base)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", top)
    qemu("qemu-img", "snapshot", "-c", "one", top)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 1M", top)
    return top


CHANGES = {
    "snapshot -c": lambda image: ("qemu-img", "snapshot", "-c", "two", image),
    "snapshot -d": lambda image: ("qemu-img", "snapshot", "-d", "one", image),
    "snapshot -a": lambda image: ("qemu-img", "snapshot", "-a", "one", image),
    "resize": lambda image: ("qemu-img", "resize", "-q", "-f", "qcow2", image, "4M"),
    "commit": lambda image: ("qemu-img", "commit", "-q", "-d", image),
    "rebase": lambda image: ("qemu-img", "rebase", "-u", "-b", "", image),
    "bitmap": lambda image: ("qemu-img", "bitmap", "--add", image, "b0"),
    "write": lambda image: ("qemu-io", "-f", "qcow2", "-c", "write -P 3 0 64k", image),
    "write to the base": lambda image: ("qemu-io", "-f", "qcow2", "-c", "write 0 64k", image.with_name("base.qcow2")),
}
LOOKS = {
    "info": lambda image: ("qemu-img", "info", "--backing-chain", image),
    "map": lambda image: ("qemu-img", "map", image),
    "convert": lambda image: ("qemu-img", "convert", "-O", "raw", image, image.with_name("converted.raw")),
    "check": lambda image: ("qemu-img", "check", image),
    "read": lambda image: ("qemu-io", "-r", "-f", "qcow2", "-c", "read -P 2 0 1M", image),
}
Command = Callable[[Path], tuple[str | Path, ...]]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_nobody_changes_an_image_while_it_is_read(image: Path, change: Command) -> None:
    before = image.read_bytes(), image.with_name("base.qcow2").read_bytes()

    with open_chain(str(image), Policy()):
        said = qemu(*change(image), check=False)

        assert said.returncode != 0
        assert LOCKED in said.stderr + said.stdout
    assert before == (image.read_bytes(), image.with_name("base.qcow2").read_bytes())
    qemu(*change(image))  # and afterwards everybody may


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_without_the_lock_everybody_may(image: Path, change: Command) -> None:
    with open_chain(str(image), Policy(), lock=False):
        qemu(*change(image))


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
def test_everybody_may_look_at_an_image_while_it_is_read(image: Path, look: Command) -> None:
    with open_chain(str(image), Policy()):
        qemu(*look(image))


def test_a_chain_that_cannot_be_opened_holds_no_lock(image: Path) -> None:
    """The top is locked by the time that its base turns out to be missing."""
    base = image.with_name("base.qcow2")
    base.rename(image.with_name("elsewhere"))
    with pytest.raises(Exception, match="cannot open backing file"):
        open_chain(str(image), Policy())
    image.with_name("elsewhere").rename(base)

    qemu(*CHANGES["write"](image))


def test_two_chains_of_one_image_at_once(image: Path) -> None:
    with open_chain(str(image), Policy()) as first, open_chain(str(image), Policy()) as second:
        assert [False] * 4 == [layer.written_by_other for chain in (first, second) for layer in chain.layers]
        first.close()

        assert qemu(*CHANGES["write"](image), check=False).returncode != 0, "the second still reads"
    qemu(*CHANGES["write"](image))


def frozen(image: Path, *, lock: bool = True) -> tuple[dict[str, bool], list[bool]]:
    """Return which points stay as they are, and which layers another process writes."""
    with open_chain(str(image), Policy(), lock=lock) as chain:
        names = {
            (point.snapshot_name or point.layer.path.rpartition("/")[2].encode()).decode(): point.frozen
            for point in points(chain)
        }
        return names, [layer.written_by_other for layer in chain.layers]


class Machine:
    """A QEMU that has an image open, spoken to by QMP."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self._socket = self._connected(process, path)
        self._lines = self._socket.makefile("rb")
        json.loads(self._lines.readline())
        self.qmp("qmp_capabilities")

    @staticmethod
    def _connected(process: subprocess.Popen[bytes], path: Path) -> socket.socket:
        deadline = time.monotonic() + PATIENCE
        while True:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(PATIENCE)
            try:
                connection.connect(str(path))
                return connection
            except OSError:
                connection.close()
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline, "QEMU does not answer"
                time.sleep(0.05)

    def qmp(self, command: str, **arguments: Any) -> Any:
        """Run `command`; an error of QEMU is an error here."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._lines.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def hmp(self, command: str) -> str:
        """Run a command of the human monitor; returns what it says, which is nothing if all is well."""
        return str(self.qmp("human-monitor-command", **{"command-line": command}))

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@contextmanager
def running(words: list[str], directory: Path) -> Iterator[Machine]:
    """A QEMU program with `words`, until the block ends. It must not have ended before."""
    path = directory / "qmp"
    path.unlink(missing_ok=True)
    process = subprocess.Popen([*words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        machine = Machine(process, path)
        try:
            yield machine
            machine.qmp("quit")
            assert process.wait(PATIENCE) == 0
        finally:
            machine.close()
    finally:
        process.kill()
        process.communicate()


def system(image: Path, tmp_path: Path, *, options: str = "") -> AbstractContextManager[Machine]:
    """A virtual machine with `image` as a disk, which never runs."""
    words = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S"]
    words += ["-drive", f"if=none,id=disk,format=qcow2,file={image}{options}"]
    return running([*words, "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"], tmp_path)


def daemon(image: Path, tmp_path: Path) -> AbstractContextManager[Machine]:
    """A storage daemon that exports `image` for writing. (Without an export nobody writes, and there is no lock.)"""
    words = ["qemu-storage-daemon", "--blockdev", f"driver=qcow2,node-name=disk,file.driver=file,file.filename={image}"]
    words += ["--nbd-server", f"addr.type=unix,addr.path={tmp_path}/nbd"]
    words += ["--export", "type=nbd,id=export,node-name=disk,writable=on"]
    words += ["--chardev", f"socket,id=qmp,path={tmp_path}/qmp,server=on,wait=off", "--monitor", "chardev=qmp"]
    return running(words, tmp_path)


@contextmanager
def typing(image: Path, tmp_path: Path, image_format: str = "qcow2") -> Iterator[Callable[[str], None]]:
    """qemu-io with `image` open for writing, and somebody at the keyboard: yields what types a command."""
    # -i0: it waits for its input to become readable, so a second line that stdio has read already would never be seen.
    words = ["stdbuf", "-i0", "-oL", "qemu-io", "-f", image_format, str(image)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def do(command: str) -> None:
            process.stdin.write(f"{command}\nlength\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            for line in process.stdout or ():
                assert "failed" not in line, line
                if line.strip().endswith("MiB"):  # the answer to `length`
                    return
            raise AssertionError("qemu-io ended")

        do("flush")
        try:
            yield do
        finally:
            process.stdin.write("quit\n")  # the end of its input is not enough: it would wait for ever
            process.stdin.close()
            process.stdout.read()
            assert process.wait(PATIENCE) == 0


WRITERS = {"a virtual machine": system, "a storage daemon": daemon, "qemu-io": typing}


@pytest.mark.parametrize("lock", [True, False], ids=["lock", "no lock"])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS.keys())
def test_a_writer_is_seen_and_only_what_it_writes_is_not_frozen(
    image: Path, tmp_path: Path, writer: Callable[[Path, Path], AbstractContextManager[Any]], lock: bool
) -> None:
    with writer(image, tmp_path):
        during = frozen(image, lock=lock)
    after = frozen(image, lock=lock)

    assert ({"top.qcow2": False, "one": True, "base.qcow2": True}, [True, False]) == during
    assert ({"top.qcow2": True, "one": True, "base.qcow2": True}, [False, False]) == after


@pytest.mark.parametrize("writer", [system, typing])
def test_a_base_that_is_written_freezes_nothing_above_it(
    image: Path, tmp_path: Path, writer: Callable[[Path, Path], AbstractContextManager[Any]]
) -> None:
    """R48: the snapshot of an overlay reads its base as it is now."""
    with writer(image.with_name("base.qcow2"), tmp_path):
        assert ({"top.qcow2": False, "one": False, "base.qcow2": False}, [False, True]) == frozen(image)


def test_a_machines_own_doings_are_not_disturbed(image: Path, tmp_path: Path) -> None:
    """Also not while qcowfs comes and goes, and not by what it leaves behind. Nor does its snapshot change."""
    with system(image, tmp_path) as machine, open_chain(str(image), Policy()) as chain:
        disk = open_point(chain, next(point for point in points(chain) if point.snapshot_name == b"one"))
        before = read_all(disk)

        assert machine.hmp('qemu-io disk "write -P 7 0 1M"') == ""
        machine.qmp("block_resize", device="disk", size=4 * MIB)
        machine.qmp("blockdev-snapshot-internal-sync", device="disk", name="made-by-the-machine")
        assert machine.hmp('qemu-io disk "write -P 8 0 1M"') == ""
        machine.qmp("blockdev-snapshot-delete-internal-sync", device="disk", name="made-by-the-machine")
        with open_chain(str(image), Policy()) as second:
            assert [True, False] == [layer.written_by_other for layer in second.layers]

        assert before == read_all(disk)
        assert b"\x01" * MIB == before[:MIB]


def test_a_machine_may_commit_into_a_base_that_is_read_and_the_reader_hears_of_it(image: Path, tmp_path: Path) -> None:
    with system(image, tmp_path) as machine, open_chain(str(image), Policy()) as chain:
        disk = open_point(chain, next(point for point in points(chain) if point.kind == "layer"))
        before = read_all(disk)

        machine.qmp("block-commit", device="disk", **{"job-id": "job"})
        while not machine.qmp("query-block-jobs")[0]["ready"]:
            time.sleep(0.01)

        assert b"\x09" * 2 * MIB == before
        with pytest.raises(ReadFault, match="another process has written the file since it was opened"):
            read_all(disk)


def test_what_a_machine_says_that_it_writes_is_written_whatever_its_locks_say(image: Path, tmp_path: Path) -> None:
    """It may take none (locking=off), or not yet: one that waits for its migration must get them then."""
    with system(image, tmp_path, options=",file.locking=off"):
        with open_chain(str(image), Policy(), written=True) as chain:
            facts = [(layer.written_by_other, layer.held) for layer in chain.layers]
            found = {point.kind: point.frozen for point in points(chain)}
            changed = [follow._has_changed(layer) for layer in chain.layers]
        with open_chain(str(image), Policy()) as chain:
            without = [layer.held for layer in chain.layers]

    assert [(True, False), (False, False)] == facts
    assert {"active": False, "snapshot": True, "layer": True} == found
    assert [False, False] == changed  # a mount would open it anew all the time
    assert [True, True] == without


def test_a_machine_may_start_and_stop_again_while_it_was_seen_running(image: Path, tmp_path: Path) -> None:
    """A chain opened beside a writer holds no lock, so the next writer is not kept out."""
    with system(image, tmp_path):
        chain = open_chain(str(image), Policy())
    with chain, system(image, tmp_path) as machine:
        assert machine.hmp('qemu-io disk "write -P 7 0 64k"') == ""


def test_a_machine_does_not_start_on_an_image_that_is_read(image: Path, tmp_path: Path) -> None:
    words = ["qemu-system-x86_64", "-machine", "none", "-nodefaults", "-display", "none", "-S"]
    words += ["-drive", f"if=none,id=disk,format=qcow2,file={image}"]

    with open_chain(str(image), Policy()):
        said = qemu(*words, check=False)

    assert said.returncode != 0
    assert LOCKED in said.stderr


def test_a_machine_that_only_reads_is_no_writer(image: Path, tmp_path: Path) -> None:
    with system(image, tmp_path, options=",read-only=on"), open_chain(str(image), Policy()) as chain:
        assert [False, False] == [layer.written_by_other for layer in chain.layers]
        assert all(point.frozen for point in points(chain))


def test_a_backing_file_of_a_running_machine_is_locked_beside_it(image: Path, tmp_path: Path) -> None:
    """The machine reads it, so do we; nobody writes it."""
    base = image.with_name("base.qcow2")

    with system(image, tmp_path), open_chain(str(base), Policy()) as chain:
        assert [False] == [layer.written_by_other for layer in chain.layers]
        assert read_all(open_point(chain, points(chain)[0])) == b"\x09" * 2 * MIB


def test_an_external_data_file_that_is_written_is_seen(tmp_path: Path) -> None:
    image, data = tmp_path / "top.qcow2", tmp_path / "data.raw"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", image, "1M")

    with typing(data, tmp_path, "raw"), open_chain(str(image), Policy()) as chain:
        assert chain.layers[0].written_by_other


def test_an_external_data_file_is_locked_too(tmp_path: Path) -> None:
    image, data = tmp_path / "top.qcow2", tmp_path / "data.raw"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", image, "1M")

    with open_chain(str(image), Policy()):
        said = qemu("qemu-io", "-f", "raw", "-c", "write 0 64k", data, check=False)

        assert LOCKED in said.stderr + said.stdout


@pytest.mark.parametrize("lock", [True, False])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning_and_nothing_worse(
    image: Path, monkeypatch: pytest.MonkeyPatch, number: int, lock: bool
) -> None:
    def without_locks(fd: int, command: int, *more: Any) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "fcntl", without_locks)

    with open_chain(str(image), Policy(), lock=lock) as chain:
        assert [False, False] == [layer.written_by_other for layer in chain.layers]
        warnings = [warning for warning in chain.warnings if "no locks" in warning]
    assert [True, True] == [
        warning.startswith(f"{path}: ")
        for warning, path in zip(warnings, (image, image.with_name("base.qcow2")), strict=True)
    ]


def test_another_error_of_the_locks_is_told_with_the_name_of_the_file(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(fd: int, command: int, *more: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "fcntl", failing)

    with pytest.raises(Exception, match="cannot lock") as caught:
        open_chain(str(image), Policy())
    assert str(caught.value).startswith(f"{image}: ")

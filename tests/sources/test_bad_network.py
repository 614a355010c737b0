"""Every kind of server behind a network that fails in every way, seen through a real mount.

Whatever happens: a read gives the right bytes, or an error within the promised time and a line in the log; once the
network is well again so is the mount. A fault happens to all servers at once, for most of its time is waiting; each
server has its own test of it. Evidence: real servers, and a proxy of our own before them.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import need
from tests.support.badnetwork import Mood
from tests.support.content import Content
from tests.support.mounts import Mounted, call, is_running, mounted, need_fuse, wait_until
from tests.support.qemu import qemu
from tests.support.remotes import REMOTES, Served

need("qemu-img", "dd")
need_fuse()

pytestmark = pytest.mark.xdist_group("bad network")

PIECE = 65536  # bytes: a block of the cache before a server, so that each is asked for by itself
COUNT = 256
STEP = 4  # pieces from one that is read to the next, which is before it: what is read ahead is never one of them
CONTENT = random.Random(14).randbytes(COUNT * PIECE)
PATIENCE = 3.0  # seconds: --source-timeout
BOUND = 4 * PATIENCE
CUTS = (10, 200, 20_000)  # bytes: amid what goes before the data of an answer, and amid the data; behind a login
BACK = ("the server is back", "the target answers again", "can be read again")
LINES = 6  # for one outage: two, and of some the end is told too early, by a small answer that passes between others
MANY = 60  # connections: who makes more of them in PATIENCE hammers the server


class Seen:
    """A mount of what a server has.

    Attributes:
        served: the server.
        mount: the mount; a test may end it, and the next one gets a new one.
    """

    def __init__(self, served: Served, directory: Path) -> None:
        self.served = served
        self.url = served.url.partition("?")[0].rpartition("@")[2]  # as the log has it; of ssh not all of it
        self._directory = directory
        self._places = iter(range(COUNT - STEP, 0, -STEP))
        self._stack = ExitStack()
        self.mount: Mounted | None = None

    def mounted(self) -> Mounted:
        """Mount it unless it is mounted."""
        if self.mount is None or not self.mount.is_mounted():
            self._stack.close()
            point = self._directory / "mnt"
            point.mkdir(exist_ok=True)
            words = ("--source-timeout", f"{PATIENCE}")
            environment = self.served.environment
            self.mount = self._stack.enter_context(mounted(self.served.url, point, *words, env=environment))
            assert self.piece(self.place()) is None
        return self.mount

    def place(self) -> int:
        """Return the number of a piece that nobody has read yet."""
        return next(self._places)

    @contextmanager
    def reader(self, place: int) -> Iterator[subprocess.Popen[bytes]]:
        """Begin to read a piece, past the kernel's cache."""
        assert self.mount is not None
        words = ["dd", f"if={self.mount / 'current.raw'}", "iflag=direct", f"bs={PIECE}", "count=1", f"skip={place}"]
        environment = {**os.environ, "LC_ALL": "C"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen([*words, "status=none"], env=environment, **pipes) as process:  # type: ignore[call-overload]
            try:
                yield process
            finally:
                process.kill()

    def piece(self, place: int) -> str | None:
        """Read a piece; returns the reason why it cannot be read, or None: it is right."""
        with self.reader(place) as process:
            return self.answer(process, place)

    def answer(self, process: subprocess.Popen[bytes], place: int) -> str | None:
        got, said = process.communicate(timeout=10 * PATIENCE)
        if process.returncode:
            return said.decode().rpartition(": ")[2].strip()
        assert Content(CONTENT[place * PIECE : (place + 1) * PIECE]) == Content(got)
        return None

    def told(self) -> list[str]:
        """Return the lines of the log about the server, but for what QEMU answers instead of it."""
        assert self.mount is not None
        about = f" WARNING: {self.served.url.partition(':')[0]}://"
        return [
            line
            for line in self.mount.log.read_text().splitlines()
            if about in line and not line.endswith(": Input/output error")
        ]

    def is_back(self, told: int) -> bool:
        """Tell whether the last of the lines after `told` of them says that it is over; if not, read once more."""
        lines = self.told()[told:]
        if not lines or lines[-1].endswith(BACK):
            return True
        time.sleep(0.5)  # for who writes the log
        assert self.piece(self.place()) is None
        return False

    def close(self) -> None:
        self._stack.close()


Fault = Callable[[Seen], None]


def wait_for_question(process: subprocess.Popen[bytes]) -> None:
    """Wait until a reader waits for what it reads: it has opened the disk as its standard input, and sleeps."""

    def waits() -> bool:
        with suppress(OSError):
            opened = Path(f"/proc/{process.pid}/fd/0").readlink().name == "current.raw"
            return opened and Path(f"/proc/{process.pid}/stat").read_text().rpartition(") ")[2][0] in "SD"
        return False

    wait_until(lambda: process.poll() is not None or waits(), "it does not read")
    time.sleep(0.1)


# What happens: a function for each fault, called for all servers at once.


def slow(seen: Seen) -> None:
    with seen.served.network.mood(Mood(delay=0.02)):
        assert seen.piece(seen.place()) is None


def silent_for_a_while(seen: Seen) -> None:
    passes(seen, Mood(silent=True))


def refused_for_a_while(seen: Seen) -> None:
    passes(seen, Mood(refused=True))


def passes(seen: Seen, mood: Mood) -> None:
    place = seen.place()
    with ExitStack() as stack:
        with seen.served.network.mood(mood):
            process = stack.enter_context(seen.reader(place))
            wait_for_question(process)
            assert process.poll() is None, "it was answered"
        assert seen.answer(process, place) is None


def unavailable_for_a_while(seen: Seen) -> None:
    place = seen.place()
    with ExitStack() as stack:
        with unavailable(seen.served) as log:
            process = stack.enter_context(seen.reader(place))
            wait_until(lambda: '" 503 ' in log.read_text(), "nobody asked")
        assert seen.answer(process, place) is None


@contextmanager
def unavailable(served: Served) -> Iterator[Path]:
    """Let the web server answer 503; yields its log."""
    assert served.web is not None
    sign, log = served.web.work / "down", served.web.work / "requests.log"
    log.write_text("")
    sign.touch()
    try:
        yield log
    finally:
        sign.unlink()


def reset_once(seen: Seen) -> None:
    cut_once(seen, reset=True)


def cut_short_once(seen: Seen) -> None:
    cut_once(seen, reset=False)


def cut_once(seen: Seen, reset: bool) -> None:
    network = seen.served.network
    for count in CUTS:
        before = network.ends
        with network.mood(Mood(cut=count, reset=reset, once=True)):
            assert seen.piece(seen.place()) is None, f"after {count} bytes"
        assert network.ends == before + 1


def silent(seen: Seen) -> None:
    lasts(seen, seen.served.network.mood(Mood(silent=True)))


def refused(seen: Seen) -> None:
    lasts(seen, seen.served.network.mood(Mood(refused=True)))


def always_reset(seen: Seen) -> None:
    lasts(seen, seen.served.network.mood(Mood(cut=CUTS[-1], reset=True)))


def always_cut_short(seen: Seen) -> None:
    lasts(seen, seen.served.network.mood(Mood(cut=CUTS[-1])))


def always_unavailable(seen: Seen) -> None:
    lasts(seen, unavailable(seen.served))


def lasts(seen: Seen, fault: AbstractContextManager[object]) -> None:
    place, other = seen.place(), seen.place()
    mount = seen.mounted()
    told, length = len(seen.told()), len(mount.log.read_text())
    with fault:
        connections = seen.served.network.connections
        begin = time.monotonic()
        assert seen.piece(place) == "Input/output error"
        assert time.monotonic() - begin < BOUND
        assert seen.served.network.connections - connections < MANY
        assert "current.raw" in subprocess.check_output(["ls", "-f", mount.path], text=True, timeout=BOUND)
        # The line of the read names the server, too. Of several connections only the first one has its own lines.
        wait_until(lambda: seen.url in mount.log.read_text()[length:], "the log does not know")
        assert len(seen.told()) < told + LINES
    wait_until(lambda: seen.piece(place) is None, "it does not come back")
    assert seen.piece(other) is None
    wait_until(lambda: seen.is_back(told), "the log does not know that it is back")


def silent_for_an_impatient_reader(seen: Seen) -> None:
    place = seen.place()
    with seen.served.network.mood(Mood(silent=True)):
        go_away(seen, place)
    wait_until(lambda: seen.piece(place) is None, "it does not come back")


def silent_at_the_end(seen: Seen) -> None:
    mount = seen.mounted()
    children = [int(child) for task in Path(f"/proc/{mount.pid}/task").iterdir() for child in children_of(task)]
    with seen.served.network.mood(Mood(silent=True)):
        go_away(seen, seen.place())
        done = call("umount", mount.path)
        assert (done.returncode, done.stderr) == (0, "")
        mount.wait_gone()
        wait_until(lambda: not any(map(is_running, children)), "a process is left")


def go_away(seen: Seen, place: int) -> None:
    """Interrupt a reader that waits. One by way of the kernel's cache: of O_DIRECT the kernel lets nobody go."""
    with open(seen.mounted() / "current.raw", "rb", buffering=0) as file:
        file.seek(place * PIECE)
        with subprocess.Popen(["head", "-c", str(PIECE)], stdin=file, stdout=subprocess.DEVNULL) as process:
            wait_for_question(process)
            process.send_signal(signal.SIGINT)
            assert process.wait(BOUND) == -signal.SIGINT


def children_of(task: Path) -> list[str]:
    return (task / "children").read_text().split()


FAULTS: list[Fault] = [
    slow,
    silent_for_a_while,
    refused_for_a_while,
    unavailable_for_a_while,
    reset_once,
    cut_short_once,
    silent,
    refused,
    always_reset,
    always_cut_short,
    always_unavailable,
    silent_for_an_impatient_reader,
    silent_at_the_end,
]
OF_THE_WEB = (unavailable_for_a_while, always_unavailable)
WEB = ("http", "https", "s3", "gs", "az")
PAIRS = [(fault, server) for fault in FAULTS for server in REMOTES if server in WEB or fault not in OF_THE_WEB]


def asked(request: pytest.FixtureRequest, fault: object = None) -> list[str]:
    """Return the servers that tests of this run ask for; with `fault`, tests of that one."""
    found = [item.callspec.params for item in request.session.items if item.path == Path(__file__)]  # type: ignore[attr-defined]
    return [
        name for name in REMOTES if any(name == pair["server"] and fault in (None, pair["fault"]) for pair in found)
    ]


@pytest.fixture(scope="module")
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Seen]]]:
    raw = tmp_path_factory.mktemp("v") / "disk.raw"
    raw.write_bytes(CONTENT)
    image = raw.with_suffix(".qcow2")
    qemu("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, image)
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:

        def begun(name: str) -> Seen:
            served = stack.enter_context(REMOTES[name](image, tmp_path_factory.mktemp("v")))
            seen = Seen(served, tmp_path_factory.mktemp(name))
            stack.callback(seen.close)
            seen.mounted()
            return seen

        yield {name: pool.submit(begun, name) for name in asked(request)}


@pytest.fixture(scope="module")
def happened(
    request: pytest.FixtureRequest, servers: dict[str, Future[Seen]]
) -> Iterator[Callable[[Fault, str], None]]:
    """Yield what lets a fault happen to all servers, the first time, and raises what went wrong with one of them."""
    so_far: dict[Fault, dict[str, Future[None]]] = {}

    def happen(fault: Fault, name: str) -> None:
        seen = servers[name].result()
        mount = seen.mounted()
        fault(seen)
        assert mount.is_alive() or fault is silent_at_the_end

    def result(fault: Fault, server: str) -> None:
        if fault not in so_far:
            wait(future for futures in so_far.values() for future in futures.values())
            so_far[fault] = {name: pool.submit(happen, fault, name) for name in asked(request, fault)}
        so_far[fault][server].result()

    with ThreadPoolExecutor(len(servers)) as pool:
        yield result


@pytest.mark.parametrize(("fault", "server"), PAIRS, ids=lambda word: getattr(word, "__name__", word))
def test_a_mount_survives(happened: Callable[[Fault, str], None], fault: Fault, server: str) -> None:
    happened(fault, server)

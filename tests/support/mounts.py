"""Real mounts for tests: the command in its own process, who runs it, and that nothing is left of it.

The daemon writes the stacks of its threads to a file on SIGUSR1, and a test that waits for it in vain shows them.
"""

from __future__ import annotations

import functools
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from qcowfs import mountpoint
from tests.support import lacking, need

REPOSITORY = Path(__file__).resolve().parents[2]
_copies: list[str] = []  # directories, of this process
RUNNER = shlex.split(os.environ.get("QCOWFS_TEST_RUNNER", ""))  # goes before each `qcowfs`: a debugger, a sanitizer
PATIENCE = 20.0  # seconds; far more than anything here takes on a busy machine

# What a console script does, plus the stacks on SIGUSR1, and what a test wants to be otherwise (QCOWFS_TEST_BEFORE).
# `qcowfs` may or may not be installed.
LAUNCHER = """
import faulthandler, os, signal, sys
sys.path.insert(0, {repository!r})
sys.path.append({packages!r})
stacks = os.environ.get("QCOWFS_TEST_STACKS")
if stacks:
    faulthandler.register(signal.SIGUSR1, file=open(stacks, "w"), all_threads=True)
exec(os.environ.get("QCOWFS_TEST_BEFORE", ""))
from {module} import {function}
sys.exit({function}())
"""


@dataclass(frozen=True)
class Person:
    """Who runs a command."""

    name: str
    uid: int
    gid: int
    home: str

    @property
    def is_me(self) -> bool:
        return self.uid == os.geteuid()

    def popen_arguments(self) -> dict[str, object]:
        """Return what Popen needs to become this person."""
        return {} if self.is_me else {"user": self.uid, "group": self.gid, "extra_groups": []}

    def environment(self, more: dict[str, str] | None = None) -> dict[str, str]:
        """Return this process's environment with this person's home, and `more`."""
        return {**os.environ, **({} if self.is_me else {"HOME": self.home}), **(more or {})}

    def own(self, path: Path) -> Path:
        """Give `path` to this person."""
        if not self.is_me:
            os.chown(path, self.uid, self.gid)
        return path


def launcher(person: Person | None = None) -> list[str]:
    """Return the command that is `qcowfs` of this checkout, for `person`."""
    person = person or me()
    return [*RUNNER, interpreter(person), "-c", _code(person, "qcowfs.cli", "main")]


def script(path: Path, module: str = "qcowfs.cli", function: str = "main", *, person: Person | None = None) -> Path:
    """Write an executable at `path` that runs an entry point of this checkout, as pip installs one."""
    person = person or me()
    path.write_text(f"#!{interpreter(person)}\n{_code(person, module, function)}")
    path.chmod(0o755)
    return path


def _code(person: Person, module: str, function: str) -> str:
    # The packages come last: they are for a Python that does not find them by itself.
    repository, packages = places(person)
    return LAUNCHER.format(repository=repository, packages=packages, module=module, function=function)


@functools.cache
def interpreter(person: Person) -> str:
    """Return a Python that `person` can run, this one or the system's; "" if there is none.

    Root's Python may lie in root's home. The compiled modules fit every Python of the same version.
    """
    if person.is_me:
        return sys.executable
    for program in (sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"):
        if _can_import(program, person, places(person)):
            return program
    return ""


@functools.cache
def places(person: Person) -> tuple[str, str]:
    """Return the directories in which `person` finds `qcowfs`, and what it needs: here, or in copies of them."""
    here = str(REPOSITORY), sysconfig.get_path("platlib")
    if person.is_me or all(os.path.isdir(place) and _may_enter(place, person) for place in here):
        return here
    return _copied(here)


def _may_enter(place: str, person: Person) -> bool:
    return subprocess.run(["test", "-x", place], **person.popen_arguments()).returncode == 0  # type: ignore[call-overload, no-any-return]


def _copied(here: tuple[str, str]) -> tuple[str, str]:
    """Copy the package, and what it needs, to where everybody may read it: root's checkout may lie in root's home."""
    directory = tempfile.mkdtemp(prefix="checkout-")
    _copies.append(directory)
    os.chmod(directory, 0o755)
    tools = shutil.ignore_patterns("pip*", "*mypy*", "Cython*", "setuptools*", "pygments*", "ruff*", "__pycache__")
    shutil.copytree(f"{here[0]}/qcowfs", f"{directory}/here/qcowfs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(here[1], f"{directory}/packages", ignore=tools)
    return f"{directory}/here", f"{directory}/packages"


def remove_copies() -> None:
    """Remove what `places` copied; nobody may need it any more."""
    while _copies:
        shutil.rmtree(_copies.pop())
    places.cache_clear()
    interpreter.cache_clear()


def _can_import(program: str, person: Person, found_in: tuple[str, str]) -> bool:
    code = f"import sys; sys.path += {list(found_in)!r}; import pyfuse3, qcowfs._core"
    with suppress(OSError):
        tried = subprocess.run([*RUNNER, program, "-c", code], capture_output=True, cwd="/", **person.popen_arguments())  # type: ignore[call-overload]
        return bool(tried.returncode == 0)
    return False


def me() -> Person:
    """Return who runs the tests."""
    return _person(pwd.getpwuid(os.geteuid()))


def nobody() -> Person:
    """Return the ordinary user that every machine has."""
    return _person(pwd.getpwnam("nobody"))


def _person(entry: pwd.struct_passwd) -> Person:
    return Person(entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir)


def ordinary_user() -> Person:
    """Return an ordinary user who can run the checkout and FUSE: who runs the tests, or nobody. Skips without one."""
    need("fusermount3")
    if os.stat("/dev/fuse").st_mode & 0o006 != 0o006:
        lacking("/dev/fuse: not for ordinary users; `make setup` gives it mode 0666, as udev does")
    if os.geteuid() != 0:
        return me()
    person = nobody()
    if not interpreter(person):
        lacking(f"the user {person.name} cannot run any Python that can import this checkout")
    return person


def need_fuse() -> None:
    """Skip unless this machine can make FUSE mounts."""
    need("fusermount3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        lacking("/dev/fuse: missing, or not for this user")


def call(
    *arguments: str | Path,
    person: Person | None = None,
    command: Sequence[str] | None = None,
    env: dict[str, str] | None = None,
    cwd: Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `qcowfs ARGUMENTS` to its end and return what it said; standard input is empty."""
    words = [*(command or launcher(person)), *map(str, arguments)]
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=PATIENCE,
        env=(person or me()).environment(env),
        cwd=cwd,
        **(person or me()).popen_arguments(),
    )


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Return the message of a command that failed as it should: one line, perhaps a hint, never a traceback."""
    lines = done.stderr.splitlines()
    assert done.stdout == ""
    assert lines and lines[0].startswith("qcowfs: "), done.stderr
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), done.stderr
    return lines[0]


def wait_until(true: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Wait until `true()`; fail with `what` if that does not happen."""
    end = time.monotonic() + patience
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Tell whether a process lives. One that ended and waits for init to collect it does not."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as status:
            return status.read().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


@dataclass
class Mounted:
    """A mount that a test made.

    Attributes:
        path: the mount point.
        pid: the daemon.
        person: who mounted.
        process: the command, if it stayed in the foreground.
    """

    path: Path
    person: Person
    log: Path
    stacks: Path
    process: subprocess.Popen[str] | None = None
    pid: int = field(init=False)

    def __post_init__(self) -> None:
        self.pid = int(self.ask("user.qcowfs.pid"))

    def ask(self, attribute: str) -> bytes:
        """Return an extended attribute of the root, asked as the person who mounted."""
        if self.person.is_me:
            return os.getxattr(self.path, attribute)
        code = "import os, sys; sys.stdout.buffer.write(os.getxattr(sys.argv[1], sys.argv[2]))"
        done = subprocess.run(
            [interpreter(self.person), "-c", code, str(self.path), attribute],
            check=True,
            capture_output=True,
            **self.person.popen_arguments(),  # type: ignore[call-overload]
        )
        assert isinstance(done.stdout, bytes)
        return done.stdout

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def is_mounted(self) -> bool:
        return mountpoint.find(str(self.path)) is not None

    def signal(self, number: int) -> None:
        """Send the daemon a signal."""
        os.kill(self.pid, number)

    def wait_gone(self) -> None:
        """Wait until the daemon ended; then check that it left no mount, and nothing unexpected in its log."""
        with suppress(AssertionError):
            wait_until(lambda: not self.is_alive(), "")
        assert not self.is_alive(), f"the daemon still runs:\n{self._dumped_stacks()}"
        assert not self.is_mounted()
        assert not (words := unexpected(self.log)), words

    def is_alive(self) -> bool:
        if self.process is not None:
            return self.process.poll() is None
        return is_running(self.pid)

    def _dumped_stacks(self) -> str:
        with suppress(OSError):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.5)
        return self.stacks.read_text() if self.stacks.exists() else "no stacks"


def unexpected(log: Path) -> list[str]:
    """Return the lines of a log that no test expects."""
    if not log.exists():
        return []
    bad = ("Traceback", "internal error", "Exception", "CRITICAL", "error in")
    return [line for line in log.read_text().splitlines() if any(word in line for word in bad)]


@contextmanager
def mounted(
    image: str | Path, path: Path, *options: str, person: Person | None = None, env: dict[str, str] | None = None
) -> Iterator[Mounted]:
    """Mount `image` on `path` in the background, and see to it that it is gone afterwards."""
    person = person or me()
    log, stacks = (person.own(_touched(path.with_name(path.name + ending))) for ending in (".log", ".stacks"))
    told = {**(env or {}), "QCOWFS_TEST_STACKS": str(stacks)}
    done = call("mount", *options, "--log-file", log, image, path, person=person, env=told)
    try:
        assert done.returncode == 0, done.stderr
        mount = Mounted(path, person, log, stacks)
        yield mount
        if mount.is_mounted():
            ended = call("umount", path, person=person)
            assert ended.returncode == 0, ended.stderr
        mount.wait_gone()
    finally:
        force_unmount(path)


@contextmanager
def in_foreground(image: str | Path, path: Path, *options: str, env: dict[str, str] | None = None) -> Iterator[Mounted]:
    """Mount `image` on `path` with -f, and end it with SIGTERM if the test did not."""
    log, stacks = (_touched(path.with_name(path.name + ending)) for ending in (".log", ".stacks"))
    words = [*launcher(), "mount", "-f", *options, "--log-file", str(log), str(image), str(path)]
    told = {**os.environ, **(env or {}), "QCOWFS_TEST_STACKS": str(stacks)}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, env=told, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            wait_until(lambda: mountpoint.find(str(path)) or process.poll() is not None, "it never mounted")
            assert process.poll() is None, process.communicate()
            mount = Mounted(path, me(), log, stacks, process)
            yield mount
            if mount.is_alive():
                process.send_signal(signal.SIGTERM)
            mount.wait_gone()
        finally:
            process.kill()
            force_unmount(path)


def _touched(path: Path) -> Path:
    path.touch()
    return path


def force_unmount(path: Path) -> None:
    """Remove whatever is still mounted on `path`, dead or alive, so that one failed test does not break others."""
    while mountpoint.find(str(path)) is not None:
        words = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*words, str(path)], check=True, timeout=PATIENCE)


def shell(command: str, *arguments: str | Path, person: Person | None = None) -> str:
    """Run `command` in sh, as a person at a terminal would, and return its output; `arguments` are $1, $2, ..."""
    done = subprocess.run(  # type: ignore[call-overload]
        ["sh", "-euc", command, "sh", *map(str, arguments)],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=PATIENCE,
        **(person or me()).popen_arguments(),
    )
    assert done.returncode == 0, f"{shlex.quote(command)}: {done.stderr}"
    return str(done.stdout)


def qemu(*words: str | Path) -> str:
    """Run a QEMU tool, and return its output."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(map(str, words))}: {done.stderr}{done.stdout}")
    return done.stdout

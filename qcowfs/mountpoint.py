"""Directories to mount on: the kernel's table of mounts, checks before mounting, unmounting, who keeps one busy.

Used by mount.py and cli/umount.py; works where pyfuse3 cannot be imported, and on a mount whose daemon is dead.
Nothing here asks a mounted file system anything but `dead` and `check`, so it is safe in the daemon's worker threads.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from qcowfs.errors import FuseUnavailable, MountpointError

__all__ = ["TYPE", "Mount", "check", "find", "fusermount", "holders", "mounts", "real", "unmount", "uppermost"]

TYPE = "fuse.qcowfs"
FUSERMOUNT = "fusermount3"
FUSERMOUNT_TIMEOUT = 30.0  # seconds; it only makes system calls
SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"  # mount(8) gives its helpers no PATH
MAX_HOLDERS = 10  # named in a message

DEAD = (errno.ENOTCONN, errno.ECONNABORTED)  # the latter is said once, to whoever asks first

MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8

_OCTAL = re.compile(rb"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of /proc/self/mountinfo.

    Attributes:
        path: where it is mounted.
        device: "major:minor", the same for all places where this file system is mounted.
        type: the file system type with FUSE's subtype, as "fuse.qcowfs".
        source: what is mounted; for qcowfs the image.
    """

    path: str
    device: str
    type: str
    source: str


def mounts() -> Iterator[Mount]:
    """Yield the mounts of this process's namespace, the later ones lying over the earlier ones."""
    with open("/proc/self/mountinfo", "rb") as table:
        for line in table:
            fields = line.split()
            separator = fields.index(b"-", 6)  # optional fields come before it
            path, kind, source = (_unescaped(field) for field in (fields[4], *fields[separator + 1 : separator + 3]))
            yield Mount(path, os.fsdecode(fields[2]), kind, source)


def _unescaped(field: bytes) -> str:
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))


def real(path: str) -> str:
    """Return `path` as the kernel's table has it. Works for a dead mount, too."""
    return os.path.realpath(path)


def find(path: str) -> Mount | None:
    """Return the uppermost mount at exactly `path`, None if there is none.

    Making the path real may ask the file system that is mounted there: not for the thread that has to answer.
    """
    return uppermost(real(path))


def uppermost(path: str) -> Mount | None:
    """Return the uppermost mount at `path`, a real path, None if there is none. Asks only the kernel's table."""
    return next((mount for mount in reversed(list(mounts())) if mount.path == path), None)


def check(path: str, *, nonempty: bool = False) -> str:
    """Return the real path of `path`, a directory on which this person can mount.

    Args:
        nonempty: a directory with entries, or a mount, is right, too.

    Raises:
        MountpointError: it is not; nothing was changed.
    """
    _require_directory(path)
    mounted = find(path)
    if mounted is not None and not nonempty:
        raise MountpointError(path, f"already a mount point (type {mounted.type})")
    if not nonempty and _has_entries(path):
        raise MountpointError(path, "the directory is not empty", hint="-o nonempty mounts over it all the same")
    if os.geteuid() != 0:
        _require_ownership(path)
    return real(path)


def _require_directory(path: str) -> None:
    try:
        mode = os.stat(path).st_mode
        os.statvfs(path)  # of a mount that just died, the kernel still remembers the attributes
    except OSError as error:
        if error.errno in DEAD:
            what = "a dead mount: its daemon is gone"
            raise MountpointError(path, what, hint=f"'qcowfs umount {path}' removes it") from error
        raise MountpointError(path, error.strerror or str(error)) from error
    if not stat.S_ISDIR(mode):
        raise MountpointError(path, "not a directory")


def _has_entries(path: str) -> bool:
    try:
        with os.scandir(path) as entries:
            return next(entries, None) is not None
    except OSError as error:
        raise MountpointError(path, error.strerror or str(error)) from error


def _require_ownership(path: str) -> None:
    """Ask what fusermount3 asks of an ordinary user, in words that say what to do."""
    status = os.stat(path)
    if not os.access(path, os.W_OK):
        raise MountpointError(path, "no write permission, which mounting needs")
    if status.st_mode & stat.S_ISVTX and status.st_uid != os.geteuid():
        raise MountpointError(path, "a shared directory (sticky bit) of another user")


def fusermount() -> str | None:
    """Return the path of fusermount3, None if it is not installed."""
    path = os.environ.get("PATH", "")
    return shutil.which(FUSERMOUNT, path=f"{path}:{SYSTEM_PATH}" if path else SYSTEM_PATH)


def unmount(path: str, *, lazy: bool = False) -> None:
    """Unmount `path`, a real path.

    Args:
        lazy: take it out of the tree now, and let it live on for whoever has files open.

    Raises:
        OSError: EBUSY, it is in use; or another reason of the kernel's.
        MountpointError: fusermount3's refusal, in its words.
        FuseUnavailable: fusermount3 is not installed, and this person needs it.
    """
    if os.geteuid() == 0:
        _unmount_as_root(path, lazy=lazy)
    else:
        _unmount_as_user(path, lazy=lazy)


def _unmount_as_root(path: str, *, lazy: bool) -> None:
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if lazy else 0)
    if _libc.umount2(os.fsencode(path), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def _unmount_as_user(path: str, *, lazy: bool) -> None:
    program = fusermount()
    if program is None:
        raise FuseUnavailable(f"{FUSERMOUNT}: not found", hint="it is in the package fuse3")
    command = [program, "-u", *(["-z"] if lazy else []), "--", path]
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "LC_ALL": "C"},
        timeout=FUSERMOUNT_TIMEOUT,
        check=False,
    )
    if done.returncode != 0:
        said = os.fsdecode(done.stderr).strip()
        if os.strerror(errno.EBUSY) in said:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), path)
        raise MountpointError(path, said.removeprefix(f"{FUSERMOUNT}: ") or f"{FUSERMOUNT} failed")


def holders(mount: Mount) -> list[str]:
    """Return who keeps `mount` busy, as "PID (name)", "/dev/loopN" or "PATH (mounted)"; only what this person may see.

    Links in /proc are read and never followed: following them would ask the file system, whose daemon may be stuck.
    """
    inside = _Inside(mount.path)
    found = [f"{other.path} (mounted)" for other in mounts() if other.path.startswith(inside.below)]
    found += [device for device, file in _loop_devices() if inside(file)]
    found += [f"{pid} ({_process_name(pid)})" for pid in _pids() if any(inside(path) for path in _used_paths(pid))]
    return found


class _Inside:
    """Tells whether a path lies at or under a directory."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.below = directory.rstrip("/") + "/"

    def __call__(self, path: str) -> bool:
        return path == self.directory or path.startswith(self.below)


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid())


def _process_name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as comm:
            return os.fsdecode(comm.read().strip())
    except OSError:
        return "?"


def _used_paths(pid: int) -> Iterator[str]:
    """Yield the paths that a process works in, has open or has mapped; none that this person may not see."""
    folder = f"/proc/{pid}/fd"
    try:
        descriptors = os.listdir(folder)
    except OSError:
        descriptors = []
    links = [f"/proc/{pid}/{name}" for name in ("cwd", "root", "exe")] + [f"{folder}/{name}" for name in descriptors]
    for link in links:
        try:
            yield os.readlink(link)
        except OSError:
            continue
    yield from _mapped_paths(pid)


def _mapped_paths(pid: int) -> Iterator[str]:
    try:
        with open(f"/proc/{pid}/maps", "rb") as maps:
            for line in maps:
                fields = line.rstrip(b"\n").split(maxsplit=5)
                if len(fields) == 6:
                    yield _unescaped(fields[5])
    except OSError:
        return


def _loop_devices() -> Iterator[tuple[str, str]]:
    """Yield (device, backing file): the kernel itself holds the file of a loop mount, no process does."""
    for name in sorted(os.listdir("/sys/block")) if os.path.isdir("/sys/block") else []:
        try:
            with open(f"/sys/block/{name}/loop/backing_file", "rb") as backing:
                yield f"/dev/{name}", os.fsdecode(backing.read().rstrip(b"\n"))
        except OSError:
            continue

"""The gate: may this name be opened, and as what? The only place that opens what an image *names*.

Used by chain. A person's own words are opened as they are; a name inside an image is resolved first, judged after,
and then opened component by component, so that nothing can be swapped in between. The default and its reasons are in
docs/decisions/0002-gate-and-probing.md. Any thread.
"""

from __future__ import annotations

import configparser
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qcowfs.errors import GateRefused, SourceError, UsageError, printable

__all__ = ["Policy", "load_policy", "open_named_file", "open_user_file"]

ANY = "any"
SYSTEM_CONFIG = "/etc/qcowfs.conf"
PSEUDO_FILE_SYSTEMS = ("/proc", "/sys")  # their "regular files" are memory, switches and secrets


@dataclass(frozen=True, slots=True)
class Policy:
    """Which files that an image names may be opened, beside those near an opened layer.

    Attributes:
        allow: directories, resolved; everything below them is allowed.
        allow_any: everything that the person may read is allowed.
    """

    allow: tuple[str, ...] = ()
    allow_any: bool = False


def load_policy(allow_backing: Sequence[str] = (), config_files: Iterable[str] | None = None) -> Policy:
    """Return the policy of the command line's `--allow-backing` words and of the configuration files.

    Raises:
        UsageError: a directory is not one, or a configuration file cannot be understood.
    """
    words = list(allow_backing)
    for path in _config_files() if config_files is None else config_files:
        words += _configured(path)
    allow = tuple(_directory(word) for word in words if word != ANY)
    return Policy(allow=allow, allow_any=ANY in words)


def _config_files() -> tuple[str, ...]:
    home = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return SYSTEM_CONFIG, os.path.join(home, "qcowfs", "config")


def _configured(path: str) -> list[str]:
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []  # another user's home, say; without it less is allowed, never more
    except (OSError, configparser.Error, UnicodeDecodeError) as error:
        raise UsageError(f"{printable(path)}: cannot be used: {printable(str(error).splitlines()[0])}") from error
    value = parser.get("backing", "allow", fallback="")
    return [word for word in value.replace("\n", ":").split(":") if word]


def _directory(word: str) -> str:
    resolved = os.path.realpath(os.path.expanduser(word))
    if not os.path.isdir(resolved):
        raise UsageError(f"--allow-backing {printable(word)}: not a directory", hint=f"DIR, or {ANY} for every file")
    return resolved


def open_user_file(path: str) -> int:
    """Open what a person named; returns a descriptor.

    Raises:
        SourceError: it is missing, unreadable, or neither a regular file nor a block device.
    """
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError.from_oserror(path, "cannot open", error) from error
    return _reopen(place, path)


def open_named_file(path: str, *, policy: Policy, near: Sequence[str], named_by: str, role: str) -> int:
    """Open what an image names; returns a descriptor. Everything that an image names comes through here.

    Args:
        path: absolute.
        near: resolved directories that hold layers which are already open; what lies below them is allowed.
        named_by: the layer that names it, for messages.
        role: "backing file" or "data file", for messages.

    Raises:
        GateRefused: the policy does not allow it.
        SourceError: it is missing, unreadable, or neither a regular file nor a block device.
    """
    resolved = os.path.realpath(path)
    _judge(resolved, policy, near, named_by, role)
    try:
        place = _open_without_links(resolved)
    except OSError as error:
        what = f"cannot open {role} {printable(path)}"
        raise SourceError.from_oserror(named_by, what, error, hint=_missing_hint(error, role)) from error
    return _reopen(place, path)


def _missing_hint(error: OSError, role: str) -> str | None:
    if isinstance(error, FileNotFoundError):
        return f"bring the {role} back to that place, or correct the name with qemu-img rebase -u"
    return None


def _judge(resolved: str, policy: Policy, near: Sequence[str], named_by: str, role: str) -> None:
    told = f"it names the {role} {printable(resolved)}"
    if any(_is_below(resolved, pseudo) for pseudo in PSEUDO_FILE_SYSTEMS):
        raise GateRefused(named_by, told, "no file of the kernel's own is ever opened for an image")
    if policy.allow_any or any(_is_below(resolved, directory) for directory in policy.allow):
        return
    # An image in "/" vouches for the files beside it, not for the whole machine.
    if any(_is_below(resolved, directory) for directory in near if directory != "/") or (
        "/" in near and os.path.dirname(resolved) == "/"
    ):
        return
    hint = f"--allow-backing {printable(os.path.dirname(resolved))} allows it"
    raise GateRefused(named_by, told, "it lies outside the directories of the image's layers", hint=hint)


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _open_without_links(resolved: str) -> int:
    """Open an absolute path with O_PATH, following no symbolic link: a component swapped since is an error."""
    parts = [part for part in resolved.split("/") if part]
    place = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    for number, part in enumerate(parts, 1):
        directory = os.O_DIRECTORY if number < len(parts) else 0
        try:
            following = os.open(part, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC | directory, dir_fd=place)
        finally:
            os.close(place)
        place = following
    return place


def _reopen(place: int, path: str) -> int:
    """Open for reading what an O_PATH descriptor stands for, once it is known to be harmless to open."""
    try:
        _require_readable_kind(os.fstat(place).st_mode, path)
        # O_NONBLOCK: whatever it is, opening it must not wait. It means nothing to files and block devices.
        return os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError.from_oserror(path, "cannot open", error) from error
    finally:
        os.close(place)


def _require_readable_kind(mode: int, path: str) -> None:
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a character device",
        stat.S_IFSOCK: "a socket",
        stat.S_IFLNK: "a symbolic link",
    }
    kind = kinds.get(stat.S_IFMT(mode), "not a file")
    raise SourceError(path, "cannot open", f"{kind}, not a file or a block device")

"""The gate: may this name be opened? The only place that opens what an image *names*.

Used by chain. A person's own words are opened as they are; a name inside an image is resolved first, judged after,
and then opened component by component, so that nothing can be swapped in between. The default and its reasons are in
docs/decisions/0002-gate-and-probing.md. A Gate belongs to one thread, which opens one chain.
"""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass

from qcowfs.errors import GateRefused, SourceError, printable
from qcowfs.policy import Policy, load_policy
from qcowfs.source.remote import Remote, Remotes
from qcowfs.source.url import Url

__all__ = ["Gate", "Policy", "load_policy"]

DEVICES = "/dev"
KERNEL_DIRECTORIES = ("/proc", "/sys")
# Their "regular files" are switches, the memory of others, and pipes whose reading never ends (/proc/kmsg), wherever
# they are mounted.
KERNEL_FILE_SYSTEMS = frozenset(
    (
        *("binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "debugfs", "devpts", "efivarfs", "fusectl", "mqueue"),
        *("nfsd", "proc", "pstore", "resctrl", "rpc_pipefs", "securityfs", "selinuxfs", "smackfs", "sysfs", "tracefs"),
    )
)


@dataclass(frozen=True, slots=True)
class _Name:
    """A name inside an image: absolute as written, resolved, and for messages the layer and what it is there."""

    path: str
    resolved: str
    named_by: str
    role: str

    def refused(self, why: str, *, allowed_by: str | None = None) -> GateRefused:
        import shlex  # 3 ms, for a refusal

        told = f"it names the {self.role} {printable(self.resolved)}"
        hint = allowed_by and f"--allow-backing {shlex.quote(printable(allowed_by))} allows it"
        return GateRefused(self.named_by, told, why, hint=hint)

    def failed(self, error: OSError) -> SourceError:
        hint = None
        if isinstance(error, FileNotFoundError):
            hint = f"bring the {self.role} back to that place, or correct the name with qemu-img rebase -u"
        return SourceError.from_oserror(
            self.named_by, f"cannot open {self.role} {printable(self.path)}", error, hint=hint
        )


class Gate:
    """Opens the files of one chain, and knows what its opened layers vouch for."""

    def __init__(self, policy: Policy, remotes: Remotes | None = None) -> None:
        self._policy = policy
        self._remotes = remotes or Remotes()
        self._servers: set[tuple[str, ...]] = set()  # folders of URLs: what lies right in them may be named
        self._trees: list[str] = []  # real directories: regular files in and below them may be named
        self._directories: list[str] = []  # real directories: regular files right in them may be named
        self._guessed: str | None = None  # the layer whose format was guessed: it and all below it vouch for nothing

    def open_image(self, path: str) -> int:
        """Open the image itself, the person's own word; returns a descriptor. Its directory tree is vouched for.

        Raises:
            SourceError: it is missing, unreadable, or neither a regular file nor a block device.
        """
        descriptor, named_in = _open_by_person(path)
        # The person said this directory: a name that begins at it, as QEMU has it, may lead to a file in it.
        self._directories.append(named_in)
        # The directory of a block device holds all disks of the machine, and no image vouches for that. Neither does
        # an image in "/" for more than the files beside it.
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            tree = _directory_of(descriptor)
            (self._directories if tree == "/" else self._trees).append(tree)
        return descriptor

    def open_image_url(self, url: Url) -> Remote:
        """Open the image itself where it is a URL. The folder that it lies in is vouched for.

        Raises:
            ImageError: it cannot be opened.
        """
        remote = self._remotes.open(url)
        self._servers.add(url.directory)
        return remote

    def open_named_url(self, url: Url, *, named_by: str, role: str) -> Remote:
        """Open a URL that an image names: no server is asked anything for an image that the policy does not allow.

        Raises:
            GateRefused: the policy does not allow it.
            ImageError: it cannot be opened.
        """
        name = _Name(url.shown, url.shown, named_by, role)
        if "?" in url.text and url.words.keys() - {"socket"}:
            raise name.refused("a URL in an image has no options")  # they name local files, and users
        allowed = self._policy.covers_url(url)
        if not allowed:
            if self._guessed is not None:
                raise name.refused(self._why_guessed(), allowed_by=url.shown)
            if url.directory not in self._servers or url.climbs:
                raise name.refused("it lies outside the folders of the image's layers", allowed_by=url.shown)
        return self._remotes.open(url, confined=not allowed)

    def open_named_file(self, path: str, *, named_by: str, role: str) -> int:
        """Open what an image names; returns a descriptor. Everything that an image names comes through here.

        Args:
            path: absolute.
            named_by: the layer that names it, for messages.
            role: "backing file" or "data file", for messages.

        Raises:
            GateRefused: the policy does not allow it.
            SourceError: it is missing, unreadable, or neither a regular file nor a block device.
        """
        try:
            name = _Name(path, _resolve(path), named_by, role)
            self._judge_place(name)
            place = _open_without_links(name.resolved)
            try:
                self._judge_file(name, place)
                return _reopen(place)
            finally:
                os.close(place)
        except OSError as error:
            raise _Name(path, path, named_by, role).failed(_clearer(path, error)) from error

    def vouch_for_url(self, url: Url) -> None:
        """From now on what lies beside the layer at `url` may be named."""
        self._servers.add(url.directory)

    def vouch(self, descriptor: int) -> None:
        """From now on regular files beside the layer behind `descriptor` may be named."""
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            self._directories.append(_directory_of(descriptor))

    def distrust(self, layer: str) -> None:
        """The format of `layer` was guessed: its guest may have written what it names. Only the policy counts now."""
        self._guessed = self._guessed or layer

    def _why_guessed(self) -> str:
        layer = printable(self._guessed or "")
        return f"the format of {layer} was not recorded, so a guest may have written its names"

    def _judge_place(self, name: _Name) -> None:
        """Judge by the name alone, before anything there is touched."""
        if any(_is_below(name.resolved, directory) for directory in KERNEL_DIRECTORIES):
            raise name.refused("no file of the kernel's own is ever opened for an image")
        if self._covered(name):
            return
        directory = os.path.dirname(name.resolved)
        if _is_below(directory, DEVICES):
            raise name.refused("a block device needs to be allowed", allowed_by=name.path)
        if self._guessed is not None:
            raise name.refused(self._why_guessed(), allowed_by=directory)
        if directory not in self._directories and not any(_is_below(name.resolved, tree) for tree in self._trees):
            raise name.refused("it lies outside the directories of the image's layers", allowed_by=directory)

    def _covered(self, name: _Name) -> bool:
        """Tell whether a person's word allows the name.

        /dev/group/volume stays and leads to another /dev/dm-3 tomorrow, so the words of a person are about the former,
        where only root makes such links.
        """
        if self._policy.covers(name.resolved):
            return True
        plain = _is_below(name.path, DEVICES) and os.path.normpath(name.path) == name.path
        if not plain or not _is_below(name.resolved, DEVICES) or not self._policy.covers(name.path):
            return False
        directory = os.stat(os.path.dirname(name.path))
        return directory.st_uid == 0 and not directory.st_mode & (stat.S_IWGRP | stat.S_IWOTH)

    def _judge_file(self, name: _Name, place: int) -> None:
        """Judge by what is there, which is held but not open yet."""
        status = os.fstat(place)
        # A disk on a real device has a major number; only the others are worth a look into the table of mounts.
        if os.major(status.st_dev) == 0 and _file_system(place) in KERNEL_FILE_SYSTEMS:
            raise name.refused("no file of the kernel's own is ever opened for an image")
        if stat.S_ISBLK(status.st_mode) and not self._covered(name):
            raise name.refused("a block device needs to be allowed", allowed_by=name.path)


def _open_by_person(path: str) -> tuple[int, str]:
    """Return a descriptor, and the real directory that `path` names it in.

    The directory is resolved once: if it were looked up again later, somebody could have turned a link to another one.
    """
    head, tail = os.path.split(path)
    if not tail:
        head, tail = path or ".", path and "."  # a directory, or nothing at all: open(2) finds the words
    try:
        directory = os.open(head or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            place = os.open(tail, os.O_PATH | os.O_CLOEXEC, dir_fd=directory)
            try:
                return _reopen(place), _place_of(directory)
            finally:
                os.close(place)
        finally:
            os.close(directory)
    except OSError as error:
        raise SourceError.from_oserror(path, "cannot open", error) from error


def _resolve(path: str) -> str:
    """Follow all symbolic links; where they lead in a circle the result is not free of them, and cannot be opened."""
    try:
        return os.path.realpath(path)
    except RecursionError as error:  # a thousand links one after the other; the kernel gives up at 40
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error


def _clearer(path: str, error: OSError) -> OSError:
    """Return the system's own words about `path`: "too many links" where a walk without links met one of them."""
    if error.errno == errno.ENOTDIR:
        try:
            os.path.realpath(path, strict=True)
        except OSError as clearer:
            return clearer
    return error


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _directory_of(descriptor: int) -> str:
    return os.path.dirname(_place_of(descriptor))


def _place_of(descriptor: int) -> str:
    """Return where an open file really is, whatever the name that led to it leads to by now."""
    return os.readlink(f"/proc/self/fd/{descriptor}")


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


def _file_system(place: int) -> str:
    """Return the type of the mounted file system that an open file is on, "" if it is nowhere in the table."""
    with open(f"/proc/self/fdinfo/{place}", encoding="ascii") as facts:
        mount = next(line.split()[1] for line in facts if line.startswith("mnt_id:"))
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        line = next((line for line in table if line.split(" ", 1)[0] == mount), "")
    return line.partition(" - ")[2].partition(" ")[0]


def _reopen(place: int) -> int:
    """Open for reading what an O_PATH descriptor stands for, once it is known to be harmless to open."""
    status = os.fstat(place)
    _require_readable_kind(status.st_mode)
    # O_NONBLOCK: whatever it is, opening it must not wait.
    descriptor = os.open(f"/proc/self/fd/{place}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not os.path.samestat(status, os.fstat(descriptor)):  # a /proc that is not the kernel's, in some chroot
        os.close(descriptor)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
    os.set_blocking(descriptor, True)
    return descriptor


def _require_readable_kind(mode: int) -> None:
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return
    if stat.S_ISLNK(mode):  # only met where links lead in a circle
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFCHR: "a character device",
        stat.S_IFSOCK: "a socket",
    }
    kind = kinds.get(stat.S_IFMT(mode), "not a file")
    raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, f"{kind}, not a file or a block device")

"""Two ways to look at the same image, so that one suite tests both: the handlers without FUSE, and a real mount."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import trio

from qcowfs import snapshot
from qcowfs.chain import open_chain
from qcowfs.gate import Policy
from qcowfs.vfs.tree import ChainDisks, Tree
from tests.support.mounts import Mounted, mounted

Result = TypeVar("Result")


@dataclass(frozen=True)
class Status:
    """What both views tell of a file."""

    ino: int
    mode: int
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int
    mtime_ns: int
    ctime_ns: int
    atime_ns: int


class View(Protocol):
    """What a program can ask of a mount. Errors are OSErrors."""

    def names(self) -> set[str]: ...
    def status(self, name: str) -> Status: ...
    def read(self, name: str, offset: int, length: int) -> bytes: ...
    def link(self, name: str) -> str: ...
    def xattrs(self, name: str) -> dict[str, bytes]: ...
    def xattr(self, name: str, attribute: str) -> bytes: ...
    def space(self) -> dict[str, int]: ...
    def may(self, name: str, mode: int) -> bool: ...
    def writing_calls(self, name: str) -> dict[str, Callable[[], object]]: ...


class MountView:
    """A real mount, asked by system calls."""

    def __init__(self, mount: Mounted) -> None:
        self._root = mount.path

    def path(self, name: str) -> Path:
        return self._root / name

    def names(self) -> set[str]:
        return set(os.listdir(self._root))

    def status(self, name: str) -> Status:
        found = os.lstat(self._root / name)
        return Status(
            ino=found.st_ino,
            mode=found.st_mode,
            nlink=found.st_nlink,
            uid=found.st_uid,
            gid=found.st_gid,
            size=found.st_size,
            blocks=found.st_blocks,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
            atime_ns=found.st_atime_ns,
        )

    def read(self, name: str, offset: int, length: int) -> bytes:
        descriptor = os.open(self._root / name, os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def link(self, name: str) -> str:
        return os.readlink(self._root / name)

    def xattrs(self, name: str) -> dict[str, bytes]:
        path = self._root / name
        listed = os.listxattr(path, follow_symlinks=False)
        return {attribute.removeprefix("user.qcowfs."): os.getxattr(path, attribute) for attribute in listed}

    def xattr(self, name: str, attribute: str) -> bytes:
        return os.getxattr(self._root / name, attribute)

    def space(self) -> dict[str, int]:
        found = os.statvfs(self._root)
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_namemax")
        return {name: getattr(found, name) for name in names}

    def may(self, name: str, mode: int) -> bool:
        return os.access(self._root / name, mode)

    def writing_calls(self, name: str) -> dict[str, Callable[[], object]]:
        path, new = self._root / name, self._root / "new"
        flags = {"write": os.O_WRONLY, "read and write": os.O_RDWR, "append": os.O_WRONLY | os.O_APPEND}
        calls: dict[str, Callable[[], object]] = {
            f"open to {word}": lambda flag=flag: os.open(path, flag) for word, flag in flags.items()
        }
        return calls | {
            "create": lambda: os.open(new, os.O_CREAT | os.O_WRONLY),
            "truncate": lambda: os.truncate(path, 0),
            "chmod": lambda: os.chmod(path, 0o777),
            "chown": lambda: os.chown(path, os.getuid(), os.getgid()),
            "utime": lambda: os.utime(path),
            "mkdir": lambda: os.mkdir(new),
            "rmdir": lambda: os.rmdir(self._root / "latest.raw"),
            "unlink": lambda: os.unlink(path),
            "mknod": lambda: os.mknod(new, stat.S_IFIFO | 0o600),
            "symlink": lambda: os.symlink("x", new),
            "link": lambda: os.link(path, new),
            "rename": lambda: os.rename(path, new),
            "setxattr": lambda: os.setxattr(path, "user.x", b"y"),
            "removexattr": lambda: os.removexattr(path, "user.qcowfs.kind"),
        }


class HandlersView:
    """The handlers of fuse.py on a tree, without a kernel: the same calls with inode numbers."""

    def __init__(self, tree: Tree, occupied: int) -> None:
        from qcowfs._handles import Handles
        from qcowfs.fuse import Operations

        self._tree = tree
        self._handlers = Operations(tree, occupied, Handles())

    def _answer(self, handler: Callable[..., Coroutine[Any, Any, Result]], *arguments: object) -> Result:
        import pyfuse3

        async def asked() -> Result:
            return await handler(*arguments)

        try:
            return trio.run(asked)
        except pyfuse3.FUSEError as error:
            raise OSError(error.errno, os.strerror(error.errno)) from error

    def _number(self, name: str) -> int:
        entry = self._answer(self._handlers.lookup, 1, os.fsencode(name), None)
        if entry.st_ino == 0:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return entry.st_ino

    def names(self) -> set[str]:
        # readdir's replies need a request of the kernel's; the tree is what it iterates over.
        return {os.fsdecode(name) for name in self._tree.root.entries}

    def status(self, name: str) -> Status:
        found = self._answer(self._handlers.getattr, self._number(name), None)
        return Status(
            ino=found.st_ino,
            mode=found.st_mode,
            nlink=found.st_nlink,
            uid=found.st_uid,
            gid=found.st_gid,
            size=found.st_size,
            blocks=found.st_blocks,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
            atime_ns=found.st_atime_ns,
        )

    def read(self, name: str, offset: int, length: int) -> bytes:
        handle = self._answer(self._handlers.open, self._number(name), os.O_RDONLY, None).fh
        try:
            return self._answer(self._handlers.read, handle, offset, length)
        finally:
            self._answer(self._handlers.release, handle)

    def link(self, name: str) -> str:
        return os.fsdecode(self._answer(self._handlers.readlink, self._number(name), None))

    def xattrs(self, name: str) -> dict[str, bytes]:
        listed = self._answer(self._handlers.listxattr, self._number(name), None)
        return {
            os.fsdecode(attribute).removeprefix("user.qcowfs."): self.xattr(name, os.fsdecode(attribute))
            for attribute in listed
        }

    def xattr(self, name: str, attribute: str) -> bytes:
        return self._answer(self._handlers.getxattr, self._number(name), os.fsencode(attribute), None)

    def space(self) -> dict[str, int]:
        found = self._answer(self._handlers.statfs, None)
        names = ("f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree", "f_namemax")
        return {name: getattr(found, name) for name in names}

    def may(self, name: str, mode: int) -> bool:
        try:
            return self._answer(self._handlers.access, self._number(name), mode, None)
        except OSError:
            return False

    def writing_calls(self, name: str) -> dict[str, Callable[[], object]]:
        ask, do, ino = self._answer, self._handlers, self._number(name)
        return {
            "open to write": lambda: ask(do.open, ino, os.O_WRONLY, None),
            "open to read and write": lambda: ask(do.open, ino, os.O_RDWR, None),
            "create": lambda: ask(do.create, 1, b"new", 0o600, os.O_WRONLY, None),
            "setattr": lambda: ask(do.setattr, ino, None, None, None, None),
            "mkdir": lambda: ask(do.mkdir, 1, b"new", 0o700, None),
            "rmdir": lambda: ask(do.rmdir, 1, b"new", None),
            "unlink": lambda: ask(do.unlink, 1, os.fsencode(name), None),
            "mknod": lambda: ask(do.mknod, 1, b"new", stat.S_IFIFO, 0, None),
            "symlink": lambda: ask(do.symlink, 1, b"new", b"x", None),
            "link": lambda: ask(do.link, ino, 1, b"new", None),
            "rename": lambda: ask(do.rename, 1, os.fsencode(name), 1, b"new", 0, None),
            "write": lambda: ask(do.write, ino, 0, b"x"),
            "setxattr": lambda: ask(do.setxattr, ino, b"user.x", b"y", None),
            "removexattr": lambda: ask(do.removexattr, ino, b"user.qcowfs.kind", None),
        }


@contextmanager
def handlers_view(image: Path) -> Iterator[HandlersView]:
    """Open `image` and look at it through the handlers."""
    with open_chain(str(image), Policy()) as chain:
        tree = Tree(
            snapshot.points(chain), ChainDisks(chain), image=str(image), owner=(os.getuid(), os.getgid()), live=False
        )
        yield HandlersView(tree, sum(layer.disk_size for layer in chain.layers))


@contextmanager
def mount_view(image: Path, target: Path, *options: str) -> Iterator[MountView]:
    """Mount `image` and look at it through the kernel."""
    with mounted(image, target, *options) as mount:
        yield MountView(mount)

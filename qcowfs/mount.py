"""The session of one mount: what is checked before it, FUSE's start, readiness, signals, the end.

Used by cli/mount.py. A session runs in the main thread of its process: trio there, worker threads for calls that may
block on this very mount, and the threads of the data plane between the FUSE device and pyfuse3. Importable without
pyfuse3, so that its absence is a message and not a traceback.
"""

from __future__ import annotations

import errno
import gc
import importlib
import logging
import os
import signal
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from qcowfs import libfuse, mountpoint
from qcowfs.errors import FuseUnavailable, MountpointError, QcowfsError
from qcowfs.kernelcache import KernelCache
from qcowfs.vfs.tree import Tree
from qcowfs.watcher import Watcher

if TYPE_CHECKING:
    import trio

    from qcowfs._dataplane import DataPlane
    from qcowfs._handles import Handles
    from qcowfs.follow import Follower
    from qcowfs.mountoptions import MountOptions

__all__ = ["Session", "check_fuse", "notify_systemd"]

FUSE_DEVICE = "/dev/fuse"
FUSE_DEVICE_NUMBER = os.makedev(10, 229)  # Linux, Documentation/admin-guide/devices.txt
FUSE_CONFIGURATION = "/etc/fuse.conf"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SIGNALS = (*STOP_SIGNALS, signal.SIGHUP)
READ_AHEAD_KIB = 1024  # of the mount, if root mounts: two of the largest READs; the kernel's default is 128
MAX_WORKERS = 16  # of the data plane; each has a buffer of 512 KiB at most
MAX_WAITING_WORKERS = 96  # the same where they may wait for servers, which takes no processor
MAX_HELPERS = 3  # that decompress ahead: so many cores one reader can keep busy
MAX_TASKS = 99  # requests that pyfuse3 has under way at once, as it has by itself; all but a few wait for something
RETIRE_SECONDS = 30.0  # between two looks at which workers of trees are idle
HANGUP_SECONDS = 1.0  # from a shell's SIGHUP to the end of its terminal
GRACE = 0.5  # seconds that a mount nobody uses takes at most to go away

logger = logging.getLogger("qcowfs.mount")


def check_fuse(options: MountOptions) -> None:
    """Check that this person can make FUSE mounts here, with these options.

    Raises:
        FuseUnavailable: not, and why.
    """
    try:
        importlib.import_module("pyfuse3")
    except ImportError as error:
        hint = "install pyfuse3 and libfuse3; list, info and map work without them"
        raise FuseUnavailable(f"pyfuse3 cannot be imported: {error}", hint=hint) from error
    _require_device()
    if os.geteuid() != 0 and mountpoint.fusermount() is None:
        raise FuseUnavailable(f"{mountpoint.FUSERMOUNT}: not found", hint="it is in the package fuse3")
    if os.geteuid() != 0 and (options.allow_other or options.allow_root) and not _others_allowed():
        word = "allow_other" if options.allow_other else "allow_root"
        hint = f"root can allow it with the line 'user_allow_other' in {FUSE_CONFIGURATION}"
        raise FuseUnavailable(f"{word}: not allowed to ordinary users on this machine", hint=hint)


def _require_device() -> None:
    hint = "'modprobe fuse' may help; a container needs '--device /dev/fuse'"
    try:
        status = os.stat(FUSE_DEVICE)
    except OSError as error:
        raise FuseUnavailable(f"{FUSE_DEVICE}: {error.strerror}", hint=hint) from error
    if not stat.S_ISCHR(status.st_mode) or status.st_rdev != FUSE_DEVICE_NUMBER:
        raise FuseUnavailable(f"{FUSE_DEVICE}: not the FUSE device", hint=hint)
    if not os.access(FUSE_DEVICE, os.R_OK | os.W_OK):
        raise FuseUnavailable(f"{FUSE_DEVICE}: no permission to use it", hint="it usually has mode 0666")


def _others_allowed() -> bool:
    """Tell whether fuse.conf lets ordinary users say allow_other; if it cannot be read, fusermount3 shall decide."""
    try:
        with open(FUSE_CONFIGURATION, encoding="utf-8", errors="replace") as lines:
            return any(line.strip() == "user_allow_other" for line in lines)
    except FileNotFoundError:
        return False
    except OSError:
        return True


class Session:
    """One mount, from pyfuse3.init() to the end.

    Args:
        tree: what to show.
        image: absolute path of the image; findmnt shows it as the source.
        directory: real path of a directory that `mountpoint.check` found right.
        options: allow_other, allow_root, auto_unmount and no_data_plane are used here.
        occupied: bytes that the chain takes on the host, for statfs.
        obey_hangup: SIGHUP is an order to stop if there was a terminal, and it is gone (a foreground process).
        follower: keeps the tree up to date; None: it stays as it is.
        remote: reads may wait for servers.
    """

    def __init__(
        self,
        tree: Tree,
        image: str,
        directory: str,
        options: MountOptions,
        *,
        occupied: int = 0,
        obey_hangup: bool = False,
        follower: Follower | None = None,
        remote: bool = False,
    ) -> None:
        self._tree = tree
        self._image = image
        self._directory = directory
        self._options = options
        self._occupied = occupied
        self._follower = follower
        self._remote = remote
        self._kernel_cache: KernelCache | None = None
        # Of this process; None: it has none, or does not care.
        self._terminal = next((number for number in range(3) if obey_hangup and os.isatty(number)), None)
        self._device: str | None = None  # "major:minor" of the mount
        self._watcher: Watcher | None = None  # of -o auto_unmount
        self._plane: DataPlane | None = None
        self._ready = False  # the mount answered, and somebody was told
        self._gone = False  # the mount is not in the tree any more, or not ours to take out
        self._stopping = False  # a signal came
        self._forced_by = 0  # the second signal

    def reload(self) -> None:
        """Look what has happened to the images, and show it; soon. Any thread."""
        if self._follower is not None:
            self._follower.ask()

    def serve(self, ready: Callable[[], None]) -> int:
        """Mount, answer until unmounted, and return an exit code: 0, or 128 + N if a second signal N forced the end.

        Args:
            ready: called once, when the mount answers.

        Raises:
            FuseUnavailable, MountpointError: FUSE refused; nothing is mounted.
        """
        import pyfuse3
        import trio

        # A signal between init() and the receiver in _main would kill the process and leave a dead mount.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        self._start()
        # A crash leaves the mount dead (docs/decisions/0005-dead-mounts.md); one that never was ready leaves nothing.
        unmount = False
        gc.freeze()  # what was imported stays
        gc.enable()
        try:
            trio.run(self._main, ready)
            unmount = not self._gone
        finally:
            if self._plane is not None:
                self._plane.stop()
            if self._kernel_cache is not None:
                self._kernel_cache.close()
            pyfuse3.close(unmount=unmount or not self._ready)
        if self._watcher is not None:
            self._watcher.dismiss()
        return 128 + self._forced_by if self._forced_by else 0

    def _start(self) -> None:
        import pyfuse3

        from qcowfs._handles import Handles
        from qcowfs.fuse import Operations

        handles = Handles()
        others = _fuse_descriptors()
        with libfuse.standard_error_captured() as said:
            try:
                pyfuse3.init(Operations(self._tree, self._occupied, handles), self._directory, self._fuse_options())
            except RuntimeError as error:
                raise libfuse.refusal(self._directory, said()) from error
        try:
            self._start_helpers(handles, others)
        except BaseException:
            pyfuse3.close(unmount=True)  # nobody would ever answer it
            raise

    def _start_helpers(self, handles: Handles, others: set[int]) -> None:
        """Start what stands beside a mount that is there, and has not been asked anything yet."""
        mount = mountpoint.uppermost(self._directory)
        self._device = mount.device if mount else None
        if self._options.auto_unmount and self._device is not None:
            self._watcher = Watcher(self._directory, self._device)
        (descriptor,) = _fuse_descriptors() - others  # these were FUSE devices before there was this one
        if self._follower is not None:
            self._kernel_cache = KernelCache(os.dup(descriptor))
        if not self._options.no_data_plane:
            self._start_plane(handles, descriptor)

    def _start_plane(self, handles: Handles, descriptor: int) -> None:
        """Put the data plane between the device and pyfuse3."""
        from qcowfs._dataplane import DataPlane

        cores = len(os.sched_getaffinity(0))
        workers, helpers = min(2 * cores, MAX_WORKERS), min(cores - 1, MAX_HELPERS)
        plane = DataPlane(
            descriptor,
            handles,
            self._tree.guests.nodes,
            workers=MAX_WAITING_WORKERS if self._remote else workers,
            helpers=helpers,
            interruptible=self._remote,
        )
        try:
            plane.start()
        except (OSError, MemoryError) as error:
            raise FuseUnavailable(f"no threads for the data plane: {_reason(error)}") from error
        self._plane = plane

    def _fuse_options(self) -> set[str]:
        """Return libfuse's options. Without allow_other nobody else gets in, so the kernel need not check modes."""
        options = {"ro", "subtype=qcowfs", libfuse.LibfuseOption(f"fsname={libfuse.escaped(self._image)}")}
        for word in ("allow_other", "allow_root"):
            if getattr(self._options, word):
                options |= {word, "default_permissions"}
        return options

    async def _main(self, ready: Callable[[], None]) -> None:
        import trio

        with trio.open_signal_receiver(*SIGNALS) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._announce, ready)
                nursery.start_soon(self._obey, signals, nursery)
                nursery.start_soon(self._retire)
                if self._follower is not None and self._kernel_cache is not None:
                    self._tree.hear_of_stale(self._follower.hint)
                    nursery.start_soon(self._follower.run, self._kernel_cache.forget)
                if self._plane is not None:
                    nursery.start_soon(self._wait_for_the_end, self._plane)
                await self._answer()
                nursery.cancel_scope.cancel()

    async def _answer(self) -> None:
        """Answer requests until the mount is gone."""
        import pyfuse3

        try:
            # What one task waits for (a slow tree, a count of st_blocks) must not hold up the others. As many tasks may
            # be idle as there are at most: with less, pyfuse3 starts and ends one for almost every request (without
            # the data plane, 4 KiB random reads, 4 jobs: 8 k IOPS instead of 14 k, and 11 k with a single task).
            await pyfuse3.main(min_tasks=MAX_TASKS, max_tasks=MAX_TASKS)
        except* OSError as errors:
            # Somebody aborted the connection through /sys/fs/fuse/connections; the data plane takes that as an end.
            if errors.split(_is_abort)[1] is not None:
                raise

    async def _retire(self) -> None:
        """End the trees' workers that nobody needs."""
        import trio

        while True:
            await trio.sleep(RETIRE_SECONDS)
            await trio.to_thread.run_sync(self._tree.guests.retire)

    async def _wait_for_the_end(self, plane: DataPlane) -> None:
        """End pyfuse3's loop when the data plane finds the mount gone; with it there, pyfuse3 cannot see that."""
        import pyfuse3
        import trio

        await trio.lowlevel.wait_readable(plane.fileno())
        await self._break_off()  # its tasks may be waiting, too
        pyfuse3.terminate()

    async def _announce(self, ready: Callable[[], None]) -> None:
        """Say ready when the mount has answered: FUSE's start is only over then."""
        import trio

        await trio.to_thread.run_sync(os.statvfs, self._directory, abandon_on_cancel=True)
        if self._device is not None:
            _read_ahead(self._device)
        ready()
        self._ready = True

    async def _obey(self, signals: AsyncIterator[int], nursery: trio.Nursery) -> None:
        import pyfuse3

        async for number in signals:
            if number == signal.SIGHUP and not self._hung_up():
                self.reload()
                nursery.start_soon(self._look_at_terminal)
                continue
            if self._stopping:
                self._forced_by = number
                pyfuse3.terminate()
                await self._break_off()
                return
            self._stopping = True
            nursery.start_soon(self._stop)

    async def _break_off(self) -> None:
        """Let reads fail that wait for a server: nobody is there any more who wants them, or nobody is to wait."""
        import trio

        if self._follower is not None:
            await trio.to_thread.run_sync(self._follower.break_off, abandon_on_cancel=True)

    def _hung_up(self) -> bool:
        return self._terminal is not None and not os.isatty(self._terminal)

    async def _look_at_terminal(self) -> None:
        """A shell may say SIGHUP just before the terminal goes."""
        import trio

        await trio.sleep(HANGUP_SECONDS)
        if self._hung_up() and not self._stopping:
            os.kill(os.getpid(), signal.SIGHUP)

    async def _stop(self) -> None:
        """Take the mount out of the tree; main() ends when the last file in it is closed, which is mostly now."""
        import pyfuse3
        import trio

        notify_systemd("STOPPING=1")
        try:
            await trio.to_thread.run_sync(self._detach, abandon_on_cancel=True)
        except (OSError, QcowfsError) as error:
            logger.warning("%s: cannot be unmounted now: %s", self._directory, error)
            pyfuse3.terminate()
            return
        await trio.sleep(GRACE)
        logger.warning("%s: unmounted, but files in it are still open; a second signal closes them", self._directory)

    def _detach(self) -> None:
        """Take the mount out of the tree, wherever it was moved; but never one that lies over it."""
        path = next((mount.path for mount in mountpoint.mounts() if mount.device == self._device), None)
        uppermost = mountpoint.uppermost(path) if path else None
        if path and uppermost and uppermost.device == self._device:
            mountpoint.unmount(path, lazy=True)
            self._gone = True
            return
        self._gone = True  # before the error: what is mounted there now must be left alone
        raise MountpointError(self._directory, "it is mounted no more, or something is mounted over it")


def _fuse_descriptors() -> set[int]:
    """Return the descriptors of this process that are FUSE devices; pyfuse3 does not tell which one it has."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists them is closed by now
            status = os.fstat(int(name))
            if stat.S_ISCHR(status.st_mode) and status.st_rdev == FUSE_DEVICE_NUMBER:
                found.add(int(name))
    return found


def _reason(error: OSError | MemoryError) -> str:
    return os.strerror(error.errno or errno.EIO) if isinstance(error, OSError) else os.strerror(errno.ENOMEM)


def _is_abort(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno == errno.ECONNABORTED


def _read_ahead(device: str) -> None:
    """Let the kernel read further ahead; only root may, and only where /sys is writable."""
    with suppress(OSError), open(f"/sys/class/bdi/{device}/read_ahead_kb", "w", encoding="ascii") as setting:
        setting.write(str(READ_AHEAD_KIB))


def notify_systemd(state: str) -> None:
    """Tell the service manager `state` (sd_notify(3)), if there is one that listens."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
        manager.connect(address)
        manager.sendall(state.encode())

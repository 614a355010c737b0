"""`qcowfs umount`: unmount, wait until the daemon has let go of the images, and say who is in the way.

Works without pyfuse3, and on a mount whose daemon is dead.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import select
import time
from contextlib import suppress

import qcowfs.cli
from qcowfs import mountpoint
from qcowfs.errors import MountpointError, QcowfsError, printable
from qcowfs.mountpoint import Mount

HELP = "unmount, and wait until the image is free"

DAEMON_TIMEOUT = 30.0  # seconds that an unmounted daemon may take to end
# The kernel frees the loop device of an unmounted file system a moment after umount(8) has returned.
BUSY_GRACE = 1.0  # seconds
BUSY_INTERVAL = 0.05  # seconds

logger = logging.getLogger("qcowfs.mount")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs umount`."""
    parser.add_argument("mountpoints", metavar="MOUNTPOINT", nargs="+", help="where qcowfs has mounted an image")
    parser.add_argument("-l", "--lazy", action="store_true", help="take a busy mount out of the tree now; do not wait")


def run(args: argparse.Namespace) -> int:
    """Unmount each mount point; the exit code is that of the first that failed."""
    code = 0
    for path in args.mountpoints:
        try:
            _unmount(path, lazy=args.lazy)
        except QcowfsError as error:
            qcowfs.cli.report(error)
            code = code or error.exit_code
    return code


def _unmount(path: str, *, lazy: bool) -> None:
    mount = _required_mount(path)
    # A lazy unmount is for mounts that are busy or stuck: it must not wait for an answer of the daemon's.
    daemon = None if lazy else _daemon(mount)
    try:
        _release(path, mount, lazy=lazy)
        elsewhere = next((other.path for other in mountpoint.mounts() if other.device == mount.device), None)
        if elsewhere is not None:  # a bind mount: the daemon goes on for it
            logger.warning("%s: unmounted, but still mounted on %s", printable(path), printable(elsewhere))
        elif daemon is not None and not select.select([daemon], [], [], DAEMON_TIMEOUT)[0]:
            what = f"unmounted, but its daemon still holds the image after {DAEMON_TIMEOUT:.0f} seconds"
            raise MountpointError(path, what, hint="another mount namespace may still have the mount")
    finally:
        if daemon is not None:
            os.close(daemon)


def _required_mount(path: str) -> Mount:
    mount = mountpoint.find(path)
    if mount is None:
        raise MountpointError(path, "not mounted" if os.path.lexists(path) else os.strerror(errno.ENOENT))
    if mount.type != mountpoint.TYPE:
        raise MountpointError(path, f"not a mount of qcowfs (type {mount.type})")
    return mount


def _daemon(mount: Mount) -> int | None:
    """Return a pidfd of the daemon of `mount`; None if it is dead, or hidden (another user's, another container's)."""
    with suppress(OSError, ValueError):
        return os.pidfd_open(int(os.getxattr(mount.path, "user.qcowfs.pid")))
    return None


def _release(path: str, mount: Mount, *, lazy: bool) -> None:
    deadline = time.monotonic() + BUSY_GRACE
    while True:
        try:
            return mountpoint.unmount(mount.path, lazy=lazy)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise MountpointError(path, f"cannot be unmounted: {error.strerror}") from error
            if time.monotonic() > deadline:
                hint = "-l takes it out of the tree all the same"
                raise MountpointError(path, _busy(mount), hint=hint) from error
        time.sleep(BUSY_INTERVAL)


def _busy(mount: Mount) -> str:
    found = mountpoint.holders(mount)
    named = ", ".join(found[: mountpoint.MAX_HOLDERS])
    more = f" and {len(found) - mountpoint.MAX_HOLDERS} more" if len(found) > mountpoint.MAX_HOLDERS else ""
    return f"busy: in use by {named}{more}" if found else "busy: in use by somebody whom this user may not see"

"""The one order that is given to a machine: put what the guest writes from now on into a new image, an overlay.

Used by `qcowfs snapshot`. QEMU makes the file, as its own user; nothing is written here.
"""

from __future__ import annotations

import os
import secrets

from qcowfs.errors import UsageError, printable
from qcowfs.qmp.devices import Device
from qcowfs.qmp.files import DeviceFiles
from qcowfs.qmp.monitor import Monitor

__all__ = ["FORMAT", "check_overlay", "make_overlay"]

FORMAT = "qcow2"  # no other that qcowfs reads records the format of its backing file


def check_overlay(files: DeviceFiles, path: str) -> None:
    """See that a new image may be made at `path`, absolute, on top of the chain `files`.

    Raises:
        UsageError: there is a file, or the chain would not be found again from there.
    """
    if not _is_text(path):
        raise UsageError(f"{printable(path)}: QMP can say only names that are UTF-8")
    if os.path.lexists(path):
        raise UsageError(f"{printable(path)}: there is such a file already, and it is not overwritten")
    directory, name = os.path.split(path)
    if not name or not os.path.isdir(directory):
        raise UsageError(f"{printable(path)}: there is no directory {printable(directory)}")
    if files.device.read_only:
        raise UsageError(f"{printable(files.device.word)}: QEMU has it open for reading only: nothing will change")
    if files.device.filter:  # QEMU would record it, as a json: name that qcowfs does not open
        what = f"a filter, {printable(files.device.filter)}, lies on top of the image of {printable(files.device.word)}"
        raise UsageError(what, hint="DEVICE can be the node of the image below it, as query-named-block-nodes has it")
    recorded = files.device.images[0].name
    if recorded.startswith(("/", "json:")) or _same_file(os.path.join(directory, recorded), files.path):
        return
    # QEMU records its own name for the image that is on top now, and a relative one begins at the overlay's directory.
    why = f"QEMU calls the image {printable(recorded)}, which would lead nowhere from {printable(directory)}"
    hint = f"the place for it is {printable(_directory_for(recorded, files.path))}"
    raise UsageError(f"{printable(path)}: {why}", hint=hint)


def make_overlay(monitor: Monitor, device: Device, path: str) -> str:
    """Let QEMU make the image `path` on top of what `device` has now, and write to it from now on.

    Returns the name of the overlay's node.

    Raises:
        MonitorError: QEMU refuses; the machine runs on as before.
    """
    # A device that -blockdev made has no name of its own, and then the new node must get one.
    node = f"qcowfs-{secrets.token_hex(6)}"
    chosen = {"device": device.name} if device.name else {"node_name": device.node}
    arguments = {"snapshot_file": path, "snapshot_node_name": node, "format": FORMAT, "mode": "absolute-paths"}
    monitor.execute("blockdev-snapshot-sync", **chosen, **arguments)
    return node


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:  # bytes that are not UTF-8, as os.fsdecode keeps them
        return False
    return True


def _same_file(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False


def _directory_for(recorded: str, path: str) -> str:
    return path.removesuffix(recorded).rstrip("/") or "/"

"""A running machine on the command line: --qmp, its table of devices, and a device's chain in place of IMAGE.

Used by the other files of this room.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from qcowfs.chain import Chain, open_chain, shown_name
from qcowfs.cli import output
from qcowfs.cli.options import remotes_of
from qcowfs.errors import UsageError, printable
from qcowfs.gate import load_policy
from qcowfs.qmp.address import Address, parse_address
from qcowfs.qmp.agent import frozen
from qcowfs.qmp.devices import Device, devices, find_device
from qcowfs.qmp.files import DeviceFiles, locate, require_same
from qcowfs.qmp.follower import DeviceFollower
from qcowfs.qmp.monitor import Monitor
from qcowfs.qmp.overlay import check_overlay, make_overlay
from qcowfs.source.url import is_url

__all__ = ["DeviceFollower", "chain_document", "print_chain", "reopener", "take_device", "take_snapshot"]

DEVICES = ("DEVICE", "NODE", "FORMAT", "VIRTUAL SIZE", "IMAGES", "FILE")
CHAIN = ("DEPTH", "FORMAT", "SNAPSHOTS", "FILE")


def take_device(args: argparse.Namespace) -> DeviceFiles | None:
    """Put the chain of the device that `--qmp` names into `args`, as if a person had named its image.

    Returns the chain. None if no device is named: then the table of devices was printed.

    Raises:
        QcowfsError: there is no such device, or no image of it here.
    """
    address, word = parse_address(args.qmp, device=True)
    with Monitor(address) as monitor:
        if word is None:
            _print_devices(devices(monitor))
            return None
        files = _files(monitor, word)
    args.image, args.image_format, args.written = files.path, files.format, not files.device.read_only
    args.allow_backing = [*args.allow_backing, *files.vouched, *(url.text for url in files.vouched_urls)]
    return files


def reopener(args: argparse.Namespace, device: DeviceFollower) -> Callable[[], Chain]:
    """Return what opens the chain that `device` has by then, without locks."""
    policy = load_policy(args.allow_backing)

    def reopen() -> Chain:
        files = device.files
        urls = (*policy.allow_urls, *files.vouched_urls)
        allowed = replace(policy, allow=(*policy.allow, *files.vouched), allow_urls=urls)
        # When it has ended, the locks of files tell who writes them then. Of servers nobody would tell.
        written = not files.device.read_only and (is_url(files.path) or not device.ended)
        opened = open_chain(
            files.path,
            allowed,
            lock=False,
            image_format=files.format,
            remotes=remotes_of(args),
            written=written,
        )
        try:
            require_same(files, opened)
        except BaseException:
            opened.close()
            raise
        return opened

    return reopen


def take_snapshot(address: Address, word: str, path: str, agent: Address | None) -> DeviceFiles:
    """Put an overlay at `path`, absolute, on the device that `word` means; return its chain of then.

    Args:
        agent: of the guest that is to be quiesced meanwhile, None: it is not.

    Raises:
        QcowfsError: there is no such device, `path` exists, QEMU refuses, or the guest cannot be quiesced: then nothing
            was done.
    """
    with Monitor(address) as monitor:
        before = _files(monitor, word)
        check_overlay(before, path)
        with frozen(agent) if agent is not None else nullcontext():
            node = make_overlay(monitor, before.device, path)
        return _files(monitor, before.device.name or before.device.id or node)


def _files(monitor: Monitor, word: str) -> DeviceFiles:
    return locate(monitor.address, find_device(monitor, word), monitor.process)


def _print_devices(found: Sequence[Device]) -> None:
    """Print a table: what to call each device by, and the image on top of its chain."""
    output.print_table(DEVICES, [_row(device) for device in found], right=(3, 4))


def print_chain(files: DeviceFiles) -> None:
    """Print a table of the images of a chain, from the one that is written to the base."""
    rows = [
        [str(depth), printable(image.format), str(len(image.snapshots)), printable(_shown(image.name))]
        for depth, image in enumerate(files.device.images)
    ]
    output.print_table(CHAIN, rows, right=(0, 2))


def chain_document(files: DeviceFiles) -> dict[str, Any]:
    """Return the document of `snapshot --json`; its keys are a contract (qcowfs-snapshot(1))."""
    return {
        "version": 1,
        "device": files.device.word,
        "node": files.device.node,
        "chain": [
            {
                "depth": depth,
                "file": image.name,
                "format": image.format,
                "virtual_size": image.virtual_size,
                "snapshots": [name for _, name, _ in image.snapshots],
            }
            for depth, image in enumerate(files.device.images)
        ],
    }


def _shown(name: str) -> str:
    """Return QEMU's name for an image without a URL's secrets."""
    try:
        return shown_name(name)
    except UsageError:
        return name


def _row(device: Device) -> list[str]:
    top = device.images[0]
    return [
        printable(device.word),
        printable(device.node),
        printable(top.format),
        output.human_size(top.virtual_size),
        str(len(device.images)),
        printable(_shown(top.name)),
    ]

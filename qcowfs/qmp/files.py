"""The files of a device's chain: where QEMU's names for them lead here, and whether QEMU really has them open.

Used by the command line and by follower. QEMU has file names of its own: relative to its own directory, perhaps in a
mount namespace of its own. The kernel knows better: /proc tells which files the process at the other end of the socket
holds. So a name is believed only as far as the kernel bears it out; docs/decisions/0015-qmp.md has the reasons.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from dataclasses import dataclass

from qcowfs import filename, jsonname
from qcowfs.chain import FORMATS, Chain
from qcowfs.errors import ImageError, MonitorError, UnsupportedImage, printable
from qcowfs.filename import LOCAL_PROTOCOLS
from qcowfs.qmp.address import Address
from qcowfs.qmp.devices import Device, Image
from qcowfs.source.url import Url

__all__ = ["DeviceFiles", "locate", "require_same"]

Identity = tuple[int, int]

JSON = "json:"
FD_SETS = "/dev/fdset/"
UNKNOWN_BYTES = ("offset", "size")  # options of the raw driver: the disk is not the file


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFiles:
    """Where a device's chain lies.

    Attributes:
        address: of the monitor that told it.
        device: what it told.
        path: of the image on top, absolute; its URL where QEMU has it from a server.
        format: of it, one of FORMATS.
        process: the monitor's, None if nobody can tell.
        identities: of the file of each image, None where QEMU's name for it leads nowhere.
        vouched: real paths of the files of the chain that QEMU has open, as the kernel says: images may name them.
        vouched_urls: the images of the chain that QEMU has from servers, by QEMU's own word; nobody else can tell.
    """

    address: Address
    device: Device
    process: int | None
    path: str
    format: str
    identities: tuple[Identity | None, ...]
    vouched: tuple[str, ...]
    vouched_urls: tuple[Url, ...] = ()


def locate(address: Address, device: Device, process: int | None) -> DeviceFiles:
    """Return where the chain of `device` lies.

    Args:
        process: that the monitor belongs to, None if nobody can tell.

    Raises:
        MonitorError: its name leads to no file here, or to another one than QEMU has open.
        UnsupportedImage: QEMU reads it by a format, or from a place, that qcowfs does not know.
    """
    top, held = device.images[0], _held_by(process)
    if top.format not in FORMATS:
        why = f"QEMU reads it as {printable(top.format)}; {', '.join(FORMATS)} are supported"
        raise UnsupportedImage(top.name, f"the image of {printable(device.word)}", why)
    url = _url(top)
    path = url.text if url else _place(address, top, process)
    places = [_found(address, image, process) for image in device.images]
    identities = [place and place[1] for place in places]
    if url is None:
        # What was looked at is what has to be opened then (require_same): QEMU may put another file there meanwhile.
        identities[0] = _held_identity(address, path, held)
    return DeviceFiles(
        address=address,
        device=device,
        process=process,
        path=path,
        format=top.format,
        identities=tuple(identities),
        vouched=tuple(place[0] for place in places if place and held is not None and place[1] in held),
        vouched_urls=tuple(found for image in device.images if (found := _url(image))),
    )


def _url(image: Image) -> Url | None:
    """Return where an image is on a server; None if it is on none that qcowfs knows."""
    try:
        said = filename.parse(os.fsencode(image.name), image.name)
    except ImageError:
        return None
    return said.url if not said.offset and said.size is None else None


def _found(address: Address, image: Image, process: int | None) -> tuple[str, Identity] | None:
    """Return the real path and the identity of an image's file; None where its name leads nowhere."""
    with suppress(MonitorError, UnsupportedImage, OSError):
        path = os.path.realpath(_place(address, image, process))
        return path, _identity(os.stat(path))
    return None


def require_same(files: DeviceFiles, chain: Chain) -> None:
    """See that the chain that was opened, by what its headers say, is the one that QEMU reads.

    Raises:
        MonitorError: it is not: it was put together on QEMU's command line, or is changing just now.
    """
    images, layers = files.device.images, chain.layers
    what = f"{len(images)} images, not {len(layers)}" if len(images) != len(layers) else None
    for image, identity, layer in zip(images, files.identities, layers, strict=False):
        if what is None and (image.format != layer.format or identity not in (None, layer.file_id)):
            what = f"{printable(image.name)} ({printable(image.format)}), not {printable(layer.path)} ({layer.format})"
    if what is not None:
        told = f"QEMU has another chain for {printable(files.device.word)} than the headers of the images say: {what}"
        hint = "a job may be changing it just now, or it was put together on QEMU's command line"
        raise MonitorError(files.address.shown, told, hint=hint)


def _place(address: Address, image: Image, process: int | None) -> str:
    """Return the absolute path that QEMU's name for `image` means here."""
    name = _plain(image)
    if name.startswith(FD_SETS):
        told = f"QEMU was given {printable(name)}, an open file without a name"
        raise MonitorError(address.shown, told, hint="who started QEMU knows the file; mount that")
    if name.startswith("/"):
        return name
    try:
        directory = os.readlink(f"/proc/{process}/cwd") if process is not None else None
    except OSError:
        directory = None
    if directory is None:
        told = f"QEMU's name for the image is {printable(name)}, and where that begins cannot be told from here"
        raise MonitorError(address.shown, told, hint="start QEMU with absolute names, or ask as its user or as root")
    return os.path.join(directory, name)


def _plain(image: Image) -> str:
    """Return the path in QEMU's name for `image`."""
    name = image.name
    if name.startswith(JSON):
        return _from_json(image)
    before, colon, rest = name.partition(":")
    if not colon or "/" in before:
        return name
    if before not in LOCAL_PROTOCOLS:
        raise UnsupportedImage(name, "the image of a running machine", f"it is no file here ({printable(before)})")
    return rest


def _from_json(image: Image) -> str:
    """Return the path in a json: name. QEMU writes one if options differ from the usual; few of them change bytes."""
    try:
        options = jsonname.parse(image.name[len(JSON) :].encode())
    except (ValueError, RecursionError) as error:
        raise UnsupportedImage(image.name, "QEMU's name for the image", printable(str(error))) from error
    prefix = "" if options.get("driver") in LOCAL_PROTOCOLS else "file."
    path, driver = options.get(f"{prefix}filename"), options.get(f"{prefix}driver", "file")
    if driver not in LOCAL_PROTOCOLS or not isinstance(path, str) or not path:
        raise UnsupportedImage(image.name, "QEMU's name for the image", "it is no file here")
    if image.format == "raw" and any(word in options for word in UNKNOWN_BYTES):
        raise UnsupportedImage(image.name, "QEMU's name for the image", "a window of a file is not supported")
    return path


def _held_by(process: int | None) -> frozenset[Identity] | None:
    """Return which files a process has open for reading, None where that is not ours to see."""
    if process is None:
        return None
    directory = f"/proc/{process}/fd"
    found: set[Identity] = set()
    try:
        for name in os.listdir(directory):
            with suppress(FileNotFoundError):  # closed meanwhile
                status = os.stat(f"{directory}/{name}")
                if _can_be_read(f"/proc/{process}/fdinfo/{name}", status.st_ino):
                    found.add(_identity(status))
    except OSError:
        return None
    return frozenset(found)


def _can_be_read(facts: str, ino: int) -> bool:
    """Tell whether a descriptor is one that its process reads from.

    With O_PATH a process has files open that it may not read. The inode number says that the descriptor still is the
    one that was looked at; Linux before 5.14 does not tell it.
    """
    with open(facts, encoding="ascii") as lines:
        told = dict(line.split(":", 1) for line in lines if ":" in line)
    flags = int(told["flags"], 8)
    return not flags & os.O_PATH and flags & os.O_ACCMODE != os.O_WRONLY and int(told.get("ino", ino)) == ino


def _identity(status: os.stat_result) -> Identity:
    """Return what is equal for two names of one file, as Layer.file_id has it."""
    return (-1, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)


def _held_identity(address: Address, path: str, held: frozenset[Identity] | None) -> Identity:
    """Return what `path` is; see that QEMU has it open, where that can be seen: then its name for it is right."""
    try:
        identity = _identity(os.stat(path))
    except OSError as error:
        told = f"QEMU's name for the image leads nowhere here: {printable(path)}: {error.strerror}"
        raise MonitorError(address.shown, told, hint="QEMU may live in a container, or in a mount namespace") from error
    if held is not None and identity not in held:
        told = f"QEMU's name for the image leads to another file here: {printable(path)} is not what it has open"
        raise MonitorError(address.shown, told, hint="QEMU may live in a container, or the file was replaced")
    return identity

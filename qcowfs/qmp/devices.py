"""What a monitor tells of a machine's disks: its devices, and the images that each of them is a chain of.

Used by the command line and by follower. The words are those of QEMU's QMP reference (query-block: BlockInfo, and
ImageInfo in it; query-named-block-nodes: BlockDeviceInfo). An answer is checked before it is used: who knows
what listens at that socket.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qcowfs import limits
from qcowfs.errors import MonitorError, UsageError, printable
from qcowfs.qmp.monitor import Monitor

__all__ = ["Device", "Image", "devices", "find_device"]

# Nodes that QEMU puts between a device and its image: throttling, the jobs, and what tests use. They hold no bytes.
FILTERS = frozenset(
    (
        *("backup-top", "blkdebug", "blklogwrites", "blkreplay", "blkverify", "commit_top", "compress"),
        *("copy-before-write", "copy-on-read", "mirror_top", "preallocate", "throttle"),
    )
)
# A disk that is attached without any format: its bytes as they are.
PROTOCOLS = {"file": "raw", "host_device": "raw"}
BACKENDS = ("/virtio-backend",)  # what QEMU appends to the device that a person has named, in its object tree
MAX_HINTED = 20  # devices that a hint lists
USER_DEVICES = "/machine/peripheral/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """One image of a chain.

    Attributes:
        name: as QEMU was given it: a path that is relative to QEMU's own directory or not, a URL, or json:{...}.
        format: the driver by which QEMU reads it.
        virtual_size: bytes.
        snapshots: (id, name, date in seconds) of its internal ones.
    """

    name: str
    format: str
    virtual_size: int
    snapshots: tuple[tuple[str, str, int], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One disk of a machine, or one node of its graph that no device uses.

    Attributes:
        name: that -drive gave it; "" for one that -blockdev made.
        qdev: its place among QEMU's objects, or its id; "" where it has none.
        node: the name of the node on top.
        images: from the one that is written down to the base; one at least.
        read_only: QEMU opened it for reading only.
        filter: the driver of the filter that lies above the images, "" if there is none.
    """

    name: str
    qdev: str
    node: str
    images: tuple[Image, ...]
    read_only: bool = False
    filter: str = ""

    @property
    def id(self) -> str:
        """The id that the person who started QEMU gave the device; its whole place where that was none."""
        place = _without_backend(self.qdev)
        return place.removeprefix(USER_DEVICES)

    @property
    def word(self) -> str:
        """What to call it by."""
        return self.name or self.id or self.node

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """The words that mean it, in the order in which they go before those of other devices."""
        return (self.name,), (self.qdev, _without_backend(self.qdev), self.id), (self.node,)


def _without_backend(qdev: str) -> str:
    return next((qdev.removesuffix(ending) for ending in BACKENDS if qdev.endswith(ending)), qdev)


def devices(monitor: Monitor) -> tuple[Device, ...]:
    """Return the machine's devices that have an image, in QEMU's order.

    Raises:
        MonitorError: QEMU does not answer, or what no QEMU answers.
    """
    facts = _Facts(monitor)
    return tuple(facts.device(block) for block in facts.answer("query-block") if block.get("inserted"))


def find_device(monitor: Monitor, word: str) -> Device:
    """Return the device that `word` means: its name, its id or place among the objects, or its top node; else a node.

    Raises:
        UsageError: there is none; the hint lists what there is.
        MonitorError: as for `devices`.
    """
    if not word:  # many a device has no name, or no id
        raise UsageError("the name of the device is empty")
    known = devices(monitor)
    for kind in range(3):
        for device in known:
            if word in device.names[kind]:
                return device
    node = _Facts(monitor).node(word)
    if node is not None:
        return node
    names = ", ".join(printable(device.word) for device in known[:MAX_HINTED]) or "none"
    what = f"{printable(word)} is none of its devices, and no node"
    raise UsageError(f"{monitor.address.shown}: {what} of an image", hint=f"devices with an image: {names}")


class _Facts:
    """The answers of one monitor, taken apart with a check at each step."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def answer(self, command: str, **arguments: object) -> list[Mapping[str, Any]]:
        """Return a command's answer, a list of objects."""
        found = self._monitor.execute(command, **arguments)
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise self._wrong(f"{command} gives no list of objects")
        if len(found) > limits.MAX_DEVICES:
            raise self._wrong(f"{command} gives {len(found)} of them, at most {limits.MAX_DEVICES} are taken")
        return found

    def device(self, block: Mapping[str, Any]) -> Device:
        inserted = self._object(block, "inserted")
        top = self._object(inserted, "image")
        images, driver = tuple(self._images(top)), self._text(top, "format")
        if not images:
            raise self._wrong("a device that has filters only")
        return Device(
            name=self._text(block, "device"),
            qdev=self._text(block, "qdev"),
            node=self._text(inserted, "node-name"),
            images=images,
            read_only=inserted.get("ro") is True,
            filter=driver if driver in FILTERS else "",
        )

    def node(self, name: str) -> Device | None:
        """Return the node called `name`, None if there is none, or it is no image's but a file's or a filter's.

        Its chain is put together from the names: nested, a chain of n images is told in n squared pieces.
        """
        nodes = self.answer("query-named-block-nodes", flat=True)
        formats = [node for node in nodes if self._text(node, "drv") not in (FILTERS | PROTOCOLS.keys())]
        chosen = next((node for node in formats if node.get("node-name") == name), None)
        if chosen is None:
            return None
        infos = [self._object(node, "image") for node in formats]
        known = {self._text(info, "filename"): info for info in infos}
        images: list[Image] = []
        info = self._object(chosen, "image")
        while len(images) <= limits.MAX_CHAIN_DEPTH:
            images.append(self._image(info))
            following = known.get(self._text(info, "full-backing-filename"))
            if following is None:
                break
            info = following
        node = self._text(chosen, "node-name")
        return Device(name="", qdev="", node=node, images=tuple(images), read_only=chosen.get("ro") is True)

    def _images(self, info: Mapping[str, Any] | None) -> Iterator[Image]:
        count = 0
        while info is not None:
            count += 1
            if count > 2 * limits.MAX_CHAIN_DEPTH:  # each may have a filter
                raise self._wrong(f"a chain of more than {limits.MAX_CHAIN_DEPTH} images")
            if self._text(info, "format") not in FILTERS:
                yield self._image(info)
            info = self._object(info, "backing-image") if "backing-image" in info else None

    def _image(self, info: Mapping[str, Any]) -> Image:
        told = self._text(info, "format")
        snapshots = info.get("snapshots", [])
        if not isinstance(snapshots, list) or len(snapshots) > limits.MAX_DEVICE_SNAPSHOTS:
            raise self._wrong("snapshots that are no list, or too many")
        return Image(
            name=self._text(info, "filename"),
            format=PROTOCOLS.get(told, told),
            virtual_size=self._number(info, "virtual-size"),
            snapshots=tuple(self._snapshot(entry) for entry in snapshots),
        )

    def _snapshot(self, entry: Any) -> tuple[str, str, int]:
        if not isinstance(entry, dict):
            raise self._wrong("a snapshot that is no object")
        return self._text(entry, "id"), self._text(entry, "name"), self._number(entry, "date-sec")

    def _object(self, facts: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        found = facts.get(key)
        if not isinstance(found, dict):
            raise self._wrong(f"{key} is no object")
        return found

    def _text(self, facts: Mapping[str, Any], key: str) -> str:
        """Return a text, "" where there is none. JSON can hold what is no name: NUL, and halves of characters."""
        found = facts.get(key, "")
        if not isinstance(found, str) or "\0" in found or any("\ud800" <= char <= "\udfff" for char in found):
            raise self._wrong(f"{key} is no text")
        if len(found) > limits.MAX_MONITOR_TEXT:
            raise self._wrong(f"{key} has {len(found)} characters, at most {limits.MAX_MONITOR_TEXT} are taken")
        return found

    def _number(self, facts: Mapping[str, Any], key: str) -> int:
        found = facts.get(key, 0)
        if type(found) is not int:
            raise self._wrong(f"{key} is no number")
        return found

    def _wrong(self, what: str) -> MonitorError:
        return MonitorError(self._monitor.address.shown, f"what it answers is not what QEMU answers: {what}")

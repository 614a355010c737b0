"""The images that the mount's tests show, and what QEMU says is in them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from tests.support.mounts import qemu

MIB = 1 << 20
CONTENT = bytes(range(256)) * 4096
AWKWARD = [b"before-upgrade", b"two/../x y", b"one", b"one", b"2", b"\xff\xfe", b"latest"]  # R56


@dataclass(frozen=True)
class Expected:
    """What a file of the mount must show.

    Attributes:
        name: in the mount.
        content: a raw file that QEMU made.
        size: bytes of the point, from the snapshot table's `disk_size`.
        date_ns: nanoseconds since the epoch.
        xattrs: without "user.qcowfs.".
    """

    name: str
    content: Path
    size: int
    date_ns: int
    xattrs: dict[str, bytes]


@dataclass(frozen=True)
class Story:
    """An overlay with snapshots over a backing file with a snapshot, with different virtual sizes."""

    image: Path
    expected: tuple[Expected, ...]
    latest: str


def make_image(path: Path) -> Path:
    """Make an image that holds CONTENT and nothing else."""
    raw = path.with_name("content.raw")
    raw.write_bytes(CONTENT)
    qemu("qemu-img", "convert", "-q", "-f", "raw", "-O", "qcow2", raw, path)
    raw.unlink()
    return path


def make_story(folder: Path) -> Story:
    """Make the image that most tests mount: names as users make them, a resize between snapshots, a VM clock."""
    base, top = folder / "data.qcow2", folder / "top.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", base, "4M")
    _write(base, "write -P 0x11 0 3M")
    _snapshot(base, b"before-upgrade")
    _write(base, "write -P 0x22 1M 1M", "write -z 2M 512k")
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    for place, name in enumerate(AWKWARD):
        _write(
            top, f"write -P {0x30 + place} {place * 100}k 70k", f"write -c -P {0x50 + place} {2048 + 64 * place}k 64k"
        )
        _snapshot(top, name)
    qemu("qemu-img", "resize", "-q", top, "6M")
    _write(top, "write -P 0x77 5M 100k")
    os.utime(base, ns=(0, 1_600_000_000_123_456_789))
    return Story(top, (*_of_image(folder, top), *_of_layer(folder, base)), "latest#7.raw")


def _of_image(folder: Path, top: Path) -> list[Expected]:
    known = {"layer": b"top.qcow2", "depth": b"0", "format": b"qcow2"}
    current = Expected("current.raw", _converted(top), 6 * MIB, top.stat().st_mtime_ns, {"kind": b"active", **known})
    names = ["before-upgrade", "two%2F..%2Fx y", "one#3", "one#4", "2", "%FF%FE", "latest#7"]
    table = _table(top)
    found = [current]
    for number, (name, raw) in enumerate(zip(names, AWKWARD, strict=True), 1):
        facts = {
            "kind": b"snapshot",
            "name": raw,
            "id": b"%d" % number,
            "vm_clock": b"0",
            "vm_state_size": b"0",
            **known,
        }
        found.append(Expected(f"{name}.raw", _reverted(folder, top, number), 4 * MIB, table[number - 1], facts))
    return found


def _of_layer(folder: Path, base: Path) -> list[Expected]:
    known = {"layer": b"data.qcow2", "depth": b"1", "format": b"qcow2"}
    facts = {"kind": b"snapshot", "name": b"before-upgrade", "id": b"1", "vm_clock": b"0", "vm_state_size": b"0"}
    return [
        Expected("data.raw", _converted(base), 4 * MIB, base.stat().st_mtime_ns, {"kind": b"layer", **known}),
        Expected("data@before-upgrade.raw", _reverted(folder, base, 1), 4 * MIB, _table(base)[0], facts | known),
    ]


def _write(image: Path, *commands: str) -> None:
    qemu("qemu-io", "-f", "qcow2", *(word for command in commands for word in ("-c", command)), image)


def _snapshot(image: Path, name: bytes) -> None:
    qemu("qemu-img", "snapshot", "-q", "-c", os.fsdecode(name), image)


def _converted(image: Path) -> Path:
    raw = image.with_name(image.name + ".expected")
    qemu("qemu-img", "convert", "-O", "raw", image, raw)
    return raw


def _reverted(folder: Path, image: Path, number: int) -> Path:
    """Return what QEMU shows after going back to a snapshot; `convert -l` would keep the present virtual size."""
    copy = folder / f"{image.stem}.{number}.qcow2"
    shutil.copy(image, copy)
    # `snapshot -a` takes an id first and a name second; the ids of these images are 1, 2, ... in order.
    qemu("qemu-img", "snapshot", "-q", "-a", str(number), copy)
    raw = _converted(copy)
    copy.unlink()
    return raw


def _table(image: Path) -> list[int]:
    """Return the dates of the snapshots, in nanoseconds, as QEMU reads them."""
    told = json.loads(qemu("qemu-img", "info", "--output=json", image))
    return [entry["date-sec"] * 1_000_000_000 + entry["date-nsec"] for entry in told["snapshots"]]


def with_many_snapshots(image: Path, count: int) -> None:
    """Make an image with `count` snapshots, of which QEMU wrote the first.

    `qemu-img snapshot -c` rewrites the table each time: a thousand of them take minutes. The other entries are copies
    with names and ids of their own. They share an L1 table, so refcounts are wrong; readers do not look at refcounts.
    """
    qemu("qemu-img", "create", "-q", "-f", "qcow2", image, "64M")
    _write(image, "write -P 0x42 0 1M")
    _snapshot(image, b"first")
    _write(image, "write -P 0x43 0 1M")
    with image.open("r+b") as file:
        file.seek(60)
        _, offset = struct.unpack(">IQ", file.read(12))
        file.seek(offset)
        entry = file.read(40 + 24)  # the fixed part and QEMU's extra data
        entries = b"".join(_entry(entry, number) for number in range(1, count + 1))
        place = -(-file.seek(0, os.SEEK_END) // 65536) * 65536
        file.seek(place)
        file.write(entries)
        file.seek(60)
        file.write(struct.pack(">IQ", count, place))


def _entry(template: bytes, number: int) -> bytes:
    identity, name = b"%d" % number, b"snapshot-%04d" % number
    head = template[:12] + struct.pack(">HH", len(identity), len(name)) + template[16:]
    whole = head + identity + name
    return whole + bytes(-len(whole) % 8)

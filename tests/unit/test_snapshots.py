"""The snapshot table as objects: real images compared with `qemu-img info`, and forged ones. R51 to R57, R61."""

from __future__ import annotations

import errno
import json
import os
import struct
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from qcowfs import limits
from qcowfs._source import FileSource
from qcowfs.errors import CorruptImage, SourceError
from qcowfs.qcow2.header import read_header
from qcowfs.qcow2.snapshots import SnapshotEntry, read_snapshots, validate_l1
from tests.support import forge, need
from tests.support.forge import BytesSource, Snapshot
from tests.support.qemu import qemu, qemu_io

CLUSTER = 1 << 16
BILLION = 1_000_000_000


def entries_of(image: bytes) -> tuple[SnapshotEntry, ...]:
    source = BytesSource(image)
    return read_snapshots(source, read_header(source))


def forged(*snapshots: Snapshot, **fields: Any) -> tuple[SnapshotEntry, ...]:
    return entries_of(forge.qcow2(snapshots=snapshots, **fields))


def as_qemu_says(entry: SnapshotEntry) -> dict[str, Any]:
    """Return an entry as `qemu-img info` tells it."""
    found = {
        "id": entry.id.decode(),
        "name": entry.name.decode(),
        "vm-state-size": entry.vm_state_size,
        "date-sec": entry.date_sec,
        "date-nsec": entry.date_nsec,
        "vm-clock-sec": entry.vm_clock_ns // BILLION,
        "vm-clock-nsec": entry.vm_clock_ns % BILLION,
    }
    return found | ({} if entry.icount is None else {"icount": entry.icount})


def compare(path: Path) -> tuple[SnapshotEntry, ...]:
    """The table is what QEMU says; returns it."""
    entries = entries_of(path.read_bytes())
    said = json.loads(qemu("qemu-img", "info", "--output=json", "-f", "qcow2", path).stdout)

    assert said.get("snapshots", []) == [as_qemu_says(entry) for entry in entries]
    return entries


@pytest.fixture(params=["compat=0.10", "compat=1.1", "cluster_size=512", "extended_l2=on"])
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    need("qemu-img", "qemu-io")
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", request.param, path, "1M")
    return path


def test_r51_snapshots_of_qemu_img(image: Path) -> None:
    for number, name in enumerate(["one", "two/../x y", "one", "2", "x" * 200]):
        qemu_io(image, f"write -P {number + 1} {number * 64}k 64k")
        qemu("qemu-img", "snapshot", "-c", name, image)

    entries = compare(image)

    assert [entry.id for entry in entries] == [b"1", b"2", b"3", b"4", b"5"]
    assert [entry.ordinal for entry in entries] == list(range(5))
    assert {entry.disk_size for entry in entries} == {1 << 20}
    assert len({entry.l1_offset for entry in entries}) == 5


def test_r51_an_image_without_snapshots(image: Path) -> None:
    assert compare(image) == ()


def test_r56_ids_have_gaps_after_a_deletion(image: Path) -> None:
    for name in ("a", "b", "c"):
        qemu("qemu-img", "snapshot", "-c", name, image)
    qemu("qemu-img", "snapshot", "-d", "b", image)

    assert [(entry.id, entry.name) for entry in compare(image)] == [(b"1", b"a"), (b"3", b"c")]


def test_r53_the_size_at_the_time_of_the_snapshot(tmp_path: Path) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, "8M")
    for size in ("16M", "4M"):
        qemu("qemu-img", "snapshot", "-c", size, path)
        qemu("qemu-img", "resize", "-q", "--shrink", path, size)
    qemu("qemu-img", "snapshot", "-c", "last", path)

    assert [entry.disk_size for entry in compare(path)] == [8 << 20, 16 << 20, 4 << 20]


def test_every_field_is_where_the_specification_has_it() -> None:
    fields = {"date_sec": 1, "date_nsec": 2, "vm_clock_nsec": 3, "vm_state_size": 4, "l1_size": 6}
    snapshot = Snapshot(id=b"7", name=b"eight", vm_state_size_large=9, disk_size=10, icount=11, fields=fields)

    (entry,) = forged(snapshot)

    assert entry == SnapshotEntry(
        ordinal=0,
        id=b"7",
        name=b"eight",
        l1_offset=entry.l1_offset,
        l1_entries=6,
        date_sec=1,
        date_nsec=2,
        vm_clock_ns=3,
        vm_state_size=9,
        disk_size=10,
        icount=11,
    )
    assert entry.l1_offset % CLUSTER == 0


@pytest.mark.parametrize("version", [2, 3])
def test_qemu_reads_forged_entries_alike(tmp_path: Path, version: int) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    snapshots = [
        Snapshot(id=b"%d" % number, name=b"n" * number, icount=number or None, vm_state_size_large=number << 40)
        for number in range(20)
    ]
    path.write_bytes(forge.qcow2(version=version, snapshots=snapshots))

    assert len(compare(path)) == 20


@pytest.mark.parametrize(
    ("extra", "vm_state_size", "disk_size", "icount"),
    [
        (b"", 5, None, None),
        (struct.pack(">Q", 0), 0, None, None),  # it replaces the short field even where it is 0
        (struct.pack(">Q", 1 << 40), 1 << 40, None, None),
        (struct.pack(">QQ", 6, 512), 6, 512, None),
        (struct.pack(">QQQ", 6, 512, 0), 6, 512, 0),
        (struct.pack(">QQQ", 6, 512, (1 << 64) - 1), 6, 512, None),
        (struct.pack(">QQQ", 6, 512, 7) + b"later" * 200, 6, 512, 7),
    ],
)
def test_r52_extra_data(
    tmp_path: Path, extra: bytes, vm_state_size: int, disk_size: int | None, icount: int | None
) -> None:
    need("qemu-img")
    path = tmp_path / "image.qcow2"
    path.write_bytes(forge.qcow2(version=2, snapshots=[Snapshot(extra=extra, fields={"vm_state_size": 5})]))

    (entry,) = compare(path)

    assert (entry.vm_state_size, entry.disk_size, entry.icount) == (vm_state_size, disk_size, icount)


@pytest.mark.parametrize("name", [b"", b"..", b"a/b", b"\xff\xfe", b"a\nb", b" ", b"a\0b", b"x" * 65535])
def test_r56_names_and_ids_are_any_bytes(name: bytes) -> None:
    first, second = forged(Snapshot(id=name, name=name), Snapshot(id=b"2", name=b"next"))

    assert (first.id, first.name) == (name, name)
    assert (second.id, second.name) == (b"2", b"next")


@pytest.mark.parametrize("length", range(1, 10))
def test_r51_each_entry_starts_at_a_multiple_of_8(length: int) -> None:
    found = forged(*[Snapshot(name=b"x" * length) for _ in range(4)])

    assert [entry.name for entry in found] == [b"x" * length] * 4


def test_r51_entries_across_the_pieces_in_which_the_table_is_read() -> None:
    """30 entries of 130 KiB: some name of each piece's end is in the next one."""
    names = [bytes([number]) * 65535 for number in range(1, 31)]

    found = forged(*[Snapshot(id=name[:-number], name=name) for number, name in enumerate(names, 1)])

    assert [entry.name for entry in found] == names
    assert [len(entry.id) for entry in found] == [65535 - number for number in range(1, 31)]


def test_a_table_is_read_in_few_pieces() -> None:
    """Of 1 MiB; not one for each entry or name."""
    image = forge.qcow2(snapshots=[Snapshot(name=b"x" * 100) for _ in range(1000)], cluster_bits=9)
    header = read_header(BytesSource(image))
    reads = []

    class CountingSource(BytesSource):
        def read_at(self, offset: int, length: int) -> bytes:
            reads.append((offset, length))
            return super().read_at(offset, length)

    assert len(read_snapshots(CountingSource(image), header)) == 1000
    assert reads == [(header.snapshots_offset, 1 << 20)]


def sparse_image(path: Path, excess: int) -> Path:
    """Write an image whose snapshot table has 64 MiB and `excess` bytes, in 512 entries with names that are holes."""
    start, count, fixed = 1 << 20, 512, 56
    stride = limits.MAX_SNAPSHOT_TABLE_SIZE // count
    path.write_bytes(forge.qcow2(nb_snapshots=count, snapshots_offset=start))
    with path.open("r+b") as file:
        for number in range(count):
            name_length = stride - fixed - 65535 + (excess if number == count - 1 else 0)
            file.seek(start + number * stride)
            file.write(struct.pack(">QIHHIIQII", 0, 0, 65535, name_length, 0, 0, 0, 0, 16) + bytes(16))
    os.truncate(path, start + count * stride + excess)
    return path


@pytest.mark.parametrize("excess", [0, 1])
def test_r61_a_table_has_up_to_64_mib(tmp_path: Path, excess: int) -> None:
    need("qemu-img")
    path = sparse_image(tmp_path / "image.qcow2", excess)
    source = FileSource(os.open(path, os.O_RDONLY), str(path))
    header = read_header(source)
    qemu_opens = qemu("qemu-img", "info", "-f", "qcow2", path, check=False).returncode == 0

    if excess:
        with pytest.raises(CorruptImage, match="the table is larger than 67108864 bytes"):
            read_snapshots(source, header)
    else:
        assert len(read_snapshots(source, header)) == 512
    assert qemu_opens is not bool(excess)
    source.close()


def test_r61_65536_snapshots() -> None:
    """The largest count, with the smallest entries."""
    entry = struct.pack(">QIHHIIQII", 0, 0, 0, 0, 0, 0, 0, 0, 0)
    image = forge.qcow2(snapshots=entry * 65536, nb_snapshots=65536)

    found = entries_of(image)

    assert len(found) == 65536
    assert found[-1].ordinal == 65535


def test_r53_where_an_l1_table_is_is_checked_when_it_is_used() -> None:
    """Reading the table says nothing of it."""
    image = forge.qcow2(snapshots=[Snapshot(), Snapshot(fields={"l1_table_offset": 512})])
    source = BytesSource(image)
    header = read_header(source)
    good, bad = read_snapshots(source, header)

    validate_l1(source, header, good)
    with pytest.raises(CorruptImage, match="bad L1 table of snapshot 2: it is at 0x200, a multiple of"):
        validate_l1(source, header, bad)


def test_r30_a_cut_table_says_where() -> None:
    image = forge.qcow2(snapshots=[Snapshot()])
    table = struct.unpack_from(">Q", image, 64)[0]

    with pytest.raises(CorruptImage, match=f"bad snapshot table at {table + 40:#x}: .* the image is truncated"):
        entries_of(image[: table + 50])


def test_a_source_that_fails_is_a_source_error_with_its_errno() -> None:
    image = forge.qcow2(snapshots=[Snapshot()])
    header = read_header(BytesSource(image))

    class FailingSource(BytesSource):
        def read_at(self, offset: int, length: int) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(SourceError, match="cannot read the snapshot table: Input/output error") as caught:
        read_snapshots(FailingSource(image), header)

    assert caught.value.errno == errno.EIO


def test_an_entry_is_frozen() -> None:
    (entry,) = forged(Snapshot())

    with pytest.raises(FrozenInstanceError):
        entry.name = b"other"  # type: ignore[misc]

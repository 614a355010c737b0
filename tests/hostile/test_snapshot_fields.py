"""Each field of a snapshot table's entry, at its boundary and one off it: right data or a named error.

Forged images with QEMU's answer: R51 to R57 and the limits of R61. What spoils one snapshot leaves the others, and the
active state, as they are.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from qcowfs.chain import open_chain
from qcowfs.errors import CorruptImage, ReadFault
from qcowfs.gate import Policy
from qcowfs.qcow2.header import read_header
from qcowfs.qcow2.snapshots import SnapshotEntry, read_snapshots
from qcowfs.snapshot import points
from tests.support import forge, need
from tests.support.forge import BytesSource, Snapshot
from tests.support.reader import open_point
from tests.support.verdict import DATA, opens, refuses

pytestmark = [pytest.mark.timeout(5, method="signal"), pytest.mark.expect_warnings]
need("qemu-io")

CLUSTER = 1 << 16
END_OF_FILES = (1 << 63) - (1 << 30)  # QEMU's, and so ours
GOOD = Snapshot(id=b"2", name=b"good", data={0: 0x22})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "forged.qcow2"


def forged(*snapshots: Snapshot, **fields: Any) -> bytes:
    return forge.qcow2(data=DATA, snapshots=snapshots, **fields)


def entries(image: bytes) -> tuple[SnapshotEntry, ...]:
    source = BytesSource(image)
    return read_snapshots(source, read_header(source))


def with_bad_first(path: Path, *words: str, **fields: int) -> None:
    """The first snapshot cannot be read, and says all of `words`; the second, and the active state, can."""
    opens(path, forged(Snapshot(fields=fields), GOOD))
    with open_chain(str(path), Policy()) as chain:
        _, bad, good = points(chain)

        assert open_point(chain, good).pread(0, 512) == b"\x22" * 512
        with pytest.raises(CorruptImage) as caught:
            open_point(chain, bad)
    assert [word for word in ("bad L1 table of snapshot 1", *words) if word not in str(caught.value)] == []


@pytest.mark.parametrize("offset", [1, 512, CLUSTER - 1, CLUSTER + 1])
def test_r53_an_l1_table_that_is_not_aligned_spoils_its_snapshot(path: Path, offset: int) -> None:
    with_bad_first(path, f"{offset:#x}", "0x10000 was expected", l1_table_offset=offset)


@pytest.mark.parametrize("offset", [END_OF_FILES, 1 << 63, (1 << 64) - CLUSTER])
def test_r53_an_l1_table_beyond_any_file_spoils_its_snapshot(path: Path, offset: int) -> None:
    with_bad_first(path, f"{offset:#x}", "beyond what a file can have", l1_table_offset=offset)


def test_r53_an_l1_table_may_end_where_files_do(path: Path) -> None:
    """One entry more, and it is beyond."""
    most = CLUSTER // 8
    fields = {"l1_table_offset": END_OF_FILES - CLUSTER, "l1_size": most}
    opens(path, forged(Snapshot(fields=fields), GOOD))
    with open_chain(str(path), Policy()) as chain:
        disk = open_point(chain, points(chain)[1])

        with pytest.raises(ReadFault, match="L1 table lies past the end of the file"):
            disk.pread(0, 512)

    with_bad_first(path, "beyond what a file can have", **fields | {"l1_size": most + 1})


@pytest.mark.parametrize("size", [(1 << 22) + 1, (1 << 32) - 1])
def test_r53_an_l1_table_that_is_too_large_spoils_its_snapshot(path: Path, size: int) -> None:
    with_bad_first(path, f"{size} entries", l1_size=size)


@pytest.mark.parametrize("size", [0, 1, 2, 1 << 22])
def test_r53_an_l1_table_may_be_shorter_or_longer_than_the_disk(path: Path, size: int) -> None:
    opens(path, forged(Snapshot(data={0: 0x33}, fields={"l1_size": size})))
    with open_chain(str(path), Policy()) as chain:
        disk = open_point(chain, points(chain)[1])

        assert disk.pread(0, 512) == (b"\x33" if size else b"\0") * 512


@pytest.mark.parametrize("length", [0, 1, 2, 65534, 65535])
@pytest.mark.parametrize("what", ["id", "name"])
def test_r56_ids_and_names_have_any_length(path: Path, what: str, length: int) -> None:
    changed: dict[str, Any] = {what: b"x" * length}
    image = forged(Snapshot(**changed), GOOD)

    opens(path, image)
    assert [getattr(entry, what) for entry in entries(image)] == [b"x" * length, getattr(GOOD, what)]


@pytest.mark.parametrize("field", ["id_str_size", "name_size"])
def test_r51_r30_a_name_that_the_file_has_not_got(path: Path, field: str) -> None:
    """QEMU reads zeros past the end of a file, and takes a cut table for one of nameless snapshots."""
    image = forge.qcow2(data=DATA, cluster_bits=9, snapshots=[Snapshot(fields={field: 65535})])

    refuses(path, image, CorruptImage, "bad snapshot table at 0x", "truncated", qemu_opens=True)


@pytest.mark.parametrize("taken", [0, 1, 39, 40, 55, 56, 59])
def test_r51_r30_a_table_that_the_file_has_not_got(path: Path, taken: int) -> None:
    image = forged(Snapshot())
    table = struct.unpack_from(">Q", image, 64)[0]

    refuses(path, image[: table + taken], CorruptImage, "bad snapshot table at 0x", "truncated", qemu_opens=True)


def test_r51_the_file_may_end_before_the_padding_of_the_last_entry(path: Path) -> None:
    image = forged(Snapshot())
    table = struct.unpack_from(">Q", image, 64)[0]

    opens(path, image[: table + 60])


@pytest.mark.parametrize("offset", [1 << 40, 1 << 62, END_OF_FILES - CLUSTER])
def test_r51_r30_a_table_past_the_end_of_the_file(path: Path, offset: int) -> None:
    image = forge.qcow2(data=DATA, nb_snapshots=1, snapshots_offset=offset)

    refuses(path, image, CorruptImage, f"{offset:#x}", "truncated", qemu_opens=True)


def test_r51_a_table_of_zeros_is_one_of_nameless_snapshots(path: Path) -> None:
    """As QEMU lists them: what the count promises is there, with nothing in it."""
    image = forged(GOOD, nb_snapshots=3)

    opens(path, image)
    assert [(entry.id, entry.l1_entries, entry.disk_size) for entry in entries(image)][1:] == [(b"", 0, None)] * 2


@pytest.mark.parametrize("field", ["date_sec", "date_nsec", "vm_state_size"])
@pytest.mark.parametrize("value", [0, 1, 999_999_999, 1_000_000_000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1])
def test_r57_numbers_that_mean_nothing_to_the_reader(path: Path, field: str, value: int) -> None:
    image = forged(Snapshot(extra=b"", fields={field: value}), GOOD)

    opens(path, image)
    assert getattr(entries(image)[0], field) == value


@pytest.mark.parametrize("value", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_r54_any_vm_clock_and_vm_state_size(path: Path, value: int) -> None:
    image = forged(Snapshot(vm_state_size_large=value, fields={"vm_clock_nsec": value}), GOOD)

    opens(path, image)
    assert (entries(image)[0].vm_clock_ns, entries(image)[0].vm_state_size) == (value, value)


@pytest.mark.parametrize("length", [0, 7, 8, 15, 16, 17, 23, 24, 25, 1023, 1024])
@pytest.mark.parametrize("version", [2, 3])
def test_r52_extra_data_of_up_to_1024_bytes(path: Path, version: int, length: int) -> None:
    """The specification wants 16 in version 3; QEMU reads less as in version 2, and only its `check` complains."""
    extra = struct.pack(">QQQ", 5 << 32, 3 * CLUSTER, 7).ljust(1024, b"\xff")[:length]
    image = forged(Snapshot(extra=extra, fields={"vm_state_size": 9}), GOOD, version=version)

    opens(path, image)
    entry, good = entries(image)
    assert entry.vm_state_size == (5 << 32 if length >= 8 else 9)
    assert entry.disk_size == (3 * CLUSTER if length >= 16 else None)
    assert entry.icount == (7 if length >= 24 else None)
    assert good.name == b"good"


@pytest.mark.parametrize("length", [1025, 2000, (1 << 31) - 1, (1 << 32) - 1])
def test_r52_more_extra_data(path: Path, length: int) -> None:
    image = forged(Snapshot(fields={"extra_data_size": length}))

    refuses(path, image, CorruptImage, "bad snapshot table at 0x", f"{length} bytes of extra data, at most 1024")


@pytest.mark.parametrize("icount", [0, 1, (1 << 64) - 2, (1 << 64) - 1])
def test_r52_the_largest_instruction_count_means_none(path: Path, icount: int) -> None:
    image = forged(Snapshot(icount=icount))

    opens(path, image)
    assert entries(image)[0].icount == (None if icount == (1 << 64) - 1 else icount)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1 << 40, (1 << 62) - 1, 1 << 62])
def test_r53_any_disk_size_that_a_file_can_have(path: Path, size: int) -> None:
    """However short its L1 table is: the rest is unallocated."""
    extra = struct.pack(">QQ", 0, size)

    opens(path, forged(Snapshot(extra=extra, data={0: 0x33}, fields={"l1_size": 1})))
    with open_chain(str(path), Policy()) as chain:
        disk = open_point(chain, points(chain)[1])

        assert disk.virtual_size == size
        assert disk.pread(0, 512) == b"\x33" * min(size, 512)
        assert disk.pread(max(0, size - 512), 512) == bytes(min(size, 512)) if size > 1024 else True


@pytest.mark.parametrize("size", [(1 << 62) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_r53_disk_sizes_that_no_file_can_have(path: Path, size: int) -> None:
    """QEMU opens these and cannot go back to the snapshot. A mount would have to show a file of that size."""
    image = forged(Snapshot(extra=struct.pack(">QQ", 0, size)))

    refuses(path, image, CorruptImage, "bad snapshot table at 0x", f"{size:#x} bytes", qemu_opens=True)

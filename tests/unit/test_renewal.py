"""A chain that was opened again: what of it is known already."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qcowfs import snapshot
from qcowfs.chain import Chain, open_chain
from qcowfs.errors import ReadFault
from qcowfs.gate import Policy
from qcowfs.renewal import known_points, renewed
from tests.support import need
from tests.support.qemu import qemu


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """Return an overlay, both with a snapshot."""
    need("qemu-img")
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    qemu("qemu-img", "snapshot", "-q", "-c", "below", base)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", top)
    qemu("qemu-img", "snapshot", "-q", "-c", "first", top)
    return top


@contextmanager
def chain(path: Path) -> Iterator[Chain]:
    with open_chain(str(path), Policy(), lock=False) as opened:
        yield opened


def again(path: Path) -> Chain:
    return open_chain(str(path), Policy(), lock=False)


def names(points: tuple[snapshot.Point, ...]) -> list[tuple[str, bytes | None]]:
    return [(point.kind, point.snapshot_name) for point in points]


def test_nothing_has_happened(top: Path) -> None:
    with chain(top) as old:
        count = len(os.listdir("/proc/self/fd"))

        assert renewed(old, again(top)) is None
        assert len(os.listdir("/proc/self/fd")) == count


def test_a_new_snapshot_is_new_and_everything_else_is_known(top: Path) -> None:
    with chain(top) as old:
        known = snapshot.points(old)
        count = len(os.listdir("/proc/self/fd"))
        qemu("qemu-img", "snapshot", "-q", "-c", "second", top)
        new = renewed(old, again(top))
        assert new is not None
        found = known_points(known, old, new)

        assert names(found) == [
            ("active", None), ("snapshot", b"first"), ("snapshot", b"second"), ("layer", None), ("snapshot", b"below")
        ]  # fmt: skip
        # The file was written, so its active state may be another one.
        assert [point in known and any(point is one for one in known) for point in found] == [
            False, True, False, True, True
        ]  # fmt: skip
        assert new.layers[1] is old.layers[1]
        assert new.layers[0].source is not old.layers[0].source
        assert len(os.listdir("/proc/self/fd")) == count


def test_a_snapshot_that_is_made_again_is_another_one(top: Path) -> None:
    with chain(top) as old:
        known = snapshot.points(old)
        qemu("qemu-img", "snapshot", "-q", "-d", "first", top)
        qemu("qemu-img", "snapshot", "-q", "-c", "first", top)
        new = renewed(old, again(top))
        assert new is not None
        found = known_points(known, old, new)

        assert names(found) == names(known)
        assert found[1].snapshot_id == known[1].snapshot_id
        assert found[1] is not known[1]


def test_what_reads_through_a_layer_that_was_written_is_another_point(top: Path) -> None:
    with chain(top) as old:
        known = snapshot.points(old)
        base = old.layers[1].path
        os.utime(base, ns=(0, 10**18))
        new = renewed(old, again(top))
        assert new is not None
        found = known_points(known, old, new)

        # A snapshot of the base itself does not read through the base's active state.
        assert [any(point is one for one in known) for point in found] == [False, False, False, True]


def test_a_file_that_took_the_name_is_another_image(top: Path) -> None:
    other = top.with_name("other")
    other.write_bytes(top.read_bytes())
    with chain(top) as old:
        known = snapshot.points(old)
        os.rename(other, top)
        new = renewed(old, again(top))
        assert new is not None
        with new:
            found = known_points(known, old, new)

            assert [any(point is one for one in known) for point in found] == [False, False, True, True]


def test_a_moved_table_and_a_new_snapshot_are_noticed_at_little_cost(top: Path) -> None:
    with chain(top) as opened:
        before = snapshot.has_moved(opened.layers[0])
        qemu("qemu-img", "snapshot", "-q", "-d", "first", top)
        qemu("qemu-img", "snapshot", "-q", "-c", "first", top)
        os.utime(top, ns=(0, opened.layers[0].modified_ns))  # only the entry tells

        assert (before, snapshot.has_moved(opened.layers[0])) == (False, True)


def test_a_snapshot_over_a_layer_that_changes_is_not_read_once_it_is_gone(top: Path) -> None:
    with chain(top) as opened:
        disk = snapshot.LiveDisk(opened, snapshot.points(opened)[1])
        before = disk.pread(0, 512)
        qemu("qemu-img", "snapshot", "-q", "-d", "first", top)

        with pytest.raises(ReadFault, match="the snapshot was deleted"):
            disk.pread(0, 512)

    assert before == bytes(512)

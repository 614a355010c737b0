"""The tree of a mount, without images and without FUSE."""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Sequence

import pytest

from qcowfs._mapped import Mapped
from qcowfs.errors import CorruptImage, ReadFault
from qcowfs.inside.contents import Contents
from qcowfs.snapshot import Point
from qcowfs.vfs import folder as folders
from qcowfs.vfs import tree as trees
from qcowfs.vfs.node import DiskFile, LiveFile, Node, RawFile, Symlink
from qcowfs.vfs.tree import Tree
from tests.support.points import SECOND, FakeDisks, active, backing, layer, snapshot

OWNER = (1001, 1002)


def grown(points: Sequence[Point], disks: FakeDisks | None = None, *, live: bool = False) -> Tree:
    return Tree(points, disks or FakeDisks(), image="/images/top.qcow2", owner=OWNER, live=live)


def file(tree: Tree, name: bytes) -> RawFile:
    node = tree.lookup(tree.root, name)
    assert isinstance(node, RawFile)
    return node


def test_each_point_is_a_file_and_latest_links_to_one() -> None:
    tree = grown([active(date=9), snapshot(b"s", date=5), backing(1, "/images/data.qcow2", date=3)])

    assert set(tree.root.entries) == {b"current.raw", b"s.raw", b"data.raw", b"latest.raw"}


def test_a_file_shows_its_points_size_and_date_and_the_owner() -> None:
    tree = grown([active(), snapshot(b"s", date=5, size=123 * 512)])

    shown = file(tree, b"s.raw").attributes()

    assert (shown.size, shown.mtime_ns, shown.nlink) == (123 * 512, 5 * SECOND, 1)
    assert (shown.uid, shown.gid) == OWNER
    assert shown.mode == stat.S_IFREG | 0o444


def test_the_root_is_a_directory_of_the_newest_date() -> None:
    tree = grown([active(date=2), snapshot(b"s", date=5)])

    shown = tree.root.attributes()

    assert shown.ino == 1
    assert shown.mode == stat.S_IFDIR | 0o555
    assert (shown.nlink, shown.mtime_ns) == (1, 5 * SECOND)


def test_every_node_is_found_by_its_number() -> None:
    tree = grown([active(), snapshot(b"s"), snapshot(b"t")])

    numbers = [node.place.ino for node in tree.root.entries.values()]

    assert len(set(numbers)) == 4
    assert [tree.node(number) for number in numbers] == list(tree.root.entries.values())


def test_numbers_depend_on_the_name_alone() -> None:
    one = grown([active(), snapshot(b"s")])
    two = grown([active(), snapshot(b"new"), snapshot(b"s"), backing(1, "/images/data.raw")])

    assert file(one, b"s.raw").place.ino == file(two, b"s.raw").place.ino


def test_dot_and_dot_dot_of_the_root_are_the_root() -> None:
    tree = grown([active()])

    assert tree.lookup(tree.root, b".") is tree.root
    assert tree.lookup(tree.root, b"..") is tree.root


@pytest.mark.parametrize("name", [b"", b"nope", b"current", b"CURRENT.RAW", b"\xff", b"latest.raw"])
def test_what_is_not_there_is_not_found(name: bytes) -> None:
    tree = grown([active()])

    assert tree.lookup(tree.root, name) is None


class TestLatest:
    def test_is_the_newest_point_but_never_the_active_state(self) -> None:
        tree = grown([active(date=9), snapshot(b"old", date=1), snapshot(b"new", date=2)])

        link = tree.lookup(tree.root, b"latest.raw")

        assert isinstance(link, Symlink)
        assert link.target == b"new.raw"
        assert link.attributes().size == len(b"new.raw")
        assert link.attributes().mode == stat.S_IFLNK | 0o777

    def test_is_missing_where_there_is_only_the_active_state(self) -> None:
        assert b"latest.raw" not in grown([active()]).root.entries

    def test_may_be_a_layer(self) -> None:
        layers = [active(), snapshot(b"s", date=1), backing(1, "/images/data.raw", date=2)]

        assert trees.latest(layers) is layers[2]

    def test_is_never_a_point_that_may_change(self) -> None:
        points = [active(), snapshot(b"s", date=9, frozen=False), snapshot(b"t", date=1)]

        assert trees.latest(points) is points[2]
        assert trees.latest(points[:2]) is None

    def test_of_equal_dates_is_the_point_nearest_to_the_active_state(self) -> None:
        of = layer(1, "/images/data.qcow2")
        upper = [snapshot(b"a", ordinal=0), snapshot(b"b", ordinal=1)]
        lower = [backing(1, "/images/data.qcow2"), snapshot(b"c", of=of, ordinal=7)]

        assert trees.latest([*upper, *lower]) is upper[1]
        assert trees.latest([*lower, *upper]) is upper[1]
        assert trees.latest(lower) is lower[0]


class TestPointsThatMayChange:
    points = (active(frozen=False, size=100), snapshot(b"s", date=1))

    def test_are_left_out_and_named(self) -> None:
        tree = grown(self.points)

        assert set(tree.root.entries) == {b"s.raw", b"latest.raw"}
        assert tree.left_out == ("current",)
        assert [point.kind for point in tree.shown] == ["snapshot"]

    def test_are_shown_with_live(self) -> None:
        tree = grown(self.points, live=True)

        assert isinstance(file(tree, b"current.raw"), LiveFile)
        assert isinstance(file(tree, b"s.raw"), DiskFile)
        assert tree.left_out == ()

    def test_live_changes_nothing_where_nobody_writes(self) -> None:
        tree = grown([active()], live=True)

        assert isinstance(file(tree, b"current.raw"), DiskFile)

    def test_names_do_not_depend_on_what_is_left_out(self) -> None:
        twins = [active(), snapshot(b"a", b"1", frozen=False), snapshot(b"a", b"2")]

        assert b"a#2.raw" in grown(twins).root.entries

    def test_a_live_file_answers_of_this_moment(self) -> None:
        disks = FakeDisks(size_now=300)
        live = file(grown(self.points, disks, live=True), b"current.raw")

        first = live.attributes()
        disks.size_now = 500
        second = live.attributes()

        assert (first.size, second.size) == (300, 500)
        assert (second.mtime_ns, second.blocks) == (7, 16)
        assert not first.lasting

    def test_a_listing_never_reads_a_live_header(self) -> None:
        disks = FakeDisks()
        live = file(grown(self.points, disks, live=True), b"current.raw")

        shown = live.listed()

        assert (shown.size, shown.lasting, disks.made) == (100, False, 0)


class TestReading:
    def test_nothing_is_opened_before_somebody_opens_it(self) -> None:
        disks = FakeDisks()
        tree = grown([active(), *(snapshot(b"%d" % place, b"%d" % place) for place in range(1000))], disks)

        for node in tree.root.entries.values():
            node.listed()

        assert (disks.made, disks.counted) == (0, 0)

    def test_handles_share_a_disk_and_the_last_one_lets_go_of_it(self) -> None:
        disks = FakeDisks()
        current = file(grown([active()], disks), b"current.raw")

        current.open()
        current.open()
        current.release()
        shared = current.read(1, 3)
        current.release()

        assert disks.made == 1
        assert shared == b"\x01\x02\x03"
        assert current.opened == 0
        with pytest.raises(OSError, match="Bad file descriptor"):
            current.read(0, 1)

    @pytest.mark.parametrize(
        ("offset", "length", "expected"),
        [(0, 2, b"\x00\x01"), (4094, 2, bytes([78, 79])), (4095, 2, bytes([79])), (4096, 1, b""), (1 << 60, 9, b"")],
    )
    def test_reads_end_where_the_disk_ends(self, offset: int, length: int, expected: bytes) -> None:
        current = file(grown([active(size=4096)]), b"current.raw")
        current.open()

        assert current.read(offset, length) == expected

    @pytest.mark.expect_warnings
    def test_a_fault_is_raised_for_its_range_only_and_logged_once(self, caplog: pytest.LogCaptureFixture) -> None:
        tree = grown([active(), snapshot(b"s")], FakeDisks(broken={b"s": 1000}))
        damaged = file(tree, b"s.raw")
        damaged.open()

        for _ in range(3):
            with pytest.raises(ReadFault):
                damaged.read(0, 1001)

        assert damaged.read(0, 1000) and damaged.read(1001, 10)
        assert [record.levelno for record in caplog.records] == [logging.ERROR]
        assert "s.raw: fake.qcow2: layer 0, guest offset 0x3e8: broken on purpose" in caplog.text

    @pytest.mark.expect_warnings
    def test_a_point_that_cannot_be_read_is_listed_and_fails_at_open(self, caplog: pytest.LogCaptureFixture) -> None:
        tree = grown([active(), snapshot(b"bad"), snapshot(b"good", b"2")], FakeDisks(unreadable={b"bad"}))
        bad = file(tree, b"bad.raw")

        for _ in range(2):
            with pytest.raises(CorruptImage):
                bad.open()
        file(tree, b"good.raw").open()

        assert bad.attributes().size == 4096
        assert bad.opened == 0
        assert len(caplog.records) == 1


class TestBlocks:
    def test_are_counted_once_and_only_when_asked(self) -> None:
        disks = FakeDisks()
        current = file(grown([active(size=8192)], disks), b"current.raw")
        assert isinstance(current, DiskFile)

        before = current.attributes()
        current.count()
        current.count()
        after = current.attributes()

        assert (before.blocks, before.lasting) == (0, False)
        assert (after.blocks, after.lasting) == (8, True)
        assert disks.counted == 1

    def test_are_rounded_up(self) -> None:
        current = file(grown([active(size=2 * 513)]), b"current.raw")
        assert isinstance(current, DiskFile)

        current.count()

        assert current.attributes().blocks == 2


def xattrs(tree: Tree, node: Node) -> dict[str, bytes]:
    return {name.decode().removeprefix("user.qcowfs."): value for name, value in tree.xattrs(node).items()}


class TestExtendedAttributes:
    def test_of_the_root_say_what_is_mounted_and_by_whom(self) -> None:
        tree = grown([active()])

        found = xattrs(tree, tree.root)

        assert found.keys() == {"image", "pid", "version"}
        assert (found["image"], int(found["pid"])) == (b"/images/top.qcow2", os.getpid())

    def test_of_the_active_state(self) -> None:
        tree = grown([active(date=1, size=512)])

        expected = {
            "kind": b"active",
            "layer": b"top.qcow2",
            "depth": b"0",
            "format": b"qcow2",
            "date": b"1970-01-01T00:00:01.000000000Z",
            "virtual_size": b"512",
        }
        assert expected == xattrs(tree, file(tree, b"current.raw"))

    def test_of_a_snapshot_hold_the_raw_bytes_of_its_name_and_id(self) -> None:
        of = layer(2, "/images/caf\udce9.qcow2")
        tree = grown([snapshot(b"a/\xff", b"\xfe", of=of, vm_clock_ns=5, vm_state_size=6), backing(2, of.path)])

        found = xattrs(tree, file(tree, b"caf%E9@a%2F%FF.raw"))

        assert (found["name"], found["id"], found["layer"]) == (b"a/\xff", b"\xfe", b"caf\xe9.qcow2")
        assert (found["vm_clock"], found["vm_state_size"], found["depth"]) == (b"5", b"6", b"2")

    def test_of_the_link_are_none(self) -> None:
        tree = grown([active(), snapshot(b"s")])
        link = tree.lookup(tree.root, b"latest.raw")
        assert link is not None

        assert xattrs(tree, link) == {}

    @pytest.mark.parametrize("second", [0, 2**32 - 1])
    def test_dates_of_any_snapshot_can_be_written(self, second: int) -> None:
        tree = grown([active(), snapshot(b"s", date=second)])

        assert xattrs(tree, file(tree, b"s.raw"))["date"] in (
            b"1970-01-01T00:00:00.000000000Z",
            b"2106-02-07T06:28:15.000000000Z",
        )


def test_a_listing_looks_into_each_point_once() -> None:
    disks = FakeDisks()
    tree = grown([active(), snapshot(b"s")], disks)

    tree.resolve(tree.root)
    tree.resolve(tree.root)

    assert disks.looked == 2


def test_a_point_that_may_change_is_not_looked_into() -> None:
    disks = FakeDisks()
    tree = grown([active(frozen=False), snapshot(b"s")], disks, live=True)

    tree.resolve(tree.root)

    assert disks.looked == 1
    assert tree.folder(tree.root, b"current") is None


@pytest.mark.expect_warnings
def test_a_listing_does_not_wait_for_hostile_points(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trees, "LOOK_SECONDS", -1.0)
    disks = FakeDisks()
    tree = grown([active(), snapshot(b"s")], disks)

    tree.resolve(tree.root)

    assert disks.looked == 0
    assert "some directories are not listed" in caplog.text


@pytest.mark.expect_warnings
def test_a_disk_that_could_not_be_read_is_looked_into_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Away(FakeDisks):
        def inside(self, point: Point, name: str) -> tuple[Contents, list[Mapped | None]]:
            self.looked += 1
            if self.looked == 1:
                raise ReadFault("/images/top.qcow2", 0, 0, "it is away", errno.EIO)
            return Contents([], ["the first sector cannot be read"] if self.looked == 2 else []), []

    disks = Away()
    tree = grown([active()], disks)
    folder = tree.folder(tree.root, b"current")
    assert folder is not None

    tree.resolve(tree.root)
    assert (tree.resolved(tree.root), folder.known, disks.looked) == (True, False, 1)
    monkeypatch.setattr(folders, "AGAIN_SECONDS", 0.0)
    folder._again = 0.0
    for looked, known in ((2, False), (3, True), (3, True)):
        assert tree.resolved(tree.root) == (looked == 3 and disks.looked == 3)
        tree.resolve(tree.root)
        assert (disks.looked, folder.known) == (looked, known)


def test_what_changed_is_counted_against_the_next_older_point_and_once() -> None:
    disks = FakeDisks()
    old, new, now = snapshot(b"old", b"1", date=1), snapshot(b"new", b"2", ordinal=1, date=5), active(date=3)
    tree = grown([now, new, old], disks)

    found = {name: tree.lookup(tree.root, name) for name in (b"old.raw", b"new.raw", b"current.raw")}

    assert [isinstance(node, DiskFile) and node.has_predecessor for node in found.values()] == [False, True, True]
    assert [node.changed() for node in found.values() if isinstance(node, DiskFile)] == [None, 512, 512]
    assert [node.changed() for node in found.values() if isinstance(node, DiskFile)] == [None, 512, 512]
    assert disks.compared == [(new, old), (now, new)]


class TestFollow:
    """A tree that shows other points from now on."""

    def test_the_same_point_keeps_its_node_and_what_is_new_has_one(self) -> None:
        old, new = snapshot(b"old", date=1), snapshot(b"new", date=2)
        tree = grown([active(), old])
        kept = file(tree, b"old.raw")

        changed = tree.follow([tree.points[0], old, new], FakeDisks())

        assert file(tree, b"old.raw") is kept
        assert tree.node(file(tree, b"new.raw").place.ino) is file(tree, b"new.raw")
        assert set(changed) == {b"new.raw", b"new", b"latest.raw"}
        assert tree.root.attributes().mtime_ns == 2 * SECOND

    def test_nothing_new_changes_nothing(self) -> None:
        tree = grown([active(), snapshot(b"s")])

        assert tree.follow(tree.points, FakeDisks()) == []

    def test_a_point_that_is_gone_has_no_name_and_no_node(self) -> None:
        tree = grown([active(), snapshot(b"s")])
        number = file(tree, b"s.raw").place.ino

        changed = tree.follow(tree.points[:1], FakeDisks())

        assert set(changed) == {b"s.raw", b"s", b"latest.raw"}
        assert set(tree.root.entries) == {b"current.raw"}
        assert tree.folder(tree.root, b"s") is None
        with pytest.raises(KeyError):
            tree.node(number)

    def test_a_file_that_is_open_keeps_its_node_until_it_is_closed(self) -> None:
        tree = grown([active(), snapshot(b"s")])
        node = file(tree, b"s.raw")
        node.open()

        tree.follow(tree.points[:1], FakeDisks())
        while_open = tree.node(node.place.ino)
        node.release()
        tree.follow(tree.points, FakeDisks())

        assert while_open is node
        with pytest.raises(KeyError):
            tree.node(node.place.ino)

    def test_another_point_of_the_same_name_is_another_file(self) -> None:
        tree = grown([active(), snapshot(b"s", date=1)])
        before = file(tree, b"s.raw")

        changed = tree.follow([tree.points[0], snapshot(b"s", date=1)], FakeDisks())

        after = file(tree, b"s.raw")
        assert after is not before
        assert after.place.ino != before.place.ino
        assert {b"s.raw", b"s"} <= set(changed)

    def test_as_many_points_as_there_can_be_go_without_a_search_for_each(self) -> None:
        def seconds(count: int) -> float:
            tree = grown([snapshot(b"%d" % number) for number in range(count)])
            start = time.process_time()
            tree.follow([], FakeDisks())
            return time.process_time() - start

        assert seconds(8_000) < 30 * seconds(500)  # it would be 256 times as long

    def test_changes_are_counted_since_the_point_that_is_before_it_now(self) -> None:
        disks = FakeDisks()
        first, second, third = (snapshot(name, date=date) for date, name in enumerate((b"1", b"2", b"3")))
        tree = grown([first, second, third], disks)
        node = file(tree, b"3.raw")
        assert isinstance(node, DiskFile)
        node.changed()

        tree.follow([first, third], disks)
        node.changed()

        assert disks.compared == [(third, second), (third, first)]

    @pytest.mark.expect_warnings
    def test_who_reads_what_is_gone_is_heard(self) -> None:
        heard: list[str] = []
        tree = grown([active(), snapshot(b"s")])
        tree.hear_of_stale(lambda: heard.append("stale"))

        file(tree, b"s.raw").report(ReadFault("image", 0, 0, "the snapshot was deleted", errno.ESTALE))
        file(tree, b"s.raw").report(ReadFault("image", 0, 0, "the read failed", errno.EIO))

        assert heard == ["stale"]

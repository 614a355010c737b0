"""What a mount shows: the same suite on the handlers without FUSE, and on real mounts with and without the plane."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.mount.images import Expected, Story
from tests.mount.views import View, handlers_view, mount_view
from tests.support.mounts import force_unmount, need_fuse

MOUNTS = {"mount": (), "mount without the data plane": ("--no-data-plane",)}  # with these options


@pytest.fixture(scope="module", params=["handlers", *MOUNTS])
def view(request: pytest.FixtureRequest, story: Story, tmp_path_factory: pytest.TempPathFactory) -> Iterator[View]:
    if request.param == "handlers":
        pytest.importorskip("pyfuse3")
        with handlers_view(story.image) as handlers:
            yield handlers
        return
    need_fuse()
    target = tmp_path_factory.mktemp("view") / "mnt"
    target.mkdir()
    with ExitStack() as stack:
        stack.callback(force_unmount, target)
        yield stack.enter_context(mount_view(story.image, target, *MOUNTS[request.param]))


NAMES = [
    *("current.raw", "before-upgrade.raw", "two%2F..%2Fx y.raw", "one#3.raw", "one#4.raw", "2.raw", "%FF%FE.raw"),
    *("latest#7.raw", "data.raw", "data@before-upgrade.raw"),
]


@pytest.fixture(params=NAMES)
def expected(request: pytest.FixtureRequest, story: Story) -> Expected:
    return next(found for found in story.expected if found.name == request.param)


def test_r50_each_state_of_each_layer_has_a_file(view: View, story: Story) -> None:
    assert {found.name for found in story.expected} == set(NAMES)
    assert view.names() == {*NAMES, "latest.raw"}


def test_r53_a_file_is_as_long_as_its_point_was_then(view: View, expected: Expected) -> None:
    assert view.status(expected.name).size == expected.size


def test_r48_r52_a_file_holds_what_qemu_reads(view: View, expected: Expected) -> None:
    content = expected.content.read_bytes()

    found = b"".join(view.read(expected.name, offset, 1 << 17) for offset in range(0, expected.size, 1 << 17))

    assert found == content[: expected.size]


def test_r57_a_files_dates_are_its_points(view: View, expected: Expected) -> None:
    status = view.status(expected.name)

    assert {expected.date_ns} == {status.mtime_ns, status.ctime_ns, status.atime_ns}


def test_a_file_is_read_only_and_belongs_to_the_person(view: View, expected: Expected) -> None:
    status = view.status(expected.name)

    assert status.mode == stat.S_IFREG | 0o444
    assert (status.nlink, status.uid, status.gid) == (1, os.getuid(), os.getgid())


def test_a_files_blocks_are_what_its_own_layer_allocates(view: View, expected: Expected) -> None:
    allocated = view.status(expected.name).blocks * 512

    if expected.name == "data@before-upgrade.raw":  # 3 MiB were written into it, and nothing else happened
        assert allocated == 3 << 20
    assert 0 < allocated < expected.size


def test_a_snapshot_of_less_has_fewer_blocks(view: View) -> None:
    assert view.status("before-upgrade.raw").blocks < view.status("latest#7.raw").blocks


def test_extended_attributes_say_what_a_file_is(view: View, expected: Expected) -> None:
    found = view.xattrs(expected.name)

    assert found.pop("virtual_size") == b"%d" % expected.size
    assert found.pop("date").endswith(b"%09dZ" % (expected.date_ns % 1_000_000_000))
    assert found.pop("changed", b"0").isdigit()
    assert expected.xattrs == found


def test_a_point_says_how_much_changed_since_the_one_before_it(view: View, story: Story) -> None:
    contents = {expected.name: expected.content for expected in story.expected}
    for before, name in (("one#3.raw", "one#4.raw"), ("2.raw", "%FF%FE.raw"), ("%FF%FE.raw", "latest#7.raw")):
        differing = units_that_differ(contents[before].read_bytes(), contents[name].read_bytes())
        # What a compressed cluster replaces cannot be known without reading it.
        assert differing <= int(view.xattr(name, "user.qcowfs.changed")) <= differing + 256 * 1024
    assert "changed" not in view.xattrs("data.raw")


def units_that_differ(one: bytes, other: bytes) -> int:
    """Return the bytes of all units of 4 KiB that are not the same."""
    return sum(4096 for place in range(0, len(one), 4096) if one[place : place + 4096] != other[place : place + 4096])


def test_an_extended_attribute_that_is_not_there_is_enodata(view: View) -> None:
    with pytest.raises(OSError) as failure:
        view.xattr("current.raw", "user.qcowfs.nothing")

    assert failure.value.errno == errno.ENODATA


def test_latest_is_a_link_to_the_newest_point(view: View, story: Story) -> None:
    assert view.link("latest.raw") == story.latest
    assert view.status("latest.raw").mode == stat.S_IFLNK | 0o777
    assert view.status("latest.raw").size == len(story.latest)


def test_the_root_is_a_read_only_directory(view: View) -> None:
    status = view.status(".")

    assert (status.ino, status.mode, status.nlink) == (1, stat.S_IFDIR | 0o555, 1)
    assert view.status("..").mode & stat.S_IFDIR


def test_every_file_has_a_number_of_its_own(view: View) -> None:
    numbers = {view.status(name).ino for name in view.names()}

    assert len(numbers) == len(view.names())
    assert min(numbers) > 1


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (511, 2), (65535, 2), (1 << 20, 131072), ((6 << 20) - 1, 2), (6 << 20, 1), ((6 << 20) + 1, 4096)],
)
def test_reads_anywhere_end_where_the_disk_ends(view: View, story: Story, offset: int, length: int) -> None:
    content = story.expected[0].content.read_bytes()

    assert view.read("current.raw", offset, length) == content[offset : offset + length]


@pytest.mark.parametrize("name", ["nope", "current", "current.raw.raw", "x" * 255])
def test_a_name_that_is_not_there_is_enoent(view: View, name: str) -> None:
    for _ in range(2):  # the second answer comes from the kernel's memory
        with pytest.raises(OSError) as failure:
            view.status(name)
        assert failure.value.errno == errno.ENOENT


def test_every_writing_call_is_erofs(view: View) -> None:
    calls = view.writing_calls("current.raw")

    answers = {}
    for word, call in calls.items():
        with pytest.raises(OSError) as failure:
            call()
        answers[word] = errno.errorcode[failure.value.errno or 0]

    assert len(answers) >= 14
    assert answers == dict.fromkeys(calls, "EROFS")


def test_access_allows_reading_and_nothing_else(view: View) -> None:
    assert view.may("current.raw", os.R_OK)
    assert not view.may("current.raw", os.W_OK)
    assert not view.may("current.raw", os.X_OK)
    assert view.may(".", os.R_OK | os.X_OK)
    assert not view.may(".", os.W_OK)


def test_statfs_shows_what_the_chain_occupies_and_no_free_space(view: View, story: Story) -> None:
    files = (story.image, story.image.with_name("data.qcow2"))
    occupied = sum(path.stat().st_blocks * 512 for path in files)

    space = view.space()

    assert space["f_blocks"] * space["f_frsize"] == -(-occupied // 4096) * 4096
    assert (space["f_bfree"], space["f_bavail"], space["f_ffree"]) == (0, 0, 0)
    assert (space["f_files"], space["f_namemax"]) == (len(NAMES) + 2, 255)


def test_names_and_numbers_are_the_same_in_the_next_mount(view: View, story: Story, tmp_path: Path) -> None:
    with handlers_view(story.image) as again:
        assert view.names() == again.names()
        assert {name: view.status(name).ino for name in view.names()} == {
            name: again.status(name).ino for name in again.names()
        }

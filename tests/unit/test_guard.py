"""Guards: what was read is right if they hold afterwards."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from qcowfs._cache import Cache
from qcowfs._core import Disk
from qcowfs._guard import Guard
from qcowfs._mapped import Mapped
from qcowfs._source import FileSource
from qcowfs._tables import LayerMap
from qcowfs.errors import CorruptImage, ReadFault
from qcowfs.source.file import open_file
from tests.support.remotebase import RemoteBase

TABLE, PLACE = 4096, 4200
ENTRY = bytes(range(256)) * 3  # longer than what is compared at once
WRITE = 101  # QEMU's byte of "I write"
Found = tuple[int, int, int] | None


class Image:
    """A file with a header that names a table, and an entry in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_bytes(bytes(16384))
        self.put(TABLE, 1, PLACE)
        self.source = FileSource(os.open(path, os.O_RDONLY), str(path))
        self.looked = 0
        self.found: Found | Exception = None

    def put(self, table: int, count: int, place: int, entry: bytes = ENTRY) -> None:
        with self.path.open("r+b") as file:
            file.seek(60)
            file.write(struct.pack(">IQ", count, table))
            file.seek(place)
            file.write(entry)

    def find(self) -> Found:
        self.looked += 1
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def guard(self) -> Guard:
        return Guard.snapshot(self.source, ENTRY, self.find, depth=2, table=TABLE, count=1, place=PLACE)


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    made = Image(tmp_path / "image")
    yield made
    made.source.close()


def test_a_snapshot_holds_while_its_entry_is_where_it_was(image: Image) -> None:
    guard = image.guard()

    assert [guard.check(), guard.check(), image.looked] == [0, 0, 0]


@pytest.mark.parametrize("place", [0, 511, 512, len(ENTRY) - 1])
def test_another_entry_at_the_same_place_is_looked_for(image: Image, place: int) -> None:
    """Deleted and made again, a table is back where it was, with as many entries."""
    guard = image.guard()
    image.put(TABLE, 1, PLACE, ENTRY[:place] + bytes([ENTRY[place] ^ 1]) + ENTRY[place + 1 :])

    assert [guard.check(), image.looked] == [errno.ESTALE, 1]


def test_a_snapshot_that_is_found_elsewhere_holds_and_is_looked_for_once(image: Image) -> None:
    guard = image.guard()
    image.put(8192, 2, 8300)
    image.found = (8192, 2, 8300)

    assert [guard.check(), guard.check(), image.looked] == [0, 0, 1]


def test_what_is_gone_never_comes_back(image: Image) -> None:
    guard = image.guard()
    image.put(0, 0, PLACE)
    first = guard.check()
    image.put(TABLE, 1, PLACE)

    assert [first, guard.check(), image.looked] == [errno.ESTALE, errno.ESTALE, 1]


def test_a_table_that_cannot_be_read_is_an_error_that_passes(image: Image) -> None:
    guard = image.guard()
    image.put(0, 0, PLACE)
    image.found = CorruptImage("image", "bad snapshot table at 0x0", "it moves")
    first = guard.check()
    image.put(TABLE, 1, PLACE)

    assert [first, guard.check()] == [errno.EIO, 0]


def test_an_image_that_is_cut_before_its_header_does_not_hold(image: Image) -> None:
    guard = image.guard()
    os.truncate(image.path, 65)

    assert guard.check() == errno.ESTALE


def test_a_file_holds_until_it_is_written(image: Image) -> None:
    guard = Guard.file(image.source, depth=0, modified_ns=os.stat(image.path).st_mtime_ns)
    before = guard.check()
    os.utime(image.path, ns=(0, 7))

    assert [before, guard.check()] == [0, errno.ESTALE]


def test_a_device_holds_while_nobody_has_the_lock_for_writing(image: Image) -> None:
    guard, late = Guard.device(image.source, depth=0), Guard.device(image.source, depth=0)
    with image.path.open("rb") as other:
        before = guard.check()
        lock = struct.pack("@hhqqi0q", fcntl.F_RDLCK, os.SEEK_SET, WRITE, 1, 0)
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, lock)

        assert [before, guard.check(), late.check()] == [0, errno.ESTALE, errno.ESTALE]


class Far:
    """The same image on a server, which is slow when it shall be."""

    def __init__(self) -> None:
        self.base = RemoteBase(bytes(16384))
        self.guard = Guard.snapshot(self.base.source, ENTRY, lambda: None, depth=0, table=TABLE, count=1, place=PLACE)
        self.put(1)

    def put(self, count: int) -> None:
        content = bytearray(16384)
        content[60:72] = struct.pack(">IQ", count, TABLE)
        content[PLACE : PLACE + len(ENTRY)] = ENTRY
        self.base.content = bytes(content)


@pytest.fixture
def far() -> Iterator[Far]:
    made = Far()
    yield made
    made.base.source.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


def checks(far: Far, threads: ThreadPoolExecutor, count: int) -> list[Future[int]]:
    """Let `count` more readers check, and return when they have begun."""
    begun = threading.Barrier(count + 1)

    def check() -> int:
        begun.wait()
        return far.guard.check()

    futures = [threads.submit(check) for _ in range(count)]
    begun.wait()
    time.sleep(0.1)  # one that is slower only looks for himself
    return futures


def test_readers_of_a_server_share_the_look_that_begins_after_all_of_them(
    far: Far, threads: ThreadPoolExecutor
) -> None:
    far.base.hold()
    first = checks(far, threads, 1)
    far.base.wait_for_requests(1)
    others = checks(far, threads, 14)
    far.base.release()
    requests_of_one = 1 + len(ENTRY) // 512 + 1

    assert [0] * 15 == [done.result() for done in first + others]
    assert len(far.base.requests) <= 7 * requests_of_one, "one of the first, one of the others, some of who came late"


def test_a_look_that_began_before_a_read_says_nothing_of_it(far: Far, threads: ThreadPoolExecutor) -> None:
    far.base.hold()
    first = checks(far, threads, 1)
    far.base.wait_for_requests(1)  # its answer is on its way: it was there
    far.put(0)
    others = checks(far, threads, 3)
    far.base.release()

    assert ([errno.ESTALE] * 3, 1) == ([done.result() for done in others], len(first))


def test_who_waited_for_a_look_that_failed_does_not_wait_again(far: Far, threads: ThreadPoolExecutor) -> None:
    """A silent server is waited for once."""

    def find() -> Found:
        raise CorruptImage("image", "cannot be read", "nobody answers")

    far.guard = Guard.snapshot(far.base.source, ENTRY, find, depth=0, table=TABLE, count=1, place=PLACE)
    far.base.failure = errno.EIO
    asked = []
    for _ in range(5):  # on a busy machine some come too late
        far.base.requests.clear()
        far.base.hold()
        first = checks(far, threads, 1)
        far.base.wait_for_requests(1)
        others = checks(far, threads, 14)
        far.base.release()
        assert [errno.EIO] * 15 == [done.result() for done in first + others]
        asked.append(len(far.base.requests))
        if asked[-1] == 1:
            break

    assert 1 in asked
    far.base.failure = 0
    assert far.guard.check() == 0


def test_readers_of_a_server_never_miss_a_deletion(far: Far, threads: ThreadPoolExecutor) -> None:
    """Whoever begins to check after it hears of it, however many check at the moment."""
    gone = threading.Event()

    def check() -> None:
        late = False
        while not late:
            late = gone.is_set()
            result = far.guard.check()
            assert result in (0, errno.ESTALE)
            assert result == errno.ESTALE or not late

    readers = [threads.submit(check) for _ in range(8)]
    time.sleep(0.05)
    far.put(0)
    gone.set()
    for done in readers:
        done.result()


@pytest.fixture(params=["a disk", "a file of a disk"])
def read(request: pytest.FixtureRequest, image: Image) -> Callable[[], bytes]:
    layer = LayerMap.raw(image.source, depth=0, virtual_size=4096)
    disk = Disk([layer], 4096, Cache(1 << 20), 0, [image.guard()])
    if request.param == "a disk":
        return lambda: disk.pread(0, 512)
    mapped = Mapped(1024, [disk], [(0, 512, 0, 0), (512, 512, 0, 2048)])
    return lambda: mapped.pread(0, 1024)


def test_a_read_fails_whose_guard_does_not_hold(image: Image, read: Callable[[], bytes]) -> None:
    before = read()
    image.put(0, 0, PLACE)

    with pytest.raises(ReadFault, match="the snapshot was deleted") as caught:
        read()

    assert before[60:72] == struct.pack(">IQ", 1, TABLE)
    assert (caught.value.errno, caught.value.depth) == (errno.ESTALE, 2)


def test_a_hole_that_may_be_none_is_data(image: Image) -> None:
    """Nobody may skip it: reading it is an error."""
    layers = [LayerMap.raw(image.source, depth=0, virtual_size=4096)]
    disk = Disk(layers, 4096, Cache(1 << 20), 0, [image.guard()])
    image.put(0, 0, PLACE)

    assert disk.seek(512, os.SEEK_DATA) == 512
    assert disk.seek(512, os.SEEK_HOLE) == 4096
    with pytest.raises(ReadFault):
        disk.extents(0, 4096, 10)


def test_a_source_of_the_same_file_needs_no_descriptor_of_its_own(image: Image) -> None:
    count = len(os.listdir("/proc/self/fd"))
    sources = [image.source.again() for _ in range(3)]
    again = sources[0].again() if sources[0] is not None else None
    assert again is not None
    del sources

    assert len(os.listdir("/proc/self/fd")) == count
    assert again.read_at(60, 12) == image.source.read_at(60, 12)
    again.close()
    assert image.source.read_at(0, 1) == b"\0"


def test_a_source_that_goes_in_a_circle_of_references_leaves_the_descriptor_to_its_owner(image: Image) -> None:
    """The collector of circles takes what it collects apart: also what says that the descriptor is another's."""
    circle: list[object] = [image.source.again()]
    circle.append(circle)
    del circle

    gc.collect()

    assert image.source.read_at(0, 1) == b"\0"


def test_a_file_that_was_written_just_now_is_waited_for(tmp_path: Path) -> None:
    """Two writes within one tick of the clock have the same time."""
    path = tmp_path / "file"
    path.write_bytes(b"1")
    file = open_file(os.open(path, os.O_RDONLY), str(path))
    settled = file.settled().modified_ns
    path.write_bytes(b"2")
    file.close()

    assert os.stat(path).st_mtime_ns != settled


def test_a_file_whose_time_has_whole_seconds_is_waited_for_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FAT counts two seconds, ext4 with small inodes one."""
    path = tmp_path / "file"
    path.write_bytes(b"1")
    now = int(time.time())
    os.utime(path, (now, now))
    file = open_file(os.open(path, os.O_RDONLY), str(path))
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    file.settled()
    os.utime(path, (now - 3, now - 3))
    before = len(slept)
    file.settled()
    file.close()

    assert slept[0] >= 2
    assert len(slept) == before

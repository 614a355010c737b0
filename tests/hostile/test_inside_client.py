"""Workers that were taken over: whatever they send, a request ends in time, with EIO and nothing worse."""

from __future__ import annotations

import errno
import random
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from qcowfs import limits
from qcowfs.errors import TreeFault
from qcowfs.inside import answer
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Worker
from qcowfs.inside.places import Places
from qcowfs.inside.reader import DIGEST
from qcowfs.inside.record import ENTRY, EXTENT, INODE, Extent, pack_entry
from qcowfs.inside.wire import EXTENTS, HEAD, PAIR, SPAN, WANT, Kind, pack_pairs
from tests.support.fakereader import inode

SIZE = 1 << 20
OPENED = (2).to_bytes(8, "little")
Script = Callable[[socket.socket], None]
pytestmark = pytest.mark.expect_warnings


class FakeLauncher:
    """Hands out sockets with a thread of the test at the other end."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.threads: list[threading.Thread] = []
        self.places = Places()
        self.is_closed = False
        self.opened = OPENED

    def spawn(self, kind: str) -> Worker:
        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=self.run, args=(theirs,))
        thread.start()
        self.threads.append(thread)
        return Worker(ours, 1, 1)

    def run(self, channel: socket.socket) -> None:
        with channel:
            try:
                channel.recv(1 << 16)
                channel.sendall(HEAD.pack(Kind.ANSWER, 1, len(self.opened)) + self.opened)
                channel.recv(1 << 16)
                self.script(channel)
                while channel.recv(1 << 16):
                    pass
            except OSError:
                pass

    def end(self, worker: Worker) -> str:
        return ""


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(limits, "INSIDE_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(limits, "INSIDE_REQUEST_BYTES", 64 << 20)
    yield


def endless(channel: socket.socket) -> None:
    while True:
        channel.sendall(HEAD.pack(Kind.WANT, 2, WANT.size) + WANT.pack(0, 4096))
        channel.recv(1 << 16)


def drip(channel: socket.socket) -> None:
    for byte in HEAD.pack(Kind.ANSWER, 2, 1000) + bytes(1000):
        channel.sendall(bytes([byte]))
        time.sleep(0.02)


def flood(channel: socket.socket) -> None:
    """Ask for ever and take no answer."""
    while True:
        channel.sendall(HEAD.pack(Kind.WANT, 2, WANT.size) + WANT.pack(0, SIZE))


def message(kind: int, number: int, body: bytes, length: int | None = None) -> Script:
    packed = HEAD.pack(kind, number, len(body) if length is None else length) + body
    return lambda channel: channel.sendall(packed)


SCRIPTS: dict[str, Script] = {
    "silent": lambda channel: None,
    "closes": lambda channel: channel.shutdown(socket.SHUT_RDWR),
    "closes within": lambda channel: (channel.sendall(b"\x10"), channel.shutdown(socket.SHUT_RDWR)),  # type: ignore
    "garbage": lambda channel: channel.sendall(random.Random(1).randbytes(4096)),
    "huge": message(Kind.ANSWER, 2, b"", 0xFFFFFFFF),
    "another request": message(Kind.ANSWER, 1, inode(7)),
    "another inode": message(Kind.ANSWER, 2, inode(8)),
    "unknown": message(99, 2, b""),
    "refuses late": message(Kind.UNREADABLE, 2, b"no"),
    "wants too much": message(Kind.WANT, 2, WANT.pack(0, limits.INSIDE_WANT + 1)),
    "wants beyond": message(Kind.WANT, 2, WANT.pack(SIZE - 1, 2)),
    "short want": message(Kind.WANT, 2, b"abc"),
    "short error": message(Kind.ERROR, 2, b"ab"),
    "endless": endless,
    "drip": drip,
    "flood": flood,
}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_a_request_ends_in_time_with_eio(script: Script) -> None:
    launcher = FakeLauncher(script)
    tree = Tree(launcher, "disk", "any", SIZE, lambda offset, length: bytes(length), True)  # type: ignore[arg-type]
    began = time.monotonic()
    with pytest.raises(TreeFault, match="its reader crashed") as caught:
        tree.stat(7)

    assert errno.EIO == caught.value.errno
    assert time.monotonic() - began < 3
    for thread in launcher.threads:
        thread.join(5)
        assert not thread.is_alive()


@pytest.mark.parametrize(("length", "questions"), [(1, 1024), (SIZE, 64)])
def test_the_volume_is_not_read_for_ever(length: int, questions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast it is: for one request a worker gets 64 MiB here, or 1,024 pieces of up to a block."""
    monkeypatch.setattr(limits, "INSIDE_ANSWER_SECONDS", 30)
    answered = []

    def insatiable(channel: socket.socket) -> None:
        while True:
            channel.sendall(HEAD.pack(Kind.WANT, 2, WANT.size) + WANT.pack(0, length))
            left = HEAD.size + length
            while left and (piece := channel.recv(left)):
                left -= len(piece)
            if left:
                return
            answered.append(length)

    launcher = FakeLauncher(insatiable)
    tree = Tree(launcher, "disk", "any", SIZE, lambda offset, length: bytes(length), True)  # type: ignore[arg-type]
    with pytest.raises(TreeFault, match="it read more than 64 MiB for one request"):
        tree.stat(7)
    launcher.threads[0].join(5)

    assert questions == len(answered)


def test_an_unknown_errno_becomes_eio_and_the_worker_stays() -> None:
    launcher = FakeLauncher(message(Kind.ERROR, 2, struct.pack("<I", 4000) + b"\x1b[2J"))
    tree = Tree(launcher, "disk", "any", SIZE, lambda offset, length: bytes(length), True)  # type: ignore[arg-type]
    with pytest.raises(TreeFault, match=r"disk: \\x1b\[2J") as caught:
        tree.stat(7)
    tree.close()

    assert errno.EIO == caught.value.errno


def test_facts_are_few_short_and_printable() -> None:
    launcher = FakeLauncher(lambda channel: None)
    launcher.opened = OPENED + pack_pairs({b"k%d\n" % number: b"\x1b[2J" * 200 for number in range(500)})
    tree = Tree(launcher, "disk", "any", SIZE, lambda offset, length: bytes(length), True)  # type: ignore[arg-type]
    facts = tree.facts()
    tree.close()

    assert 16 == len(facts)
    assert all(name.isprintable() and value.isprintable() for name, value in facts.items())
    assert max(map(len, facts.values())) <= 4 * limits.INSIDE_ERROR


def entry(name: bytes = b"name", cookie: int = 5, extents: list[Extent] | None = None, body: bytes = b"") -> bytes:
    return pack_entry(name, body or inode(7), cookie, extents)


NAMES = [b"", b".", b"..", b"a/b", b"a\0", b"n" * 256]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_no_file_can_have_is_refused(name: bytes) -> None:
    with pytest.raises(ValueError, match="name"):
        answer.entries(entry() + entry(name, 6), 0, SIZE)


@pytest.mark.parametrize(
    "extents",
    [
        [Extent(0, 0, 0)],
        [Extent(0, 10, SIZE - 9)],
        [Extent(0, 10, 0), Extent(9, 1, 0)],
        [Extent((1 << 20) - 1, 2, 0)],
        [Extent(0, 1, (1 << 64) - 1)],
        [Extent((1 << 64) - 1, 5, 0)],
    ],
)
def test_extents_that_lie_are_refused(extents: list[Extent]) -> None:
    packed = b"".join(EXTENT.pack(*extent) for extent in extents)
    with pytest.raises(ValueError, match="an extent's place"):
        answer.entries(entry(extents=extents), 0, SIZE)
    with pytest.raises(ValueError, match="an extent's place"):
        answer.extents(EXTENTS.pack(1, 1 << 20, len(extents)) + packed, 9, SIZE)


@pytest.mark.parametrize("count", [3, 10, 0xFFFFFFFF])
def test_a_count_of_extents_that_lies_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match="count"):
        answer.extents(EXTENTS.pack(1, 100, count) + EXTENT.pack(0, 1, 0) * 2, 5, SIZE)


@pytest.mark.parametrize(
    ("field", "value"), [(0, 0), (0, 1 << 40), (1, 1 << 63), (6, 10**9), (9, 0), (9, 0xFFFFFFFF), (15, 4096)]
)
def test_an_inode_that_lies_is_refused(field: int, value: int) -> None:
    fields = list(INODE.unpack(inode(7)))
    fields[field] = value
    with pytest.raises(ValueError, match="inode"):
        answer.inode(INODE.pack(*fields), fields[0])


def test_entries_that_go_nowhere_are_refused() -> None:
    back_and_forth = entry(cookie=9) + entry(cookie=7)
    for wrong in (entry(cookie=5), entry(cookie=0), entry(cookie=4), entry(cookie=1 << 63), back_and_forth):
        with pytest.raises(ValueError, match="cookie"):
            answer.entries(wrong, 5, SIZE)
    assert answer.entries(good := entry(cookie=6) + entry(cookie=(1 << 63) - 1), 5, SIZE) == good


def test_changed_entries_are_refused_or_still_keep_the_rules() -> None:
    rng = random.Random(20)
    good = b"".join(entry(b"n%d" % n, n + 1, [Extent(0, 5, n)]) for n in range(4))
    refused = 0
    for _ in range(500):
        changed = bytearray(good[: rng.randrange(1, len(good) + 1)])
        changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            kept = answer.entries(bytes(changed), 0, SIZE)
        except ValueError:
            refused += 1
            continue
        place = 0
        while place < len(kept):
            assert stat.S_IFMT(INODE.unpack_from(kept, place + ENTRY.size)[9])
            place += ENTRY.unpack_from(kept, place)[3]
        assert place == len(kept)
    assert refused > 100


@pytest.mark.parametrize(
    "body",
    [b"abc", PAIR.pack(3, 5) + b"abc", PAIR.pack(0, 0), PAIR.pack(1, 0xFFFFFFFF) + b"a", pack_pairs({b"a": b""}) * 2],
)
def test_pairs_that_lie_are_refused(body: bytes) -> None:
    with pytest.raises(ValueError, match="pair"):
        answer.pairs(body)


SPANS = [
    [(0, 0)],
    [(10, 9)],
    [(0, SIZE + 1)],
    [(0, 10), (9, 20)],
    [(0, (1 << 64) - 1)],
    [(number, number + 1) for number in range(limits.INSIDE_RANGES + 1)],
]


@pytest.mark.parametrize("spans", SPANS, ids=range(len(SPANS)))
def test_a_layout_that_no_volume_has_is_refused(spans: list[tuple[int, int]]) -> None:
    body = bytes(DIGEST) + b"".join(SPAN.pack(*span) for span in spans)
    with pytest.raises(ValueError, match=r"range|length"):
        answer.layout(body, SIZE)


@pytest.mark.parametrize("length", [0, DIGEST - 1, DIGEST + 1, DIGEST + SPAN.size - 1])
def test_a_layout_that_is_cut_off_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match="length"):
        answer.layout(bytes(length), SIZE)


@pytest.mark.parametrize("body", [b"\1", b"\1" + bytes(DIGEST - 1), bytes(DIGEST) + entry()[:-1]])
def test_what_may_differ_that_is_cut_off_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        answer.unproven(body, SIZE)


def test_an_answer_where_none_is_is_refused() -> None:
    with pytest.raises(ValueError, match="where none is"):
        answer.nothing(b"0")

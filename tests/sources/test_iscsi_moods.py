"""What a target may answer besides data. Evidence: own fixture, a target of our own, after RFC 7143."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

from qcowfs._source import Source
from qcowfs.source.iscsi import open_url
from qcowfs.source.remote import RemoteSettings
from qcowfs.source.url import parse_url
from tests.support.wildtarget import WildTarget
from tests.support.workers import eventually

CONTENT = random.Random(2).randbytes(64 << 10)
OFFSET, LENGTH = 1000, 20000  # neither begins nor ends with a block


@pytest.fixture
def target() -> Iterator[WildTarget]:
    target = WildTarget(CONTENT)
    yield target
    target.close()


@pytest.fixture
def source(target: WildTarget) -> Iterator[Source]:
    source = opened(target)
    yield source
    source.close()


def opened(target: WildTarget, patience: float = 10) -> Source:
    return open_url(parse_url(target.url), RemoteSettings(patience=patience)).source


def read(source: Source) -> bytes | int | None:
    """Return the bytes, or the errno."""
    try:
        return source.read_at(OFFSET, LENGTH)
    except OSError as error:
        return error.errno


@pytest.mark.parametrize(
    ("moods", "logins"),
    [
        ([], 1),
        (["busy"] * 3, 1),
        (["full"] * 2, 1),
        (["attention"], 1),
        (["attention", "busy", "attention"], 1),
        (["close"], 2),
        (["close", "busy"], 2),
        (["none"], 2),
    ],
)
def test_what_passes_is_waited_for(target: WildTarget, source: Source, moods: list[str], logins: int) -> None:
    target.moods.extend(moods)

    assert CONTENT[OFFSET : OFFSET + LENGTH] == read(source)
    assert (len(moods) + 1, logins) == (target.reads, target.logins)


@pytest.mark.expect_warnings
@pytest.mark.parametrize("mood", ["medium", "short", "reserved"])
def test_what_does_not_pass_is_an_error_once(target: WildTarget, source: Source, mood: str) -> None:
    target.moods.append(mood)

    assert errno.EIO == read(source)
    assert CONTENT[OFFSET : OFFSET + LENGTH] == read(source)
    assert (2, 1) == (target.reads, target.logins)


def test_a_unit_that_stays_busy_is_an_error_after_the_patience(target: WildTarget) -> None:
    source = opened(target, patience=0.3)
    target.moods.extend(["busy"] * 1000)
    try:
        assert errno.EIO == read(source)
        assert target.reads < 30, "there are pauses"
    finally:
        source.close()


@pytest.mark.expect_warnings
def test_a_connection_that_breaks_twice_is_worth_a_line(
    target: WildTarget, source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    target.moods.extend(["close", "close"])

    assert CONTENT[OFFSET : OFFSET + LENGTH] == read(source)
    # The log takes one at a time: at an outage as short as this one it may miss the beginning.
    assert eventually(lambda: f"{source.name}: the target answers again" in caplog.messages)
    assert {f"{source.name}: the connection was lost; connecting again, while reads wait"} >= set(caplog.messages[:-1])


@pytest.mark.expect_warnings
def test_another_serial_number_after_a_new_login_is_another_unit(target: WildTarget, source: Source) -> None:
    target.serial = b"two"
    target.moods.append("close")

    assert [errno.ESTALE] * 2 == [read(source), read(source)]


def test_every_byte_of_the_disk_by_unaligned_reads(source: Source) -> None:
    pieces = []
    offset = 0
    chance = random.Random(3)
    while offset < len(CONTENT):
        pieces.append(source.read_at(offset, chance.randrange(1, 3000)))
        offset += len(pieces[-1])

    assert CONTENT == b"".join(pieces)

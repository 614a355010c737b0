"""Sources of Python functions: the same rules as of any other source, whatever the function does."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable

import pytest

from qcowfs._pysource import PythonSource

CONTENT = b"0123456789"
Read = Callable[[int, memoryview], int]


def filled(offset: int, buffer: memoryview) -> int:
    buffer[:] = CONTENT[offset : offset + len(buffer)]
    return len(buffer)


def one_byte(offset: int, buffer: memoryview) -> int:
    return filled(offset, buffer[:1])


def source_of(read: Read) -> PythonSource:
    return PythonSource("here://ten", len(CONTENT), read, ("here", "ten"))


@pytest.mark.parametrize("read", [filled, one_byte])
@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, 10, CONTENT), (3, 4, b"3456"), (9, 1, b"9"), (9, 2, b"9"), (10, 1, b""), (11, 5, b""), (4, 0, b"")],
)
def test_a_read_is_short_only_at_the_end(read: Read, offset: int, length: int, expected: bytes) -> None:
    assert expected == source_of(read).read_at(offset, length)


def test_it_has_the_size_name_and_place_that_it_was_given() -> None:
    source = source_of(filled)

    assert (10, "here://ten", ("here", "ten")) == (source.size, source.name, source.place())


def test_an_oserror_keeps_its_number_and_is_not_logged() -> None:
    def stale(offset: int, buffer: memoryview) -> int:
        raise OSError(errno.ESTALE, "replaced")

    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        source_of(stale).read_at(0, 1)


def nothing(offset: int, buffer: memoryview) -> int:
    return 0


def too_much(offset: int, buffer: memoryview) -> int:
    return len(buffer) + 1


def broken(offset: int, buffer: memoryview) -> int:
    raise KeyError("oops")


@pytest.mark.expect_warnings
@pytest.mark.parametrize("read", [nothing, too_much, broken])
def test_a_mistake_is_eio_and_logged_once(read: Read, caplog: pytest.LogCaptureFixture) -> None:
    source = source_of(read)
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            source.read_at(2, 3)

    assert ["here://ten: cannot read at 0x2: this is a mistake in qcowfs"] == [r.getMessage() for r in caplog.records]


def test_a_function_that_keeps_its_buffer_cannot_use_it_later() -> None:
    kept = []

    def keeping(offset: int, buffer: memoryview) -> int:
        kept.append(buffer)
        return filled(offset, buffer)

    source_of(keeping).read_at(0, 1)

    with pytest.raises(ValueError, match="released"):
        kept[0][0] = 0


def test_ctrl_c_in_a_read_reaches_the_code_that_reads() -> None:
    def interrupted(offset: int, buffer: memoryview) -> int:
        raise KeyboardInterrupt

    told = False
    try:
        try:
            source_of(interrupted).read_at(0, 1)
        except InterruptedError:
            threading.Event().wait(5)
    except KeyboardInterrupt:
        told = True

    assert told


def test_a_closed_source_reads_nothing() -> None:
    source = source_of(filled)
    source.close()

    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        source.read_at(0, 1)

"""The table of open files: each has a number, and lives until it is closed and its last read has ended."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest

from qcowfs._handles import Handles
from qcowfs.errors import QcowfsError


class Opened:
    """A file that nobody reads."""

    def read(self, offset: int, length: int) -> bytes:
        return b""

    def end(self) -> int:
        return 0

    def report(self, fault: QcowfsError) -> None:
        raise AssertionError(fault)


def test_every_open_file_has_a_number_of_its_own() -> None:
    handles = Handles()

    numbers = [handles.attach(None, Opened()) for _ in range(1000)]

    assert len(handles) == len(set(numbers)) == 1000


def test_a_closed_file_is_let_go_of_and_the_others_are_not() -> None:
    handles = Handles()
    files = [Opened() for _ in range(100)]
    numbers = [handles.attach(None, file) for file in files]
    watched = [weakref.ref(file) for file in files]
    del files

    for number in numbers[::2]:
        handles.detach(number)

    assert len(handles) == 50
    assert [None, True] * 50 == [watch() and True for watch in watched]


def test_the_table_lets_go_of_all_that_is_still_open() -> None:
    handles = Handles()
    watched = []
    for _ in range(100):
        file = Opened()
        watched.append(weakref.ref(file))
        handles.attach(None, file)
    del file, handles
    gc.collect()

    assert {None} == {watch() for watch in watched}


@pytest.mark.parametrize("number", [0, 1, 63, 64, 1 << 40, (1 << 64) - 1])
def test_closing_what_nobody_has_open_does_nothing(number: int) -> None:
    handles = Handles()
    handles.detach(number)
    kept = handles.attach(None, Opened())
    for other in {0, 1, 63, 64, number} - {kept}:
        handles.detach(other)

    assert len(handles) == 1


def test_opening_and_closing_for_long_needs_no_more_room() -> None:
    handles = Handles()

    numbers = set()
    for _ in range(10_000):
        numbers.add(handles.attach(None, Opened()))
        handles.detach(max(numbers))

    assert max(numbers) < 64


def test_a_file_has_to_be_there() -> None:
    with pytest.raises(TypeError):
        Handles().attach(None, None)  # type: ignore[arg-type]


def test_threads_open_and_close_at_once() -> None:
    handles = Handles()
    together = threading.Barrier(4)
    kept: list[int] = []

    def work() -> None:
        together.wait()
        for turn in range(500):
            number = handles.attach(None, Opened())
            if turn % 5:
                handles.detach(number)
            else:
                kept.append(number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(handles) == len(kept) == len(set(kept)) == 400

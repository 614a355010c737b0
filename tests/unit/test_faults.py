"""What the log hears of faults: each once, and never a flood."""

from __future__ import annotations

import pytest

from qcowfs.errors import ReadFault
from qcowfs.vfs import faults
from qcowfs.vfs.faults import FaultLog

pytestmark = pytest.mark.expect_warnings


class Clock:
    """A clock that stands still until told otherwise."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def fault(offset: int) -> ReadFault:
    return ReadFault("a.qcow2", 0, offset, "broken", 5)


def test_a_fault_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    log = FaultLog(Clock())

    for _ in range(3):
        log.report("current.raw", fault(1))

    assert caplog.messages == ["current.raw: a.qcow2: layer 0, guest offset 0x1: broken"]


def test_the_same_fault_in_another_file_is_another_fault(caplog: pytest.LogCaptureFixture) -> None:
    log = FaultLog(Clock())

    log.report("a.raw", fault(1))
    log.report("b.raw", fault(1))

    assert len(caplog.messages) == 2


def test_a_flood_of_faults_is_cut_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    log = FaultLog(clock)

    for offset in range(1000):
        log.report("a.raw", fault(offset))
    flood = len(caplog.messages)
    clock.now = 1 / faults.LINES_PER_SECOND
    log.report("a.raw", fault(5000))

    assert flood == faults.BURST
    assert caplog.messages[-1].endswith("guest offset 0x1388: broken (and 980 more faults before it)")


def test_memory_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    log = FaultLog(Clock())

    for offset in range(2 * faults.MAX_REMEMBERED):
        log.report("a.raw", fault(offset))

    assert len(log._known) == faults.MAX_REMEMBERED
    assert len(caplog.messages) == faults.BURST

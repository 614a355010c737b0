"""The virtual machine that other tests rely on: what it does when a guest fails, hangs or is gone. Evidence: own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.vm import CommandFailed, Machine, MachineError, QmpError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with Machine([], directory=tmp_path_factory.mktemp("machine")) as running:
        yield running


def test_a_command_gives_its_output_line_breaks_or_not(machine: Machine) -> None:
    assert "a\nb\n" == machine.run("printf 'a\\nb\\n'")
    assert "a\nb\n" == machine.run("printf 'a\\nb'")
    assert "" == machine.run("true")


def test_a_command_that_fails_raises_with_status_and_output(machine: Machine) -> None:
    with pytest.raises(CommandFailed) as failed:
        machine.run("echo why; exit 3")

    assert (3, "why\n") == (failed.value.status, failed.value.output)


def test_a_qmp_error_is_raised_and_the_next_command_works(machine: Machine) -> None:
    with pytest.raises(QmpError, match="no-such-command"):
        machine.qmp("no-such-command")

    assert machine.qmp("query-status")["running"] is True


def test_a_guest_that_hangs_is_given_up(tmp_path: Path) -> None:
    with Machine([], directory=tmp_path) as machine, pytest.raises(MachineError, match="said nothing in time"):
        machine.run("sleep 100", timeout=0.5)


def test_a_guest_that_dies_is_noticed_and_its_last_words_are_told(tmp_path: Path) -> None:
    with Machine([], directory=tmp_path) as machine, pytest.raises(MachineError, match=r"(?s)went away.*Kernel Offset"):
        machine.run("echo c > /proc/sysrq-trigger")

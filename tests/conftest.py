"""Rules that hold for every test: CI skips nothing, no unexpected warning is logged, nothing is left behind."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import in_ci, leftovers, mounts

# Under `--dist loadgroup` the tests of a group run one after the other: mounts measure times and look at what is left.
ONE_AFTER_THE_OTHER = {"mount": "mounts", "e2e": "machines"}
SESSION_MARK = "QCOWFS_TEST_SESSION"  # in the environment of every process that this run starts


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Give the run a directory of its own for temporary files, before anybody makes one."""
    if SESSION_MARK not in os.environ:
        leftovers.remove_old_directories()
        directory = tempfile.mkdtemp(prefix=f"{leftovers.PREFIX}{os.getpid()}-")
        os.chmod(directory, 0o711)
        os.environ[SESSION_MARK] = os.environ["TMPDIR"] = tempfile.tempdir = directory
        config.stash[leftovers.DIRECTORY] = Path(directory)


@pytest.fixture(scope="session", autouse=True)
def _reachable_by_everybody(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let other users pass through the run's directories (pytest makes them 0700), for tests that become nobody."""
    directory = tmp_path_factory.getbasetemp()
    while directory.name.startswith(("pytest-", "popen-")):
        directory.chmod(0o711)
        directory = directory.parent


@pytest.fixture(scope="session", autouse=True)
def _copies_are_removed() -> Iterator[None]:
    yield
    mounts.remove_copies()


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = ONE_AFTER_THE_OTHER.get(item.path.parent.name)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish() -> None:
    """Keep the garbage collector off what was collected: 200,000 objects, and 0.2 s each time."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    _fail_if_skipped_in_ci(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    _fail_if_skipped_in_ci(report)
    return report


def _fail_if_skipped_in_ci(report: pytest.TestReport | pytest.CollectReport) -> None:
    if in_ci() and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"skipped, and with CI=true nothing may be: {reason}"


@pytest.fixture(autouse=True)
def no_unexpected_warning(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test in which qcowfs logs a warning, unless it is marked with `expect_warnings`."""
    logger = logging.getLogger("qcowfs")
    before = (logger.handlers[:], logger.propagate, logger.level)
    logged: list[str] = []
    factory = logging.getLogRecordFactory()

    def watching_factory(*args: object, **named: object) -> logging.LogRecord:
        record = factory(*args, **named)
        if record.levelno >= logging.WARNING and record.name.partition(".")[0] == "qcowfs":
            logged.append(f"{record.name}: {record.getMessage()}")
        return record

    logging.setLogRecordFactory(watching_factory)
    yield
    logging.setLogRecordFactory(factory)
    logger.handlers[:], logger.propagate = before[:2]
    logger.setLevel(before[2])
    if request.node.get_closest_marker("expect_warnings") is None:
        assert logged == []


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the run if it left anything; keep the temporary files only if something failed."""
    directory = session.config.stash.get(leftovers.DIRECTORY, None)
    if directory is None:  # a worker of xdist: the one that started it looks
        return
    session.config.stash[leftovers.FOUND] = found = leftovers.find(directory, SESSION_MARK)
    if found and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if not found and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        shutil.rmtree(directory)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    found = config.stash.get(leftovers.FOUND, [])
    if found:
        terminalreporter.section("left behind by this run", red=True)
        for line in found:
            terminalreporter.line(line)
    directory = config.stash.get(leftovers.DIRECTORY, None)
    if directory is not None and directory.exists():
        terminalreporter.line(f"temporary files: {directory}")

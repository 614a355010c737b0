"""The rules in tests/conftest.py, each shown to fail a run that breaks it. Evidence: own fixtures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run_pytest(directory: Path, test: str, *, ci: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `test` as the only one of a run of its own, under the rules of this project."""
    (directory / "test_it.py").write_text(test)
    (directory / "pytest.ini").write_text("[pytest]\nmarkers = expect_warnings\n")
    unwanted = ("CI", "QCOWFS_TEST_SESSION", "PYTEST_XDIST_WORKER")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"PYTHONPATH": str(REPOSITORY), "TMPDIR": str(directory)} | ({"CI": "true"} if ci else {})
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-ra",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
        "test_it.py",
    ]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=60)


def elsewhere_and_in_ci(directory: Path, test: str) -> tuple[str, str]:
    """Return what is said of a test that passes elsewhere, and fails in CI."""
    elsewhere = run_pytest(directory, test)
    in_ci = run_pytest(directory, test, ci=True)

    assert elsewhere.returncode == 0, elsewhere.stdout
    assert in_ci.returncode == 1
    return elsewhere.stdout, in_ci.stdout


def test_ci_fails_where_a_test_is_skipped(tmp_path: Path) -> None:
    elsewhere, in_ci = elsewhere_and_in_ci(
        tmp_path, "from tests.support import need\ndef test(): need('no-such-program')\n"
    )

    assert "1 skipped" in elsewhere
    assert "no-such-program" in in_ci


def test_a_test_whose_program_is_not_installed_is_skipped_and_in_ci_fails(tmp_path: Path) -> None:
    running = (
        "import pytest, subprocess\n"
        "@pytest.fixture\n"
        "def server(): subprocess.run(['no-such-program'])\n"
        "def test(server): pass\n"
    )

    elsewhere, in_ci = elsewhere_and_in_ci(tmp_path, running)

    assert "no-such-program: not installed; `make setup` installs it" in elsewhere
    assert "no-such-program: not installed" in in_ci


def test_another_file_that_is_missing_fails_a_test(tmp_path: Path) -> None:
    missing = "import subprocess\ndef test_file(): open('no-such-file')\n"
    missing += "def test_directory(): subprocess.run(['true'], cwd='/no-such-directory')\n"

    done = run_pytest(tmp_path, missing)

    assert "2 failed" in done.stdout


def test_ci_fails_where_a_module_is_skipped(tmp_path: Path) -> None:
    skipping = "import pytest\npytest.skip('on purpose', allow_module_level=True)\n"

    done = run_pytest(tmp_path, skipping, ci=True)

    assert done.returncode != 0
    assert "skipped, and with CI=true nothing may be: Skipped: on purpose" in done.stdout


def test_an_unexpected_warning_fails_a_test(tmp_path: Path) -> None:
    warning = "import logging\ndef test(): logging.getLogger('qcowfs.chain').warning('what is %s', 'this')\n"

    done = run_pytest(tmp_path, warning)

    assert done.returncode == 1
    assert "qcowfs.chain: what is this" in done.stdout


def test_an_expected_warning_does_not(tmp_path: Path) -> None:
    warning = (
        "import logging, pytest\n"
        "@pytest.mark.expect_warnings\n"
        "def test(): logging.getLogger('qcowfs.chain').warning('as it should')\n"
    )

    done = run_pytest(tmp_path, warning)

    assert done.returncode == 0, done.stdout


def test_a_process_left_behind_fails_the_run(tmp_path: Path) -> None:
    sleeping = "import subprocess\ndef test(): subprocess.Popen(['sleep', '7'])\n"

    done = run_pytest(tmp_path, sleeping)

    assert done.returncode == 1
    assert ": sleep 7" in done.stdout


def test_a_temporary_file_left_behind_fails_the_run(tmp_path: Path) -> None:
    leaving = "import tempfile\ndef test(): tempfile.mkstemp(prefix='forgotten')\n"

    done = run_pytest(tmp_path, leaving)

    assert done.returncode == 1
    assert "/forgotten" in done.stdout


def test_a_clean_run_removes_its_directory(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "def test(tmp_path): (tmp_path / 'file').touch()\n")

    assert done.returncode == 0, done.stdout
    assert list(tmp_path.glob("qcowfs-tests-*")) == []

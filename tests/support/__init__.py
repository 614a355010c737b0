"""Helpers of the tests: programs that a test needs, and the rule that CI never skips one."""

from __future__ import annotations

import os
import shutil

import pytest

__all__ = ["in_ci", "lacking", "need", "not_installed"]


def in_ci() -> bool:
    """Return whether a layer of tests that cannot run is a failure (CI=true) and not a skip."""
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def need(*programs: str) -> None:
    """Skip the calling test, or module, where one of `programs` is not on PATH; in CI fail it."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        lacking(not_installed(*missing))


def not_installed(*programs: str) -> str:
    """Return why what needs these cannot run."""
    return f"{', '.join(programs)}: not installed; `make setup` installs it"


def lacking(reason: str) -> None:
    """Skip the calling test, or module, because of `reason`; in CI fail it."""
    if in_ci():
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason, allow_module_level=True)

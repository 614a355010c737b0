"""What a test run left behind: mounts, loop devices, processes and temporary files. Used by tests/conftest.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

DIRECTORY = pytest.StashKey[Path]()
FOUND = pytest.StashKey[list[str]]()
PREFIX = "qcowfs-tests-"  # of the directory, before the process id of the run
LAST_BREATH = 5.0  # seconds that a process which was told to end may take


def find(directory: Path, mark: str) -> list[str]:
    """Return a line for each thing that the run with the temporary `directory` left behind.

    `mark` is the variable that names the directory in the environment of every process of the run.
    """
    return [*_processes(f"{mark}={directory}".encode()), *_mounts(directory), *_loops(directory), *_files(directory)]


def remove_old_directories() -> None:
    """Remove what failed runs kept to be looked at, but for runs that are still under way."""
    for directory in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        run = directory.name.removeprefix(PREFIX).partition("-")[0]
        if not Path("/proc", run).exists() and not _mounts(directory):
            shutil.rmtree(directory, ignore_errors=True)


def _processes(variable: bytes) -> list[str]:
    end = time.monotonic() + LAST_BREATH
    while (found := _marked_processes(variable)) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def _marked_processes(variable: bytes) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) == os.getpid():
            continue
        try:
            marked = variable in (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it ended, or is not ours
            continue
        if marked:
            found.append(f"process {process.name}: {command}")
    return found


def _mounts(directory: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text(errors="replace").splitlines()
    return [f"mount: {line}" for line in lines if re.search(rf" {re.escape(str(directory))}/", line)]


def _loops(directory: Path) -> list[str]:
    done = subprocess.run(
        ["losetup", "--list", "--noheadings", "--output", "NAME,BACK-FILE"], capture_output=True, text=True
    )
    return [f"loop device: {line}" for line in done.stdout.splitlines() if f" {directory}/" in line]


def _files(directory: Path) -> list[str]:
    """Return what is in `directory` beside pytest's own: everything else has a test that should have removed it."""
    return [f"file: {entry}" for entry in directory.iterdir() if not entry.name.startswith("pytest-of-")]

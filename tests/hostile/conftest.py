"""Hostile images may not cost much memory: each test of this directory is measured, and stopped at a wall.

The limit of time is in each module's `pytestmark`, where a reader sees it.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

WALL = 256 << 20  # bytes of address space more than before
ENOUGH = 64 << 20  # bytes of memory more than before: the caches of a test and an L1 table of 32 MiB fit
PROCESS = Path("/proc/self")


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + WALL, before[1]))
    measured = _start_peak_anew()
    resident = _status("VmRSS")
    yield
    peak = _status("VmHWM")
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert not measured or peak - resident < ENOUGH


def _start_peak_anew() -> bool:
    """Tell whether this kernel can: then VmHWM is of this test alone."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    """Return a field of proc(5)'s status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", (PROCESS / "status").read_text(), re.MULTILINE)
    assert found is not None, field
    return int(found[1]) << 10


@pytest.fixture
def base(path: Path) -> Path:
    """Return a raw backing file beside `path`, the image of the module's own fixture."""
    base = path.with_name("base.raw")
    base.write_bytes(b"\x11" * (512 << 10))
    return base

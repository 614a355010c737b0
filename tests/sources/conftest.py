"""What tests of sources begin with: a file of known content, which a server is to have, and a place for its socket."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> Path:
    """A file with the `content` of the module."""
    path = tmp_path_factory.mktemp("v") / "disk"
    path.write_bytes(content)
    return path


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a socket can be, whose path is short enough."""
    return tmp_path_factory.mktemp("v") / "s"

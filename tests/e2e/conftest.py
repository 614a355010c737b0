"""What the tests with a virtual machine share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support import bootimage, lacking, need
from tests.support.mounts import Person, need_fuse, ordinary_user


@pytest.fixture(scope="session", autouse=True)
def machine_parts() -> None:
    """Skip (in CI: fail) where a virtual machine cannot be had."""
    need("qemu-system-x86_64", "qemu-img", "setpriv", "busybox", "mke2fs", "apt-get", "dpkg")
    need_fuse()
    try:
        bootimage.prepare()
    except bootimage.BootImageError as error:
        lacking(str(error))


@pytest.fixture(scope="session")
def root() -> None:
    """Skip (in CI: fail) where loop devices cannot be mounted."""
    if os.geteuid() != 0:
        lacking("a loop mount needs root")


@pytest.fixture
def ordinary(tmp_path: Path) -> Person:
    """Return an ordinary user, who may pass through the test's directory."""
    tmp_path.chmod(0o711)
    return ordinary_user()

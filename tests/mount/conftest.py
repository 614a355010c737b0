"""What the mount's tests share: images, a directory to mount on, and a look at what is left over."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcowfs import mountpoint
from tests.mount.images import Story, make_image, make_story
from tests.support import need
from tests.support.mounts import Person, force_unmount, me, need_fuse, ordinary_user


@pytest.fixture(scope="session")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Return an image that is read-only to all tests."""
    need("qemu-img", "qemu-io")
    return make_story(tmp_path_factory.mktemp("story"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return a small image that holds CONTENT, for tests that are not about images."""
    need("qemu-img")
    return make_image(tmp_path / "disk.qcow2")


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Path]:
    """Return an empty directory to mount on, and check that it is one again afterwards."""
    need_fuse()
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    left = mountpoint.find(str(path))
    force_unmount(path)
    assert left is None, f"left mounted: {left}"
    assert os.listdir(path) == []


@pytest.fixture
def ordinary(tmp_path: Path) -> Person:
    """Return an ordinary user, who may pass through the test's directory."""
    tmp_path.chmod(0o711)
    return ordinary_user()


@pytest.fixture(params=["whoever runs the tests", "an ordinary user"])
def person(request: pytest.FixtureRequest, tmp_path: Path, target: Path) -> Person:
    """Return who mounts and reads; the mount point is theirs."""
    if request.param == "whoever runs the tests":
        return me()
    found: Person = request.getfixturevalue("ordinary")
    if found.is_me:
        pytest.skip("whoever runs the tests is an ordinary user")
    found.own(tmp_path)
    found.own(target)
    return found


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Check that a test leaves no descriptor behind in this process."""
    descriptors = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= descriptors

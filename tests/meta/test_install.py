"""A plain `pip install .` makes a command that works, also where nothing is installed that qcowfs can do without.

Evidence: own fixtures; qemu-img and mke2fs made the images. The compiler does not find the headers of the optional
libraries, and pip installs no extra: what is built with all of them is what every other test runs.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import need
from tests.support.disks import run
from tests.support.forgefat import Fat
from tests.support.mounts import need_fuse
from tests.support.qemu import qemu

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600), pytest.mark.xdist_group("installed")]

ROOT = Path(__file__).resolve().parents[2]
OF_THE_CHECKOUT = ("qcowfs", "man", "completion", "pyproject.toml", "README.md", "LICENSE")
OPTIONAL_HEADERS = ("libnbd.h", "iscsi/iscsi.h", "iscsi/scsi-lowlevel.h", "ext2fs/ext2fs.h")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment into which `pip install .` installed a copy of this checkout."""
    need("gcc", "pkg-config")
    directory = tmp_path_factory.mktemp("installed")
    _copy_checkout(directory / "checkout")
    base = sys.base_prefix
    python = next(path for path in (f"{base}/bin/python3", sys.executable) if os.access(path, os.X_OK))
    subprocess.run([python, "-m", "venv", directory / "venv"], check=True, timeout=120)
    pip = [directory / "venv/bin/pip", "--disable-pip-version-check", "install", "--quiet", "."]
    # How fast the code would be does not matter here, and compiling it well takes minutes.
    (directory / "build.cfg").write_text(f"[build_ext]\nparallel = {os.cpu_count()}\n")
    flags = f"-O0 -I{_without_headers(directory / 'include')}"
    environment = {**_plain(), "CFLAGS": flags, "DIST_EXTRA_CONFIG": str(directory / "build.cfg")}
    done = subprocess.run(pip, cwd=directory / "checkout", env=environment, timeout=560, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return directory / "venv"


def _copy_checkout(target: Path) -> None:
    """Copy what pip needs, and no extension: one that lies there could hide one that is not built.

    What Cython made comes with it, at its own times: it is made again where it is older than its source, and takes half
    of the time where it is not.
    """
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    target.mkdir()
    for name in OF_THE_CHECKOUT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=unwanted)
        else:
            shutil.copy(source, target / name)


def _without_headers(directory: Path) -> Path:
    """Return a directory for the compiler to look into first, where the optional headers are errors."""
    for name in OPTIONAL_HEADERS:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("#error not installed\n")
    return directory


def _plain() -> dict[str, str]:
    """Return an environment in which nothing of this checkout can be imported by chance."""
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


def _run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**_plain(), **(env or {})}
    return subprocess.run(command, cwd=cwd, env=environment, timeout=60, capture_output=True, text=True, check=False)


class TestPipInstall:
    def test_makes_a_command_that_works_elsewhere(self, installed: Path, tmp_path: Path) -> None:
        need("qemu-img")
        qemu("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "image.qcow2", "1M")
        qemu("qemu-img", "snapshot", "-c", "before-upgrade", tmp_path / "image.qcow2")

        done = _run(installed / "bin/qcowfs", "list", "image.qcow2", cwd=tmp_path)

        assert (done.returncode, done.stderr) == (0, "")
        assert ["current", "before-upgrade"] == [line.split()[0] for line in done.stdout.splitlines()[1:]]

    def test_installs_the_compiled_modules_and_not_the_checkouts(self, installed: Path, tmp_path: Path) -> None:
        program = "import qcowfs._core, sys; print(qcowfs._core.__file__)"

        done = _run(installed / "bin/python", "-c", program, cwd=tmp_path)

        assert done.stdout.startswith(str(installed))

    def test_installs_the_manual_the_completions_and_the_helper_of_mount(self, installed: Path) -> None:
        pages = {path.name for path in (ROOT / "man").glob("*.[178]")}

        assert pages == {path.name for path in (installed / "share/man").rglob("*.[178]") if "qcowfs" in path.name}
        assert (installed / "share/bash-completion/completions/qcowfs").exists()
        assert (installed / "share/zsh/site-functions/_qcowfs").exists()
        assert (installed / "share/fish/vendor_completions.d/qcowfs.fish").exists()
        assert os.access(installed / "bin/mount.qcowfs", os.X_OK)


@pytest.fixture
def ext(tmp_path: Path) -> Path:
    """Return an image with an ext4."""
    need("qemu-img", "mke2fs")
    run("mke2fs", "-q", "-t", "ext4", tmp_path / "disk.raw", "4M")
    qemu("qemu-img", "convert", "-O", "qcow2", tmp_path / "disk.raw", tmp_path / "disk.qcow2")
    return tmp_path / "disk.qcow2"


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("iscsi://127.0.0.1/iqn.2024-01.example:disks/1", "libiscsi-dev"),
        ("nbd://127.0.0.1/disk", "libnbd-dev"),
        ("nbd+unix:///disk?socket=/run/nothing", "libnbd-dev"),
        ("s3://bucket/disk.qcow2", "pip install 'qcowfs[objects]'"),
        ("gs://bucket/disk.qcow2", "pip install 'qcowfs[objects]'"),
        ("az://bucket/disk.qcow2", "pip install 'qcowfs[objects]'"),
    ],
)
def test_a_url_that_needs_a_library_says_which(installed: Path, tmp_path: Path, url: str, hint: str) -> None:
    done = _run(installed / "bin/qcowfs", "list", url, cwd=tmp_path)

    message, advice = done.stderr.splitlines()
    assert 12 == done.returncode
    assert message.startswith(f"qcowfs: {url.partition('?')[0]}")
    assert advice.startswith("hint: ")
    assert hint in advice


class TestWithoutLibraries:
    def test_the_monitor_of_a_machine_is_refused_in_a_line(self, installed: Path, tmp_path: Path) -> None:
        done = _run(installed / "bin/qcowfs", "snapshot", "--qmp", "vm.qmp", "disk0", "new.qcow2", cwd=tmp_path)

        message, advice = done.stderr.splitlines()
        assert 18 == done.returncode
        assert "qemu.qmp" in message
        assert "qcowfs[qmp]" in advice

    @pytest.mark.parametrize(
        ("path", "hint"), [("/nonexistent", "qemu-utils"), ("/usr/bin", "libnbd-dev")], ids=["qemu-nbd", "libnbd"]
    )
    def test_an_image_that_qemu_reads_is_refused_in_a_line(
        self, installed: Path, tmp_path: Path, path: str, hint: str
    ) -> None:
        need("qemu-img", "qemu-nbd")
        qemu("qemu-img", "create", "-q", "-f", "vmdk", tmp_path / "disk.vmdk", "1M")

        done = _run(installed / "bin/qcowfs", "list", "disk.vmdk", cwd=tmp_path, env={"PATH": path})

        message, advice = done.stderr.splitlines()
        assert 12 == done.returncode
        assert message.startswith(f"qcowfs: {tmp_path}/disk.vmdk: a vmdk image: ")
        assert hint in advice

    def test_files_of_ext_are_refused_in_a_line(self, installed: Path, ext: Path, tmp_path: Path) -> None:
        listed = _run(installed / "bin/qcowfs", "list", "-v", ext.name, cwd=tmp_path)
        asked = _run(installed / "bin/qcowfs", "ls", ext.name, "current", cwd=tmp_path)

        assert (0, "") == (listed.returncode, listed.stderr)
        assert "no files: ext4 cannot be read here: qcowfs was built without libext2fs" in listed.stdout
        assert 1 == asked.returncode
        assert "libext2fs-dev" in asked.stderr
        assert 1 == len(asked.stderr.splitlines())

    def test_everything_else_works(self, installed: Path, ext: Path, tmp_path: Path) -> None:
        need_fuse()
        qcowfs, mnt = installed / "bin/qcowfs", tmp_path / "mnt"
        (tmp_path / "fat.img").write_bytes(Fat(16, {"file": b"content"}).data)
        mnt.mkdir()

        printed = _run(qcowfs, "cat", "--image-format=raw", "fat.img", "current:file", cwd=tmp_path)
        exported = _run(qcowfs, "export", ext.name, "current", "exported.raw", cwd=tmp_path)
        mounted = _run(qcowfs, "mount", ext.name, mnt, cwd=tmp_path)
        try:
            same = filecmp.cmp(tmp_path / "exported.raw", mnt / "current.raw", shallow=False)
        finally:
            ended = _run(qcowfs, "umount", mnt, cwd=tmp_path)

        assert [("", 0)] * 4 == [(done.stderr, done.returncode) for done in (printed, exported, mounted, ended)]
        assert "content" == printed.stdout
        assert same

"""The kernel and the initramfs that the tests' virtual machine boots, made once and kept under build/vm.

Used by vm.py and by `make vm`. The kernel is Debian's cloud kernel, downloaded and unpacked but not installed; the
initramfs holds busybox, mkfs.ext4, QEMU's guest agent, the modules for virtio and for FAT and exFAT, and an init that
runs commands from the second serial port. Several processes may ask at once: a file lock lets one of them make it.
"""

from __future__ import annotations

import fcntl
import gzip
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parents[2] / "build" / "vm"
KERNEL_PACKAGE = "linux-image-cloud-amd64"
# In the order in which they depend on one another; ext4 is built into this kernel.
MODULES = ("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk")
# For the guest agent; the test that wants it loads it.
AGENT_MODULES = ("virtio_console",)
# Not installed on this machine: it would obey whoever runs the hypervisor that this may be a guest of.
AGENT_PACKAGE, AGENT = "qemu-guest-agent", "usr/sbin/qemu-ga"
# What the kernel of the machine that runs the tests may not have.
FILE_SYSTEMS = ("nls_cp437", "nls_ascii", "fat", "vfat", "exfat")
DOWNLOAD_SECONDS = 300

INIT = """\
#!/bin/busybox sh
# Commands come in as lines on the second serial port, so that they never mix with what the kernel prints on the first.
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in {modules}; do insmod /modules/$module.ko; done
stty -F /dev/ttyS1 raw -echo
exec </dev/ttyS1 >/dev/ttyS1 2>&1
echo READY
while read -r marker command; do
    sh -c "$command" </dev/null
    echo "$marker $?"
done
poweroff -f
"""


@dataclass(frozen=True, slots=True)
class BootImage:
    """What QEMU's -kernel and -initrd take."""

    kernel: Path
    initramfs: Path


class BootImageError(Exception):
    """The kernel or something for the initramfs could not be had."""


def prepare(cache: Path = CACHE) -> BootImage:
    """Return the boot image in `cache`, making what is missing of it (downloads about 30 MB once)."""
    cache.mkdir(parents=True, exist_ok=True)
    image = BootImage(cache / "vmlinuz", cache / "initramfs.gz")
    with _locked(cache / "lock"):
        if not _is_current(image):
            _make(image, cache)
    return image


def _is_current(image: BootImage) -> bool:
    recipe = Path(__file__).stat().st_mtime
    return all(path.exists() and path.stat().st_mtime >= recipe for path in (image.kernel, image.initramfs))


def _make(image: BootImage, cache: Path) -> None:
    package, agent = cache / "kernel", cache / "agent"
    if not list(package.glob("boot/vmlinuz-*")):
        _download(_newest_kernel, cache, package)
    if not (agent / AGENT).exists():
        _download(lambda: AGENT_PACKAGE, cache, agent)
    (kernel,) = package.glob("boot/vmlinuz-*")
    (modules,) = package.glob("lib/modules/*")
    _write_whole(image.initramfs, gzip.compress(_initramfs(modules, agent / AGENT), compresslevel=1))
    _write_whole(image.kernel, kernel.read_bytes())


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_bytes(data)
    temporary.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _download(newest: Callable[[], str], cache: Path, package: Path) -> None:
    """Unpack a package of Debian's to the directory `package`; `newest` returns its name as of the lists."""
    for old in cache.glob("*.deb"):
        old.unlink()
    try:
        _run("apt-get", "download", newest(), cwd=cache)
    except BootImageError:
        # Debian's mirrors drop a package when the next one comes, so lists that are some weeks old name a lost file.
        _run(*_as_root(), "apt-get", "update", cwd=cache)
        _run("apt-get", "download", newest(), cwd=cache)
    (archive,) = cache.glob("*.deb")
    unpacked = package.with_suffix(".new")
    shutil.rmtree(unpacked, ignore_errors=True)
    _run("dpkg", "-x", str(archive), str(unpacked), cwd=cache)
    unpacked.rename(package)
    archive.unlink()


def _newest_kernel() -> str:
    depends = _run("apt-cache", "depends", KERNEL_PACKAGE, cwd=Path("/"))
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise BootImageError(f"apt-cache knows no kernel behind {KERNEL_PACKAGE}; run `make setup`")
    return found.group(1)


def _as_root() -> tuple[str, ...]:
    return () if os.geteuid() == 0 else ("sudo",)


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS)
    if done.returncode != 0:
        raise BootImageError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def _initramfs(modules: Path, agent: Path) -> bytes:
    files = {Path("init"): INIT.format(modules=" ".join(MODULES + FILE_SYSTEMS)).encode()}
    files[Path("bin/busybox")] = _program("busybox").read_bytes()
    for module in MODULES + FILE_SYSTEMS + AGENT_MODULES:
        (found,) = modules.rglob(f"{module}.ko")
        files[Path("modules", f"{module}.ko")] = found.read_bytes()
    # Not as mke2fs: busybox has a small one of that name, which its shell would prefer.
    files[Path("sbin/mkfs.ext4")] = _program("mke2fs").read_bytes()
    files[Path("sbin/qemu-ga")] = agent.read_bytes()
    libraries = {*_libraries(_program("mke2fs")), *_libraries(agent)}
    files |= {library.relative_to("/"): library.read_bytes() for library in libraries}
    files[Path("etc/mke2fs.conf")] = Path("/etc/mke2fs.conf").read_bytes()
    return _newc(files)


def _program(name: str) -> Path:
    found = shutil.which(name, path="/bin:/sbin:/usr/bin:/usr/sbin")
    if found is None:
        raise BootImageError(f"{name}: not installed; `make setup` installs it")
    return Path(found)


def _libraries(program: Path) -> list[Path]:
    """Return what ldd(1) says that `program` loads, under the names by which it loads them."""
    return [Path(library) for library in re.findall(r"(/\S+) \(0x", _run("ldd", str(program), cwd=Path("/")))]


def _newc(files: dict[Path, bytes]) -> bytes:
    """Return `files` and the directories above them as a cpio archive of the format "newc" (Linux, initramfs)."""
    directories = {parent for path in files for parent in path.parents if parent.name}
    directories |= {Path(name) for name in ("dev", "mnt", "proc", "sbin", "sys", "tmp")}
    parts = [_member(path, stat.S_IFDIR | 0o755, b"") for path in sorted(directories)]
    parts += [_member(path, stat.S_IFREG | 0o755, data) for path, data in files.items()]
    return b"".join([*parts, _member(Path("TRAILER!!!"), 0, b"")])


def _member(path: Path, mode: int, data: bytes) -> bytes:
    name = str(path).encode() + b"\0"
    # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return _padded(header) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


if __name__ == "__main__":
    try:
        print(f"virtual machine: {prepare().kernel}")
    except BootImageError as error:
        sys.exit(f"virtual machine: {error}")

"""Encrypted directories of ext, whose key nobody has, against what the kernel shows of them without the key."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import stat
import struct
import subprocess
from pathlib import Path

import pytest

from qcowfs.errors import TreeFault
from qcowfs.inside.client import Tree
from qcowfs.inside.launcher import Launcher
from tests.support import lacking, need
from tests.support.crash import FileDevice, mounted
from tests.support.readertree import entries_of

pytest.importorskip("qcowfs.inside.ext")

ADD_KEY, SET_POLICY = 0xC0506617, 0x800C6613  # FS_IOC_ADD_ENCRYPTION_KEY, FS_IOC_SET_ENCRYPTION_POLICY
KEY = bytes(range(64))
BY_IDENTIFIER = 2
AES_XTS, AES_CTS, PADDED_TO_32 = 1, 4, 3


def encrypt(directory: Path) -> None:
    """Let what will be in `directory` be encrypted; the file system forgets the key with its umount."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        key = bytearray(struct.pack("<II32xII32x", BY_IDENTIFIER, 0, len(KEY), 0) + KEY)
        fcntl.ioctl(descriptor, ADD_KEY, key)
        policy = struct.pack("<BBBBB3x", 2, AES_XTS, AES_CTS, PADDED_TO_32, 0) + key[8:24]
        fcntl.ioctl(descriptor, SET_POLICY, policy)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY):
            lacking("the kernel has no encryption of file systems")
        raise
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("features", ["encrypt", "encrypt,^dir_index", "encrypt,^metadata_csum"])
def test_names_are_those_that_linux_shows_without_the_key(tmp_path: Path, features: str) -> None:
    need("mke2fs", "mount")
    image, rng = tmp_path / "image", random.Random(1)
    image.touch()
    os.truncate(image, 32 << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024", "-O", features, image], check=True)
    with mounted(image) as point:
        (point / "secret").mkdir()
        encrypt(point / "secret")
        for number in range(300):
            (point / "secret" / f"{number}{'n' * rng.randrange(250)}").write_bytes(rng.randbytes(100))
        (point / "secret" / "directory").mkdir()
        (point / "secret" / "directory" / "within").touch()
        (point / "secret" / "link").symlink_to("target")
    with mounted(image, "ro,noatime") as point:
        there = os.fsencode(point / "secret") + b"/"
        expected = {name: os.lstat(there + name) for name in os.listdir(there)}
        links = {name: os.readlink(there + name) for name, at in expected.items() if stat.S_ISLNK(at.st_mode)}
        assert not any(os.listxattr(there + name, follow_symlinks=False) for name in expected)

    launcher, device = Launcher(), FileDevice(image)
    tree = Tree(launcher, "p1", "ext4", device.size, device.read, True)
    try:
        secret = tree.lookup(tree.root, b"secret")
        found = {name: inode for name, inode, _extents in entries_of(tree, secret)}

        assert expected.keys() == found.keys()
        for name, at in expected.items():
            told = found[name]
            assert (at.st_ino, at.st_mode, at.st_size, at.st_nlink) == (told.ino, told.mode, told.size, told.nlink)
            assert tree.lookup(secret, name) == told.ino
            assert tree.xattrs(told.ino) == {}
            if stat.S_ISREG(at.st_mode):
                with pytest.raises(TreeFault) as fault:
                    tree.extents(told.ino, 0, 1)
                assert errno.ENOKEY == fault.value.errno
        assert {name: tree.readlink(found[name].ino) for name in links} == links
    finally:
        tree.close()
        launcher.close()

"""Inode numbers: a hash of the path in the mount, so that they are the same from mount to mount.

Used by vfs/tree.py, in one thread. Backup tools and NFS clients remember numbers between mounts.

A number CAN be compared between two mounts of the same image: the same path has the same number.
A number CANNOT tell whether two mounts show the same bytes: a path may name another point after the image changed.
A number CANNOT come back in one mount: a path that names something else by then has another one (`turn`).

A tree inside a disk has 2 ** 40 numbers in a row: those of its files are the file system's own behind the tree's.
"""

from __future__ import annotations

from hashlib import blake2b

from qcowfs.inside.record import INODE_BITS

__all__ = ["INODE_BITS", "ROOT", "Inodes"]

ROOT = 1  # FUSE's fixed number of the root directory; 0 means "no such entry"
ATTEMPT_BITS = 32  # of a salt; the others count the turns
TRIES = 1 << 16  # for a tree's numbers: some 0.1 s, and in vain only where nearly all of 2 ** 23 are taken
_MASK = (1 << 63) - 1  # some programs keep inode numbers in signed 64-bit integers


class Inodes:
    """Hands out the numbers of one mount.

    Two paths of one mount never share a number: the one asked for later moves on to the next hash. With 63 bits that
    is a one in 10^7 event at a million paths, and it still comes out the same as long as the order of asking does.
    """

    def __init__(self) -> None:
        self._path_of = {ROOT: b"/"}  # number -> the path, and turn, that holds it
        self._rows: dict[int, bytes] = {0: b""}  # number >> INODE_BITS -> the tree that has these; b"": single numbers

    def number(self, path: bytes, turn: int = 0) -> int:
        """Return the inode number of `path`, an absolute path in the mount.

        Args:
            turn: how often the path has become something else since the mount was made, less than 2 ** 31.
        """
        attempt = turn << ATTEMPT_BITS
        owner = _owner(path, turn)
        while True:
            number = _hashed(path, attempt)
            if number and not self._rows.get(number >> INODE_BITS) and self._path_of.setdefault(number, owner) == owner:
                self._rows[number >> INODE_BITS] = b""
                return number
            attempt += 1

    def tree(self, path: bytes, turn: int = 0) -> int | None:
        """Return the first of the numbers of the tree at `path`: a multiple of 2 ** INODE_BITS, and not 0.

        None: hardly any are left, because somebody has made and deleted millions of snapshots during this mount.
        """
        owner = _owner(path, turn)
        for attempt in range(TRIES):
            row = _hashed(path, (turn << ATTEMPT_BITS) + attempt) >> INODE_BITS
            if self._rows.setdefault(row, owner) == owner:
                return row << INODE_BITS
        return None


def _owner(path: bytes, turn: int) -> bytes:
    return path if turn == 0 else b"%s\0%d" % (path, turn)


def _hashed(path: bytes, attempt: int) -> int:
    if path == b"/":
        return ROOT
    digest = blake2b(path, digest_size=8, salt=attempt.to_bytes(8, "big"), person=b"qcowfs inode").digest()
    return int.from_bytes(digest, "big") & _MASK

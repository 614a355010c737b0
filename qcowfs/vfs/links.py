"""Symbolic links that stay in their tree: what -o symlinks=contain shows instead of what is stored.

Used by vfs/guest.py. A guest's link to /etc/passwd means the guest's; whoever follows it in the mount lands in the
host's. Contained, it means what it means to the guest, as far as a text can: it leads up to the tree's root and down
again, and never further up.
"""

from __future__ import annotations

import errno
import threading

from qcowfs.errors import TreeFault

__all__ = ["Depths", "contained"]

MAX_DEPTHS = 1 << 16  # inodes whose place is remembered; who follows a link has just looked it up


def contained(target: bytes, depth: int) -> bytes:
    """Return a target that leads to the same place for whoever takes the tree's root for "/".

    ".." takes away the name before it, whatever that is: a link in the middle of a target counts as a directory.

    Args:
        depth: how far below the tree's root the link's directory is.
    """
    up, names = (depth if target.startswith(b"/") else 0), list[bytes]()
    for name in target.split(b"/"):
        if name in (b"", b"."):
            continue
        if name != b"..":
            names.append(name)
        elif names:
            names.pop()
        else:
            up = min(up + 1, depth)
    return b"/".join([*[b".."] * up, *names]) or b"."


class Depths:
    """How far below the tree's root the directories are that hold what was looked up. Any thread.

    Args:
        root: the number of the tree's root.
    """

    def __init__(self, root: int) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._above: dict[int, int] = {}  # number of an inode: the depth of the uppermost directory that it is in

    def learn(self, directory: int, number: int) -> None:
        """Note that `number` is in `directory`. Of two places the upper one counts, so that no link leads too far."""
        depth = self._depth(directory)
        with self._lock:
            known = self._above.pop(number, depth)
            if len(self._above) >= MAX_DEPTHS:
                self._above.pop(next(iter(self._above)))
            self._above[number] = min(known, depth)

    def of(self, link: int) -> int:
        """Return the depth of the directory that `link` is in.

        Raises:
            TreeFault: ESTALE, it was forgotten; the kernel then looks the whole path up again, and asks once more.
        """
        found = self._above.get(link)
        if found is None:
            raise TreeFault("", "where this link is has to be looked up again", errno.ESTALE)
        return found

    def _depth(self, directory: int) -> int:
        return 0 if directory == self._root else self.of(directory) + 1

"""Symbolic links that stay in their tree: what -o symlinks=contain shows instead of what is stored.

Used by vfs/guest.py. A guest's link to /etc/passwd means the guest's; whoever follows it in the mount lands in the
host's. Contained, it means what it means to the guest, as far as a text can: it leads up to the tree's root and down
again, and never further up.
"""

from __future__ import annotations

import errno
import stat
import threading

from qcowfs.errors import TreeFault

__all__ = ["Depths", "contained"]

MAX_PLACES = 1 << 18  # directories and links of one tree whose place is remembered: 40 MB; a usual guest has a fifth
UNKNOWN = -1  # instead of a depth


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
    """How far below the tree's root what was told of it is, so that no link is told to lead further up. Any thread.

    The kernel keeps what it was told for as long as it likes, and so does this: a place that was forgotten could be
    learned again as a deeper one, and the kernel would follow a link from the upper one to outside of the tree. For
    the same reason a directory has one place only; no file system allows it two, but an image may.

    Args:
        root: the number of the tree's root.
    """

    def __init__(self, root: int) -> None:
        self._lock = threading.Lock()
        self._directories = {root: 0}  # number: depth
        self._parents = {root: 0}  # the same numbers: the directory that each is in
        self._links: dict[int, int] = {}  # number: depth of the uppermost directory that it is in, or UNKNOWN

    def learn(self, directory: int, number: int, mode: int) -> bool:
        """Note that `number` is in `directory`; return whether anybody may be told so.

        Of two places of a link the upper one counts. False: a directory that is in another one already.
        """
        with self._lock:
            depth = self._directories.get(directory, UNKNOWN)
            if stat.S_ISLNK(mode) and (number in self._links or self._has_room()):
                self._links[number] = min(self._links.get(number, depth), depth)
            if not stat.S_ISDIR(mode):
                return True
            if number not in self._parents and depth != UNKNOWN and self._has_room():
                self._directories[number] = depth + 1
                self._parents[number] = directory
            return self._parents.get(number, directory) == directory

    def of(self, link: int) -> int:
        """Return the depth of the directory that `link` is in.

        Raises:
            TreeFault: EMLINK, there are too many directories and links to know.
        """
        found = self._links.get(link, UNKNOWN)
        if found == UNKNOWN:
            raise TreeFault("", "too many directories and links were seen to contain this one", errno.EMLINK)
        return found

    def _has_room(self) -> bool:
        return len(self._directories) + len(self._links) < MAX_PLACES

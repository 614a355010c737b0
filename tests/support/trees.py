"""What a directory holds, down to the last xattr and byte, so that two mounts of one tree can be compared."""

from __future__ import annotations

import os
import stat
from typing import Any

from tests.support.sparse import digest, pieces_of

__all__ = ["describe"]


def describe(path: str | bytes | os.PathLike[str], *, atime: bool = True, xattrs: bool = True) -> dict[bytes, Any]:
    """Return, for each name below `path` (b"" is `path` itself), all that can be told of it."""
    top = os.fsencode(path)
    told = {b"": _one(top, atime=atime, xattrs=xattrs)}
    for at, directories, files in os.walk(top):
        for name in directories + files:
            full = os.path.join(at, name)
            told[os.path.relpath(full, top)] = _one(full, atime=atime, xattrs=xattrs)
    return told


def _one(path: bytes, *, atime: bool, xattrs: bool) -> tuple[Any, ...]:
    st = os.lstat(path)
    names = os.listxattr(path, follow_symlinks=False) if xattrs else []
    values = {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    kept = (st.st_mode, st.st_nlink, st.st_uid, st.st_gid, st.st_rdev, st.st_size, st.st_blocks)
    times = (st.st_mtime_ns, st.st_ctime_ns, st.st_atime_ns if atime else None)
    content: bytes | str | None = None
    if stat.S_ISLNK(st.st_mode):
        content = os.readlink(path)
    elif stat.S_ISREG(st.st_mode):
        content = digest(pieces_of(path))
    return (*kept, times, values, content)

"""What a reader of a file system has to offer, and what it is given. Implemented by one file for each family.

A reader lives in a worker process of its own, in one thread. It keeps its own state small (the worker has 64 MiB),
caps every count that it takes from the volume, proves progress in every loop, and never follows a name of the volume to
anything but the volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from qcowfs.inside.record import Extent

__all__ = ["DIGEST", "Device", "Extents", "Layout", "Provable", "Reader", "Unproven", "Unreadable"]


class Unreadable(Exception):
    """This volume cannot be shown as a tree; the text says why, for a person, in a few words."""


class Device(Protocol):
    """A volume's bytes, as a reader gets them. Reads are cached and joined by the worker."""

    @property
    def size(self) -> int:
        """Bytes of the volume."""

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes at `offset`.

        Raises:
            OSError: EIO, they cannot be read, or lie (partly) past the end.
        """


class Extents(NamedTuple):
    """Where the bytes of a file are stored, from the asked place up to `end`; what is in no extent is zeros.

    An extent whose `offset` is >= INLINE lies in `inline` instead of the volume, at `offset` - INLINE.
    `end` is the file's size, or less (but always after the asked place) if there is more to ask for from there: more
    extents than were wanted, or what takes long to find.
    """

    extents: Sequence[Extent]
    end: int
    inline: bytes = b""


INLINE = 1 << 63


class Reader(Protocol):
    """A tree of files. Inode numbers are the reader's own: 0 < number < 2 ** 40, the same in every worker.

    Every method may raise OSError (ENOENT: no such name or inode; ENODATA; EIO: the volume is damaged there, with a
    text that says what is wrong). Names and targets are bytes as stored.
    """

    root: int

    def facts(self) -> Mapping[str, str]:
        """Return what `qcowfs list -v` shows beyond kind, label and UUID: "recovery", for one."""

    def stat(self, ino: int) -> bytes:
        """Return the bytes of `record.INODE`."""

    def lookup(self, ino: int, name: bytes) -> int:
        """Return the inode number of `name` in the directory `ino`."""

    def entries(self, ino: int, cookie: int, room: int) -> bytes:
        """Return entries (record.pack_entry) of the directory `ino`, about `room` bytes of them, b"" after the last.

        Args:
            cookie: 0 for the start, or that of the last entry before. Each entry's is larger than that of the one
                before it, and less than 2 ** 63. Neither "." nor ".." are listed, nor names that Linux cannot have
                (empty, with "/" or NUL, longer than 255 bytes).
        """

    def readlink(self, ino: int) -> bytes:
        """Return the target of a symbolic link."""

    def xattrs(self, ino: int) -> Mapping[bytes, bytes]:
        """Return all extended attributes, named and encoded as Linux's kernel presents them."""

    def extents(self, ino: int, offset: int, limit: int) -> Extents | None:
        """Return where the bytes of a file are from `offset` on, `limit` extents at most.

        None: they are stored compressed, or otherwise not as they are; `read` makes them.
        """

    def read(self, ino: int, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`, fewer only at the end of the file. For files without extents."""


DIGEST = 32  # bytes


class Layout(NamedTuple):
    """What two states of a volume must have in common to be compared by their blocks.

    Attributes:
        digest: DIGEST bytes, equal where all is equal that says where inodes are and what they mean.
        moved: (start, end) in bytes, in order, of what a recovery lets read as other bytes than the volume's.
    """

    digest: bytes
    moved: Sequence[tuple[int, int]]


class Unproven(NamedTuple):
    """What is left to compare of a directory that has the same names for the same inodes in another state.

    Attributes:
        entries: packed, as of `Reader.entries`: directories, and what may have another inode there.
        same: all that are told have the same inodes there, too.
        map: DIGEST bytes: the names are the same only if this is equal there; b"": they are.
    """

    entries: bytes
    same: bool
    map: bytes


@runtime_checkable
class Provable(Protocol):
    """A Reader that knows which bytes of the volume its answers come from.

    Its inodes prove equal files: none has NO_CHANGE_TIME.
    """

    def layout(self) -> Layout:
        """Return what is told before `suspect`."""

    def suspect(self, ranges: bytes) -> None:
        """Take (start, end) in bytes, two little-endian uint64 each, of what another state may have other bytes in.

        They are in order and do not overlap; what recoveries moved, here or there, is among them. That state has the
        same `Layout.digest`.
        """

    def unproven(self, ino: int) -> Unproven | None:
        """Return what may differ in a directory; None: anything. Nothing that `entries` tells of is damaged if not."""

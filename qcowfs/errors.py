"""The one tree of errors, and the words in which they reach a person.

Used by every room; imports nothing of the project. A class's docstring is the template of its message,
`exit_code` what the command line ends with, `errno` what a system call on the mount answers.

    QcowfsError                1   EIO
    |-- UsageError             2   EINVAL       the command line is wrong
    |-- ImageError            11   EIO          one file: IMAGE: what: why
    |   |-- SourceError       10   (the OS's)   missing, unreadable, not a file
    |   |-- NotAnImage        11   EINVAL       no format that is known here
    |   |-- CorruptImage      11   EIO          a rule of the format is broken
    |   |-- UnsupportedImage  12   EOPNOTSUPP   right, but not a thing that qcowfs reads
    |   |-- GateRefused       16   EACCES       an image names a file that the policy does not allow
    |   `-- PointNotFound     17   ENOENT       the image holds no such point in time, or the point no such file
    |-- MountpointError       14   EBUSY        the directory to mount on
    |-- FuseUnavailable       15   ENODEV       /dev/fuse, fusermount3 or pyfuse3
    |-- MonitorError          18   EIO          a running machine's monitor, or its guest agent
    |-- ReadFault              1   (as found)   a range of one disk that cannot be read right
    `-- TreeFault              1   (as found)   a name, a file or a whole tree inside a disk that cannot be read right

Exit codes are documented in qcowfs(1); a test compares the two. `diff` has 3 for 1, which is an answer of it.
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = [
    "CorruptImage",
    "FuseUnavailable",
    "GateRefused",
    "ImageError",
    "MonitorError",
    "MountpointError",
    "NotAnImage",
    "PointNotFound",
    "QcowfsError",
    "ReadFault",
    "SourceError",
    "TreeFault",
    "UnsupportedImage",
    "UsageError",
    "printable",
]


def printable(text: str | bytes) -> str:
    """Return `text` so that it can be shown on a terminal.

    Names come from hostile images: control characters, invalid UTF-8, bidirectional marks and line breaks are shown
    as \\xNN or \\uNNNN escapes, and a backslash as two, so that two different names never look the same.
    """
    name = os.fsdecode(text) if isinstance(text, bytes) else text
    return "".join(_printable_character(character) for character in name)


def _printable_character(character: str) -> str:
    if character == "\\":
        return "\\\\"
    if character.isprintable():
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as os.fsdecode keeps it
        return f"\\x{code - 0xDC00:02x}"
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class QcowfsError(Exception):
    """{what}"""

    exit_code = 1
    errno = _errno.EIO

    def __init__(self, what: str, *, hint: str | None = None) -> None:
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return (type(self).__doc__ or "{what}").format(**vars(self))


class UsageError(QcowfsError):
    """{what}"""

    exit_code = 2
    errno = _errno.EINVAL


class ImageError(QcowfsError):
    """{image}: {what}: {why}"""

    exit_code = 11

    def __init__(self, image: str | bytes, what: str, why: str, *, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.image = printable(image)
        self.why = why


class SourceError(ImageError):
    """{image}: {what}: {why}"""

    exit_code = 10

    @classmethod
    def from_oserror(cls, image: str | bytes, what: str, error: OSError, *, hint: str | None = None) -> SourceError:
        """Translate an OSError of `image`, keeping its errno and the system's own words."""
        failure = cls(image, what, error.strerror or str(error), hint=hint)
        failure.errno = error.errno or _errno.EIO
        return failure


class NotAnImage(ImageError):
    """{image}: {what}: {why}"""

    errno = _errno.EINVAL


class CorruptImage(ImageError):
    """{image}: {what}: {why}"""


class UnsupportedImage(ImageError):
    """{image}: {what}: {why}"""

    exit_code = 12
    errno = _errno.EOPNOTSUPP


class GateRefused(ImageError):
    """{image}: {what}: {why}"""

    exit_code = 16
    errno = _errno.EACCES


class PointNotFound(ImageError):
    """{image}: {what}: {why}"""

    exit_code = 17
    errno = _errno.ENOENT


class MountpointError(QcowfsError):
    """{mountpoint}: {what}"""

    exit_code = 14
    errno = _errno.EBUSY

    def __init__(self, mountpoint: str, what: str, *, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.mountpoint = printable(mountpoint)


class FuseUnavailable(QcowfsError):
    """{what}"""

    exit_code = 15
    errno = _errno.ENODEV


class MonitorError(QcowfsError):
    """{socket}: {what}"""

    exit_code = 18

    def __init__(self, socket: str, what: str, *, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.socket = socket  # as Address.shown has it


class ReadFault(QcowfsError):
    """{image}: layer {depth}, guest offset {guest_offset:#x}: {what}"""

    def __init__(self, image: str | bytes, depth: int, guest_offset: int, rule: str, errno: int) -> None:
        super().__init__(rule)
        self.image = printable(image)
        self.depth = depth
        self.guest_offset = guest_offset
        self.errno = errno


class TreeFault(QcowfsError):
    """{volume}: {what}"""

    def __init__(self, volume: str | bytes, what: str, errno: int = _errno.EIO, *, hint: str | None = None) -> None:
        super().__init__(what, hint=hint)
        self.volume = printable(volume)
        self.errno = errno

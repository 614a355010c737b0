"""How each family of file systems is recognised, in a few reads and without trust.

Used by filesystems.py, and by partitions.py where a boot sector could be a table. A probe gets a way to read that
always returns as many bytes as were asked for (zeros past the end), may raise QcowfsError, and returns None for what it
does not know. Kinds, labels and UUIDs are those that blkid prints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Filesystem", "Read", "padded", "text", "utf16"]

Read = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystem:
    """What a volume holds.

    Attributes:
        kind: blkid's TYPE: "ext4", "vfat", "crypto_LUKS", "LVM2_member".
        label: blkid's LABEL; "".
        uuid: blkid's UUID; "".
        size: bytes, as its superblock says; 0 if it does not.
        clean: whether it was unmounted properly; None if its superblock does not tell.
        trouble: why its tree cannot be shown, "" if there is a reader for it.
    """

    kind: str
    label: str = ""
    uuid: str = ""
    size: int = 0
    clean: bool | None = None
    trouble: str = ""


def padded(read: Read, size: int) -> Read:
    """Return a way to read that gives zeros past the end of the `size` bytes that `read` gives.

    Zeros match no magic and no rule, so no probe has to think of a short volume.
    """

    def read_padded(offset: int, length: int) -> bytes:
        return (read(offset, length) if 0 <= offset < size else b"").ljust(length, b"\0")

    return read_padded


def text(field: bytes) -> str:
    """Return a label from a field that NULs or spaces fill up."""
    return field.partition(b"\0")[0].decode("utf-8", errors="surrogateescape").rstrip(" \t\n\r\v\f")


def utf16(field: bytes, order: str = "le") -> str:
    """Return a label from a field of UTF-16 that NULs fill up."""
    return field.decode(f"utf-16-{order}", errors="replace").partition("\0")[0].rstrip()

"""The header of a qcow version 1 image: bytes on disk -> one frozen, checked object.

Used by chain. No snapshots, no extensions, and a backing file whose format is never recorded. Source: QEMU's
block/qcow.c (there is no specification). Pure functions over a Source; any thread.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from qcowfs import limits
from qcowfs.errors import CorruptImage, NotAnImage, SourceError, UnsupportedImage
from qcowfs.frozen import dataclass

if TYPE_CHECKING:
    from qcowfs._source import Source

__all__ = ["Header", "read_header"]

MAGIC = b"QFI\xfb\x00\x00\x00\x01"  # and the version, which the format is known by
LENGTH = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """A checked header; sizes and offsets in bytes. Its L1 table is as long as `size` needs."""

    size: int
    cluster_bits: int
    l2_bits: int
    crypt_method: int
    l1_offset: int
    l1_entries: int
    backing_name: bytes | None

    @property
    def virtual_size(self) -> int:
        """Bytes of the disk: QEMU counts whole sectors of 512 bytes."""
        return self.size & ~511

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def encrypted(self) -> bool:
        return self.crypt_method != 0


def read_header(source: Source) -> Header:
    """Read and check the header of `source`.

    Raises:
        NotAnImage: it does not start with the magic and version 1.
        CorruptImage: a field breaks its rule or exceeds its cap.
        UnsupportedImage: an encryption method that is not known.
        SourceError: it cannot be read.
    """
    data = _read(source, 0, LENGTH)
    if data[:8] != MAGIC:
        raise NotAnImage(source.name, "not a qcow image", "it does not start with QFI\\xfb and version 1")
    if len(data) < LENGTH:
        why = f"it ends at {len(data):#x}, {LENGTH:#x} bytes were expected: the image is truncated"
        raise CorruptImage(source.name, "the header is cut off", why)
    backing_offset, backing_length, _mtime, size, cluster_bits, l2_bits, crypt_method, l1_offset = struct.unpack(
        ">QIIQBBxxIQ", data[8:]
    )
    _check(source, size, cluster_bits, l2_bits, crypt_method, l1_offset)
    return Header(
        size=size,
        cluster_bits=cluster_bits,
        l2_bits=l2_bits,
        crypt_method=crypt_method,
        l1_offset=l1_offset,
        l1_entries=-(-size // (1 << (cluster_bits + l2_bits))),
        backing_name=_backing_name(source, backing_offset, backing_length),
    )


def _check(source: Source, size: int, cluster_bits: int, l2_bits: int, crypt_method: int, l1_offset: int) -> None:
    if size <= 1:
        raise CorruptImage(source.name, "bad size", f"{size} at 0x18, more than 1 was expected")
    if not limits.MIN_QCOW1_CLUSTER_BITS <= cluster_bits <= limits.MAX_QCOW1_CLUSTER_BITS:
        expected = f"{limits.MIN_QCOW1_CLUSTER_BITS} to {limits.MAX_QCOW1_CLUSTER_BITS}"
        raise CorruptImage(source.name, "bad cluster_bits", f"{cluster_bits} at 0x20, {expected} was expected")
    if not limits.MIN_QCOW1_L2_BITS <= l2_bits <= limits.MAX_QCOW1_L2_BITS:
        expected = f"{limits.MIN_QCOW1_L2_BITS} to {limits.MAX_QCOW1_L2_BITS}"
        raise CorruptImage(source.name, "bad l2_bits", f"{l2_bits} at 0x21, {expected} was expected")
    if crypt_method > 1:
        raise UnsupportedImage(
            source.name, "encryption method", f"{crypt_method} at 0x24; 0 (none) and 1 (AES) are known"
        )
    length = -(-size // (1 << (cluster_bits + l2_bits))) * 8
    if length > limits.MAX_QCOW1_L1_SIZE:
        raise CorruptImage(source.name, "bad size", f"{size:#x} at 0x18 needs an L1 table of {length:#x} bytes")
    if l1_offset + length > limits.MAX_HOST_OFFSET:
        raise CorruptImage(source.name, "bad l1_table_offset", f"{l1_offset:#x} at 0x28 is beyond what a file can have")


def _backing_name(source: Source, offset: int, length: int) -> bytes | None:
    if not offset:
        return None
    if length > limits.MAX_BACKING_NAME:
        why = f"{length} at 0x10, at most {limits.MAX_BACKING_NAME} was expected"
        raise CorruptImage(source.name, "bad backing_file_size", why)
    if offset + length > limits.MAX_HOST_OFFSET:
        raise CorruptImage(source.name, "bad backing_file_offset", f"{offset:#x} at 0x8 is beyond what a file can have")
    name = _read(source, offset, length)
    if len(name) < length:
        why = f"it lies past the end of the file, at {offset:#x}: the image is truncated"
        raise CorruptImage(source.name, "bad backing file name", why)
    return name.partition(b"\0")[0] or None  # QEMU reads it as a C string


def _read(source: Source, offset: int, length: int) -> bytes:
    try:
        return source.read_at(offset, length)
    except OSError as error:
        raise SourceError.from_oserror(source.name, "cannot read the header", error) from error

"""The backing file of an overlay that is to be written: how it is named, and whether it can be what it is said to be.

Used by the command line.
"""

from __future__ import annotations

import os
from contextlib import suppress

from qcowfs import limits, raw
from qcowfs.chain import open_chain
from qcowfs.errors import ImageError, SourceError, UsageError, printable
from qcowfs.export.qcow2file import Backing
from qcowfs.export.target import files_of
from qcowfs.policy import Policy
from qcowfs.qcow2 import header
from qcowfs.source.file import open_file

__all__ = ["recorded", "verified"]

SECTOR = 512
RAW_HINT = "; --backing-format raw if it is raw"


def recorded(name: str, image_format: str) -> Backing:
    """Return how an overlay records the file `name`, which lies relative to the overlay's own directory.

    A colon before the first slash would make QEMU take what is before it for a protocol.

    Raises:
        UsageError: no image can hold a name of that length.
    """
    first = name.partition("/")[0]
    raw_name = os.fsencode(f"./{name}" if ":" in first else name)
    if len(raw_name) > limits.MAX_BACKING_NAME:
        raise UsageError(f"{printable(name)}: qcow2 holds names of at most {limits.MAX_BACKING_NAME} bytes")
    return Backing(raw_name, image_format)


def verified(name: str, image_format: str, overlay: str, virtual_size: int, policy: Policy) -> Backing:
    """Return the same, after a look at the file: a wrong one would be silently wrong for every reader of the overlay.

    Args:
        overlay: the path that the overlay will have.
        virtual_size: bytes of the point that the file should hold.
        policy: which files the file itself may name.

    Raises:
        ImageError: it is not there, or not of that format.
        UsageError: it is not of that size, or would be replaced by the overlay.
    """
    path = os.path.join(os.path.dirname(overlay), name)
    found = _virtual_size(path, image_format)
    if abs(found - virtual_size) >= SECTOR:  # a disk ends anywhere, QEMU counts whole sectors
        raise UsageError(
            f"{printable(path)}: holds a disk of {found} bytes, the older point has {virtual_size}",
            hint="the backing file is that point's own export" + (RAW_HINT if image_format != "raw" else ""),
        )
    _require_apart(path, image_format, overlay, policy)
    return recorded(name, image_format)


def _require_apart(path: str, image_format: str, overlay: str, policy: Policy) -> None:
    """Refuse an overlay in the place of what it needs: --force would destroy it, and leave a file based on itself."""
    if not os.path.exists(overlay):
        return
    is_needed = os.path.samefile(overlay, path)
    # What may not be opened is not looked into: that an image names a file is no leave to read it.
    with suppress(ImageError), open_chain(path, policy, lock=False, image_format=image_format) as chain:
        status = os.stat(overlay)
        is_needed |= (status.st_dev, status.st_ino) in files_of(chain)
    if is_needed:
        raise UsageError(f"{printable(overlay)}: is the backing file, or what that is based on")


def _virtual_size(path: str, image_format: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        hint = "a relative name is relative to the directory of the overlay, as QEMU reads it"
        raise SourceError.from_oserror(path, "cannot open the backing file", error, hint=hint) from error
    file = open_file(descriptor, path)
    try:
        return raw.virtual_size(file.source) if image_format == "raw" else header.read_header(file.source).virtual_size
    except ImageError as error:
        error.hint = "--backing-format raw tells that it is a raw disk"
        raise
    except OSError as error:
        raise SourceError.from_oserror(path, "cannot read the backing file", error) from error
    finally:
        file.close()

"""Which name is that of a layer's backing file, and as what format is it opened: the header's word, or one before it.

Used by chain. A json: name may say of the image that it names which backing file that one has (block.c:
bdrv_open_backing_file, "backing_overridden"): QEMU writes such names for disks that were put together on its command
line. Pure; any thread.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from qcowfs import filename
from qcowfs.errors import UnsupportedImage, printable
from qcowfs.filename import FORMATS, FileName
from qcowfs.layer import Layer

__all__ = ["SUPPORTED", "BackingName", "backing_name"]

SUPPORTED = f"{', '.join(FORMATS)} are supported"
RAW_ALIASES = ("file", "host_device")  # protocol drivers recorded as a format by old tools: bytes as they are


@dataclass(frozen=True, slots=True)
class BackingName:
    """The name of a backing file.

    Attributes:
        overlay: the layer that it belongs to.
        by: the layer that holds the name: the overlay, or one above it that overrides what the overlay says.
        said: what it says.
    """

    overlay: Layer
    by: Layer
    said: FileName
    _format: str | None = None  # that was said in the place of what the overlay records

    def format(self) -> str | None:
        """Return the format of the backing file, None if nobody said.

        Raises:
            UnsupportedImage: it is not supported.
        """
        return self._format or _recorded_format(self.overlay) or self.said.format


def backing_name(overlay: Layer, named: BackingName | None) -> BackingName | None:
    """Return the name of the backing file of `overlay`, None if it has none.

    Args:
        named: the name that led to `overlay`, None if a person's word did.

    Raises:
        UnsupportedImage: a protocol, driver or option that is not supported.
        CorruptImage: it cannot be a name at all.
    """
    told = named.said.backing if named else None
    if named is None or told is None:
        return None if overlay.backing_name is None else BackingName(overlay, overlay, _by_header(overlay))
    if overlay.header is None:
        why = f"{printable(overlay.path)} cannot have the backing file that it is given there"
        raise UnsupportedImage(named.by.path, "its json: name is not supported", why)
    if told.path or told.url:
        return BackingName(overlay, named.by, told, told.format)
    if overlay.backing_name is None:
        why = f"{printable(overlay.path)} has no backing file to read in another way"
        raise UnsupportedImage(named.by.path, "its json: name is not supported", why)
    return BackingName(overlay, overlay, told.over(_by_header(overlay)), told.format)


def _by_header(overlay: Layer) -> FileName:
    return filename.parse(overlay.backing_name or b"", overlay.path)


def _recorded_format(overlay: Layer) -> str | None:
    if overlay.backing_format is None:
        return None
    recorded = os.fsdecode(overlay.backing_format)
    if recorded in RAW_ALIASES:
        return "raw"
    if recorded not in FORMATS:
        what = f"its backing file has the format {printable(recorded)}"
        raise UnsupportedImage(overlay.path, what, SUPPORTED)
    return recorded

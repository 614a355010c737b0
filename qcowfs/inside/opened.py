"""What is inside the disks of a point, with the volumes' bytes ready to be read.

Used by the vfs. Any thread; a look reads some hundred KiB at most.
"""

from __future__ import annotations

from collections.abc import Sequence

from qcowfs._core import Disk
from qcowfs._mapped import Mapped
from qcowfs.inside.contents import Contents, look
from qcowfs.inside.volume import Volume

__all__ = ["open_disks"]


def open_disks(disks: Sequence[Disk]) -> tuple[Contents, Sequence[Mapped | None]]:
    """Return what is inside the first of `disks`, and the bytes of each volume, None where it has trouble.

    The other disks may hold parts of the first one's volume groups.

    Raises:
        QcowfsError: the disk cannot be read.
    """
    contents = look(disks)
    return contents, [None if item.volume.trouble else _bytes(item.volume, disks) for item in contents.items]


def _bytes(volume: Volume, disks: Sequence[Disk]) -> Mapped:
    runs = [(segment.start, segment.length, segment.disk, segment.offset) for segment in volume.segments]
    return Mapped(volume.size, disks, runs)

"""One opened image of a chain.

Used by chain, which opens it, and by everything above. Immutable but for `close`; any thread.
"""

from __future__ import annotations

import os
from collections.abc import Hashable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcowfs import qcow1
    from qcowfs._source import Source
    from qcowfs.qcow2.header import Header
    from qcowfs.qcow2.snapshots import SnapshotEntry
    from qcowfs.source.url import Url

__all__ = ["Layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One opened image of a chain.

    Attributes:
        depth: 0 for the image on the command line.
        path: the absolute name that it was opened by, symbolic links and all; of a URL what may be shown of it.
        name: the last part of that.
        url: where it is on a server; None: on this machine.
        format: one of filename.FORMATS.
        source: its bytes, or the disk in it where QEMU reads that for us; `data` is where standard clusters are: the
            same, or the external data file.
        header: None but for qcow2 and qcow.
        virtual_size, disk_size: bytes of its active disk; bytes that its files take on the host.
        modified_ns: when the file was last written, nanoseconds since the epoch; when it was opened where nobody knows.
        backing_name, backing_format: as stored; None where there is none.
        written_by_other: another process has it open for writing.
        told: its machine has said so, whatever locks say.
        held: nothing changes unnoticed: on all of its files the lock bytes of a QEMU reader are held, so that no other
            process can write them, or their server tells versions apart.
        data_modified_ns: as `modified_ns`, of the external data file.
        file_id: tells whether two layers are the same file.
    """

    depth: int
    path: str
    url: Url | None
    format: str
    source: Source
    data: Source
    data_path: str | None
    header: Header | qcow1.Header | None
    snapshots: tuple[SnapshotEntry, ...]
    virtual_size: int
    disk_size: int
    modified_ns: int
    backing_name: bytes | None
    backing_format: bytes | None
    written_by_other: bool
    told: bool = False
    held: bool
    data_modified_ns: int
    file_id: Hashable

    @property
    def name(self) -> str:
        return self.url.name if self.url else os.path.basename(self.path)

    def close(self) -> None:
        """Close its files, and let go of their locks. What reads them must be gone."""
        for source in (self.source, self.data):
            with suppress(OSError):
                source.close()

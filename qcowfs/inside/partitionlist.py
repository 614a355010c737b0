"""The partitions of one disk, as they are found: each lies within the disk, and there are not too many.

Used by gpt.py and mbr.py. Pure.
"""

from __future__ import annotations

from qcowfs import limits
from qcowfs.inside.volume import Segment, Volume

__all__ = ["PartitionList"]


class PartitionList:
    """Partitions, and what a person should know of them.

    Attributes:
        volumes: in the order of the table.
        notes: sentences.
    """

    def __init__(self, disk: int, size: int) -> None:
        """
        Args:
            disk: the number of the disk, for the segments.
            size: its bytes.
        """
        self._disk = disk
        self._size = size
        self.volumes: list[Volume] = []
        self.notes: list[str] = []

    def add(self, number: int, start: int, length: int, *, type: str, uuid: str, label: str = "") -> None:
        """Add a partition of `length` bytes > 0 at `start`; what is past the disk's end is cut off, as Linux does."""
        name = f"p{number}"
        if number > limits.MAX_PARTITIONS:
            self.note(f"partitions from p{limits.MAX_PARTITIONS + 1} on are not shown")
            return
        if start >= self._size:
            self.note(f"{name} lies past the end of the disk and is not shown")
            return
        if start + length > self._size:
            self.note(f"{name} reaches past the end of the disk and is cut off there")
            length = self._size - start
        segment = Segment(0, length, self._disk, start)
        self.volumes.append(
            Volume(
                name=name.encode(),
                kind="partition",
                segments=(segment,),
                size=length,
                type=type,
                label=label,
                uuid=uuid,
            )
        )

    def note(self, sentence: str) -> None:
        """Add a note, unless it is there already or the table is so wrong that another one tells nothing."""
        if sentence not in self.notes and len(self.notes) < limits.MAX_NOTES:
            self.notes.append(sentence)

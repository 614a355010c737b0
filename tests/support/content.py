"""What a range of a disk holds, in a form that a failing test can print."""

from __future__ import annotations

import itertools
import re

__all__ = ["EIO", "Content"]

EIO = "EIO"  # what a reader says of a range that cannot be read right
SHOWN = 8  # runs of equal bytes
RUN = re.compile(rb"(.)\1*", re.DOTALL)


class Content:
    """Bytes, or EIO; equal to what it holds.

    Not bytes by itself: with CI=true pytest takes minutes to say in what two MiB differ.
    """

    def __init__(self, held: bytes | str) -> None:
        self._held = held

    def __eq__(self, other: object) -> bool:
        return self._held == (other._held if isinstance(other, Content) else other)

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, place: slice) -> Content:
        return Content(self._held[place])

    def __repr__(self) -> str:
        if isinstance(self._held, str):
            return self._held
        runs = list(itertools.islice(RUN.finditer(self._held), SHOWN + 1))
        shown = [f"{run.start():#x}: {run.end() - run.start()} x {run[1].hex()}" for run in runs[:SHOWN]]
        return f"<{len(self)} bytes, {', '.join([*shown, *['...'] * (len(runs) > SHOWN)])}>"

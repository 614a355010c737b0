"""What is made of the measured numbers: medians, ratios in pairs, and whether a goal is reached. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

BEST_PEER = "best peer"


@dataclass(frozen=True)
class Goal:
    """qcowfs must be at least `times` as fast as `against`, a rival's name or BEST_PEER."""

    against: str
    times: float


@dataclass
class Figures:
    """What one work measured.

    Attributes:
        samples: rival -> one figure for each round, in the order of rounds.
        more_is_better: reads a second rather than seconds.
        memory: rival -> peak bytes of its daemons.
        notes: who was left out, and why.
        remarks: sentences for below the table.
    """

    more_is_better: bool
    samples: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def leave_out(self, name: str, reason: str) -> None:
        """Forget a rival."""
        self.samples.pop(name, None)
        self.memory.pop(name, None)
        self.notes.append(f"{name}: {reason}")

    def times_as_fast(self, left: str, right: str) -> float:
        """Return the median over the rounds of how many times as fast `left` is as `right`.

        In pairs of the same round, because what else the machine does changes from round to round and hits both.
        """
        return times_as_fast(self.samples[left], self.samples[right], more_is_better=self.more_is_better)

    def best(self, names: Iterable[str]) -> str | None:
        """Return the fastest by its median of those that were measured."""
        choose = max if self.more_is_better else min
        there = [name for name in names if self.samples.get(name)]
        return choose(there, key=lambda name: statistics.median(self.samples[name]), default=None)


def times_as_fast(left: Sequence[float], right: Sequence[float], *, more_is_better: bool) -> float:
    """Return the median of the ratios of the pairs."""
    pairs = zip(left, right, strict=True)
    return statistics.median((ours / theirs) if more_is_better else (theirs / ours) for ours, theirs in pairs)


def verdict(ratio: float, times: float) -> str:
    """Return a goal's outcome; a ratio that is shown like the goal but lies below it is not reached."""
    return "reached" if ratio >= times else f"not reached: {ratio / times:.0%} of it"


def most_memory(works: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Return the peak of each rival over all works."""
    found: dict[str, int] = {}
    for work in works:
        for name, peak in work.items():
            found[name] = max(found.get(name, 0), peak)
    return found

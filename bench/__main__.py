"""`make bench`: measure in turns (A B A B ...), compare the contents, print a Markdown table."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench import exports, images, readers

Export = Callable[[Path, Path], object]


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="make bench BENCH='...'", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="turns of each (default 7)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of random reads in one turn (default 2)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qcowfs-bench-") as name:
        print(heading(args.rounds))
        measure(Path(name), args.rounds, args.seconds)
    return 0


def heading(rounds: int) -> str:
    """Say what was measured, where and when."""
    qemu = subprocess.run(["qemu-img", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    where = f"Linux {platform.release()}, {os.cpu_count()} cores, Python {platform.python_version()}, {qemu}"
    return (
        f"{time.strftime('%Y-%m-%d')}; {where}; {rounds} turns of each, interleaved.\n\n"
        "| work | unit | qcowfs min / median / max | qemu-storage-daemon min / median / max | ratio of medians |\n"
        "|---|---|---|---|---|"
    )


def measure(directory: Path, rounds: int, seconds: float) -> None:
    """Print the table's rows as they are done."""
    plain = images.plain(directory)
    ours, theirs = directory / "mnt", directory / "export.raw"
    ours.mkdir()
    with exports.our_mount(plain, ours) as left, exports.qemu_export(plain, theirs) as right:
        if readers.content(left) != readers.content(right):
            sys.exit("the contents differ: no figures")
        for jobs in (1, 4):
            row(
                f"4 KiB random, {jobs} job(s)",
                "IOPS",
                rounds,
                partial(readers.random_reads, left, jobs, seconds),
                partial(readers.random_reads, right, jobs, seconds),
            )
        row(
            "1 MiB sequential",
            "MiB/s",
            rounds,
            partial(readers.sequential_reads, left),
            partial(readers.sequential_reads, right),
        )
    for title, image in (
        ("plain", plain),
        ("1,000 snapshots", images.thousand_snapshots(directory)),
        ("64 TiB", images.huge(directory)),
    ):
        row(
            f"mount to first byte, {title}",
            "ms",
            rounds,
            partial(first_byte, exports.our_mount, image, ours),
            partial(first_byte, exports.qemu_export, image, theirs),
        )


def first_byte(export: Callable[[Path, Path], object], image: Path, place: Path) -> float:
    """Return the milliseconds from starting an export to having read one byte."""
    start = time.monotonic()
    with export(image, place) as file, file.open("rb", buffering=0) as opened:  # type: ignore[attr-defined]
        opened.read(1)
        return (time.monotonic() - start) * 1000


def row(work: str, unit: str, rounds: int, left: Callable[[], float], right: Callable[[], float]) -> None:
    """Measure both in turns and print one row."""
    pairs = [(left(), right()) for _ in range(rounds)]
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    ratio = statistics.median(ours) / statistics.median(theirs)
    print(f"| {work} | {unit} | {three(ours)} | {three(theirs)} | {ratio:.2f} |", flush=True)


def three(figures: list[float]) -> str:
    """Return minimum, median and maximum."""
    return " / ".join(f"{figure:,.0f}" for figure in (min(figures), statistics.median(figures), max(figures)))


if __name__ == "__main__":
    sys.exit(main())

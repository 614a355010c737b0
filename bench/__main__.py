"""`make bench`: measure in turns (A B C A B C ...), compare the contents, print Markdown tables."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import report
from bench.figures import Figures
from bench.images import Images
from bench.reader import WrongContentError
from bench.turns import Turns
from bench.works import WORKS, Work

FAILURES = (WrongContentError, RuntimeError, OSError, subprocess.SubprocessError)  # of qcowfs itself
MARK = "<!-- The figures below are written by make bench. -->"


def main() -> int:
    """Run what the command line asks for; 1 if qcowfs showed something wrong."""
    args = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unmount first
    works = [work for work in WORKS if work.is_asked_for(args.only)]
    if not works:
        sys.exit("bench: no work has such a name; see --help")
    with tempfile.TemporaryDirectory(prefix="qcowfs-bench-") as name:
        turns = Turns(Images(args.images or Path(name, "images")), Path(name), args.rounds, args.seconds)
        results, wrong = measured(turns, works)
    text = document(args, results, wrong)
    print(text)
    if args.output:
        write(args.output, text)
    return 1 if wrong else 0


def parsed() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="make bench BENCH='...'", description=__doc__, allow_abbrev=False)
    kinds = "random, sequential, grep, copy, first-byte, diff, export, inside, remote, iSCSI, object"
    names = f"{kinds}, an image (plain, zlib, ...), or both (copy-half)"
    parser.add_argument("--only", nargs="+", default=[], metavar="WORK", help=f"measure these alone: {names}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each rival (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of random reads in a turn (default: %(default)s)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="make the images there and keep them")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the tables into FILE, after its mark")
    return parser.parse_args()


def measured(turns: Turns, works: list[Work]) -> tuple[dict[Work, Figures], list[str]]:
    """Return the figures of each work, and a line for each work whose figures are discarded."""
    results, wrong = {}, []
    for work in works:
        start = time.monotonic()
        try:
            results[work] = turns.figures(work)
            line = report.progress(work, results[work])
        except FAILURES as error:
            line = f"WRONG CONTENT OR NO ANSWER, FIGURES DISCARDED: {work.title}: {error}"
            wrong.append(line)
        print(f"bench: {line} [{time.monotonic() - start:.0f} s]", file=sys.stderr, flush=True)
    return results, wrong


def document(args: argparse.Namespace, results: dict[Work, Figures], wrong: list[str]) -> str:
    """Return all that was found out."""
    loud = [f"**{line}**\n" for line in wrong]
    tables = [report.table(work, found) for work, found in results.items()]
    parts = [
        report.facts(args.rounds, args.seconds) + "\n",
        *loud,
        "## Goals\n",
        report.summary(results),
        "## Tables\n",
    ]
    return "\n".join(["", *parts, *tables])


def write(path: Path, text: str) -> None:
    """Put the text behind the mark of a file that has one; what stands before it is written by hand."""
    before = path.read_text().partition(MARK)[0] if path.exists() else ""
    path.write_text(f"{before}{MARK}\n{text}")


if __name__ == "__main__":
    sys.exit(main())

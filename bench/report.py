"""The tables, in Markdown."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping

from bench import rivals
from bench.figures import BEST_PEER, Figures, Goal, most_memory, verdict
from bench.works import DIFF, EXPORT, EXPORT_MEMORY, MEMORY_GOAL, UNITS, Work

MIB = 1 << 20


def facts(rounds: int, seconds: float) -> str:
    """Say when, where and with what was measured."""
    libraries = f"libfuse {first_line('pkg-config', '--modversion', 'fuse3')}, Python {platform.python_version()}"
    return "\n".join(
        [
            f"- {time.strftime('%Y-%m-%d')}, revision {revision()}; {rounds} rounds, random reads of {seconds:g} s",
            f"- {os.cpu_count()} cores ({processor()}), {memory() >> 30} GiB, Linux {platform.release()}",
            f"- {first_line('qemu-img', '--version')}; {first_line('nbdfuse', '--version')}; "
            f"{first_line('qcowmount', '-V')}; {libraries}",
        ]
    )


def first_line(*command: str) -> str:
    """Return the first line that a program prints, or that it is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return f"no {command[0]}"
    return next(iter(done.stdout.splitlines()), f"{command[0]} of an unknown version")


def revision() -> str:
    """Return the commit of this checkout, with a + where it was changed since."""
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD"], capture_output=True).returncode != 0
    return first_line("git", "rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def processor() -> str:
    """Return the processor's name."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def table(work: Work, found: Figures) -> str:
    """Return a work's table with its goals and notes."""
    unit = UNITS[work.kind]
    lines = [f"### {work.title}", "", *goal_lines(work, found), ""]
    lines += [f"| rival | minimum, {unit} | median | maximum | qcowfs is | memory |", "|---|---:|---:|---:|---:|---:|"]
    lines += [row(work, found, name) for name in found.samples]
    lines += ["", *(f"Left out: {note}." for note in found.notes), *(f"{remark}." for remark in found.remarks)]
    return "\n".join(lines).rstrip() + "\n"


def row(work: Work, found: Figures, name: str) -> str:
    """Return a rival's line."""
    low, middle, high = three(work, found, name)
    compared = name != rivals.OURS and rivals.OURS in found.samples
    ratio = f"{found.times_as_fast(rivals.OURS, name):.2f} times as fast" if compared else ""
    peak = f"{found.memory[name] / MIB:.0f} MiB" if name in found.memory else ""
    return f"| {name} | {low} | {middle} | {high} | {ratio} | {peak} |"


def three(work: Work, found: Figures, name: str) -> list[str]:
    """Return minimum, median and maximum."""
    samples = found.samples[name]
    return [figure(work, value) for value in (min(samples), statistics.median(samples), max(samples))]


def figure(work: Work, value: float) -> str:
    """Return a figure with as many digits as it is worth."""
    return f"{value:.2f}" if UNITS[work.kind] == "s" else f"{value:,.0f}"


def goal_lines(work: Work, found: Figures) -> list[str]:
    """Return a line for each goal."""
    return [f"Goal: {text}." for text in goal_texts(work, found)]


def goal_texts(work: Work, found: Figures) -> list[str]:
    """Say of each goal what is asked for and what was got."""
    texts = [goal_text(goal, found) for goal in work.goals]
    if not work.most or rivals.OURS not in found.samples:
        return texts
    got = statistics.median(found.samples[rivals.OURS])
    outcome = "reached" if got <= work.most else f"not reached: {got / work.most:.2f} times it"
    return [*texts, f"at most {figure(work, work.most)} {UNITS[work.kind]}: {outcome}"]


def goal_text(goal: Goal, found: Figures) -> str:
    """Say what is asked for and what was got."""
    against = found.best(rivals.PEERS) if goal.against == BEST_PEER else goal.against
    asked = f"{goal.times:.2f} times {goal.against}"
    if against is None or against not in found.samples:
        return f"{asked}; nobody to compare with"
    ratio = found.times_as_fast(rivals.OURS, against)
    named = f" ({against})" if goal.against == BEST_PEER else ""
    return f"{asked}{named}; got {ratio:.2f}: {verdict(ratio, goal.times)}"


def summary(results: Mapping[Work, Figures]) -> str:
    """Return one line for each goal of all works, and the memory."""
    lines = ["| work | qcowfs, median | goal and what was got |", "|---|---:|---|"]
    for work, found in results.items():
        texts = goal_texts(work, found)
        if not texts:
            continue
        middle = f"{three(work, found, rivals.OURS)[1]} {UNITS[work.kind]}"
        lines += [f"| {work.title} | {middle} | {text} |" for text in texts]
    written = most_memory(found.memory for work, found in results.items() if work.kind == EXPORT)
    if rivals.OURS in written:
        lines.append(memory_line("an export's peak memory", written[rivals.OURS], EXPORT_MEMORY))
    peaks = most_memory(found.memory for work, found in results.items() if work.kind not in (DIFF, EXPORT))
    if rivals.OURS in peaks:
        lines.append(memory_line("daemon's peak memory over all works", peaks[rivals.OURS], MEMORY_GOAL))
        others = ", ".join(f"{name} {peak / MIB:.0f}" for name, peak in peaks.items() if name != rivals.OURS)
        lines += ["", f"Peak memory of the others over all works, in MiB: {others}."]
    return "\n".join(lines) + "\n"


def memory_line(what: str, peak: int, most: int) -> str:
    """Return the line of a peak of memory."""
    outcome = "reached" if peak <= most else f"not reached: {peak / most:.2f} times it"
    return f"| {what} | {peak / MIB:.0f} MiB | at most {most / MIB:.0f} MiB: {outcome} |"


def progress(work: Work, found: Figures) -> str:
    """Return a line for the person who waits."""
    parts = [f"{name} {three(work, found, name)[1]}" for name in found.samples]
    return f"{work.title} ({UNITS[work.kind]}): {', '.join(parts)}"

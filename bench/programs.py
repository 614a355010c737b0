"""The two small C programs of the benchmark, compiled when their source is newer, and running any program."""

from __future__ import annotations

import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
BUILT = HERE.parent / "build" / "bench"
LONGEST = 300  # seconds of a program: one that waits for a rival which hangs would wait for ever
FLAGS = ["-O2", "-Wall", "-Wextra", "-pthread"]


def run(*words: str | Path) -> str:
    """Return what a program prints that has to succeed."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=LONGEST)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


def compiled(name: str, *libraries: str) -> Path:
    """Return the program of NAME.c, linked with what pkg-config says of `libraries`."""
    source, program = HERE / f"{name}.c", BUILT / name
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        BUILT.mkdir(parents=True, exist_ok=True)
        linked = run("pkg-config", "--cflags", "--libs", *libraries).split() if libraries else []
        run("gcc", *FLAGS, source, "-o", program, *linked)
    return program

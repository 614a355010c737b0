"""`qcowfs diff`: what differs between two points."""

from __future__ import annotations

import argparse

from qcowfs.cli.difffiles import EXAMPLES, configure_files, run_files

__all__ = ["EXAMPLES", "HELP", "configure", "run"]

HELP = "tell which files differ between two points in time"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `qcowfs diff`."""
    configure_files(parser)


def run(args: argparse.Namespace) -> int:
    """Print the differences."""
    return run_files(args)

"""Write completion/ for bash, zsh and fish from the command line's own parser (`make completion`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import shtab

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qcowfs.cli import build_parser  # noqa: E402  # this checkout's, wherever the tool is called

FILES = {
    "bash": "completion/bash/qcowfs",
    "zsh": "completion/zsh/_qcowfs",
    "fish": "completion/fish/qcowfs.fish",
}
COMPLETED_AS = {
    "image": shtab.FILE,
    "old": shtab.FILE,  # of diff: another image, or a point
    "others": shtab.FILE,
    "out": shtab.FILE,
    "backing": shtab.FILE,
    "log_file": shtab.FILE,
    "dest": shtab.FILE,  # of restore: also a directory
    "file": shtab.FILE,  # of snapshot
    "qmp": shtab.FILE,  # a socket
    "agent": shtab.FILE,
    "all": shtab.DIR,
    "cache_dir": shtab.DIR,
    "mountpoint": shtab.DIR,
    "mountpoints": shtab.DIR,
}
DIRECTORIES = ("allow_backing",)  # a directory, or the word "any"


def scripts() -> dict[str, str]:
    """Return the text of each file, by its path in the project."""
    parser = build_parser()
    _describe(parser)
    return {path: shtab.complete(parser, shell=shell).rstrip() + "\n" for shell, path in FILES.items()}


def main() -> int:
    """Write the files."""
    for path, text in scripts().items():
        file = ROOT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return 0


def _describe(parser: argparse.ArgumentParser) -> None:
    """Tell shtab which arguments are files and directories."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _describe(command)
        elif action.dest in COMPLETED_AS:
            action.complete = COMPLETED_AS[action.dest]
        elif action.dest in DIRECTORIES:
            action.complete = shtab.DIR


if __name__ == "__main__":
    sys.exit(main())

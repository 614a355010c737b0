"""The table of rooms: a row may use only rows below it. Imports in .py and .pyi, cimports in .pyx and .pxd."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "qcowfs"

# From the top down. Files of one row may use each other.
ROWS = (
    ("__main__",),
    ("cli",),
    ("mount", "daemon", "fuse", "follow", "kernelcache", "libfuse", "watcher", "mountpoint", "mountoptions"),
    ("vfs",),
    ("sizes", "restore", "renewal"),
    ("filediff", "pruning", "renames", "pointdiff", "history"),
    ("inside",),
    ("export",),
    ("snapshot",),
    ("qmp",),
    ("chain", "layer", "backingname"),
    ("gate", "policy", "filename", "jsonname", "remotename"),
    ("qcow2", "qcow1", "raw"),
    ("source", "blockdiff"),
    ("stored",),
    ("_usage", "_ext2", "_extmap", "_extdir"),
    ("_dataplane",),
    ("_ahead", "_treeplane"),
    ("_handles",),
    ("_nodes",),
    ("_mapped", "_compare", "_copy"),
    ("_pair",),
    ("_core",),
    ("_resolve", "_clusters", "_seek"),
    ("_guard",),
    ("_tables", "_codec"),
    ("_blocks",),
    ("_blockread",),
    ("_interruptible",),
    ("_nbd",),
    ("_nbdserve",),
    ("_nbdlink",),
    ("_iscsi",),
    ("_iscsisession",),
    ("_lanes",),
    ("_requests",),
    ("_queue",),
    ("_cache", "_pysource", "_statuses", "_pool", "_interrupts"),
    ("_source", "_threads", "_reply", "_inotify", "_streams", "_spares", "_blockfile"),
    ("_answer", "_sandbox"),
    ("_records", "_crc32c"),
    ("clib",),
    ("errors", "limits", "__init__"),
)
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}
CIMPORT = re.compile(r"^\s*from\s+qcowfs\.(\w+)(?:\.\w+)?\s+c?import|^\s*c?import\s+qcowfs\.(\w+)", re.MULTILINE)
FILES = sorted(path for kind in ("py", "pyi", "pyx", "pxd") for path in PACKAGE.rglob(f"*.{kind}"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].partition(".")[0]


def rooms_used_by(path: Path) -> set[str]:
    text = path.read_text()
    if path.suffix in (".pyx", ".pxd"):
        return {first or second for first, second in CIMPORT.findall(text)}
    used: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            used |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qcowfs.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "qcowfs":
            used |= {alias.name for alias in node.names if alias.name in ROW_OF}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qcowfs."):
            used.add((node.module or "").split(".")[1])
    return used


def test_every_file_has_a_row() -> None:
    assert set() == {room_of(path) for path in FILES} - ROW_OF.keys()


def test_every_row_has_its_files() -> None:
    assert set() == ROW_OF.keys() - {room_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_row_uses_only_rows_below_it(path: Path) -> None:
    room = room_of(path)
    above = {used for used in rooms_used_by(path) - {room} if ROW_OF[used] < ROW_OF[room]}

    assert set() == above


def test_only_the_command_line_prints() -> None:
    printing = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    }

    assert set() == {name for name in printing if not name.startswith("cli/")}


def test_the_check_sees_what_it_should() -> None:
    """A check that finds nothing anywhere would pass too."""
    assert {"_cache", "_source", "clib"} <= rooms_used_by(PACKAGE / "_tables.pyx")
    assert {"gate", "filename", "source", "_source"} <= rooms_used_by(PACKAGE / "chain.py")

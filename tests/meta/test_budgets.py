"""How long a file and a function may be. Raising a number is a change to look at, with a reason beside it."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "qcowfs"
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 40  # without its docstring
MEDIAN_LINES_OF_A_FUNCTION = 11

FILES = sorted(path for kind in ("py", "pyx") for path in PACKAGE.rglob(f"*.{kind}"))
PYTHON = [path for path in FILES if path.suffix == ".py"]
CYTHON_FUNCTION = re.compile(r"^( *)(?:cdef|def|cpdef)\b[^\n]*?\(", re.MULTILINE)


def python_functions(path: Path) -> dict[str, int]:
    """Lines of each function's body, without its docstring."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
            found[f"{path.name}:{node.name}"] = (node.end_lineno or 0) - body[0].lineno + 1
    return found


def cython_functions(path: Path) -> dict[str, int]:
    """Lines of each function, roughly: from its first line to the next one that is indented no deeper."""
    lines = path.read_text().splitlines()
    found = {}
    for number, line in enumerate(lines):
        match = CYTHON_FUNCTION.match(line)
        if match and "cdef class" not in line and "cdef extern" not in line:
            depth = len(match.group(1))
            end = next(
                (
                    later
                    for later in range(number + 1, len(lines))
                    if lines[later].strip()
                    and len(lines[later]) - len(lines[later].lstrip()) <= depth
                    and not lines[later].startswith(")")
                ),
                len(lines),
            )
            found[f"{path.name}:{line.strip()}"] = end - number
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_go(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES_OF_A_FILE


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_function_fits_on_a_screen(path: Path) -> None:
    functions = python_functions(path) if path.suffix == ".py" else cython_functions(path)

    assert {name: lines for name, lines in functions.items() if lines > LINES_OF_A_FUNCTION} == {}


def test_functions_are_short_as_a_rule() -> None:
    lines = [count for path in PYTHON for count in python_functions(path).values()]

    assert len(lines) > 200
    assert statistics.median(lines) <= MEDIAN_LINES_OF_A_FUNCTION

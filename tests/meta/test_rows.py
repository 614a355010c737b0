"""Every rule of the format that concerns local images without encryption has a test that names it.

The rules are numbered: R1 to R14 header and versions, R15 and R16 qcow version 1, R18 to R31 mapping, R38 to R40
external data files, R41 to R50 backing chains, R51 to R58 internal snapshots, R59 to R61 bitmaps and limits. R17 and
R32 to R37 are about encryption.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
RULES = {*range(1, 17), *range(18, 32), *range(38, 60), 61}
ONE = re.compile(r"\b[Rr](\d+)\b|_r(\d+)(?=_)")
RANGE = re.compile(r"\bR(\d+) to R?(\d+)\b")


def named_rules() -> set[int]:
    """Rules that the name or the docstring of some test, or of its module, names."""
    found: set[int] = set()
    for path in TESTS.rglob("test_*.py"):
        if path.parent.name == "meta":
            continue
        tree = ast.parse(path.read_text())
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        tests = [node for node in functions if node.name.startswith("test")]
        texts = [f"_{node.name}_ {ast.get_docstring(node) or ''}" for node in tests] + [ast.get_docstring(tree) or ""]
        for text in texts:
            found |= {int(first or second) for first, second in ONE.findall(text)}
            for start, end in RANGE.findall(text):
                found |= set(range(int(start), int(end) + 1))
    return found


def test_every_rule_has_a_test_that_names_it() -> None:
    assert set() == RULES - named_rules()

"""What the project says of itself in several places agrees."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "qcowfs").glob("_*.pyx"))
HEAD = re.compile(r"^# distutils: libraries = (.+)$", re.MULTILINE)
DECISION = re.compile(r"docs/decisions/(\d{4}-[\w-]+\.md)")


def extension_modules() -> dict[str, Any]:
    """Return the entries of pyproject.toml's [[tool.setuptools.ext-modules]] by their names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return {entry["name"]: entry for entry in project["tool"]["setuptools"]["ext-modules"]}


def libraries_in_head(source: str) -> list[str]:
    """Return what the "# distutils: libraries" line before a module's docstring names."""
    return [name for line in HEAD.findall(source.partition('"""')[0]) for name in line.split()]


def decisions_named_in(text: str) -> set[str]:
    return set(DECISION.findall(text))


def written_text() -> Iterator[tuple[Path, str]]:
    """Yield every file of the checkout that a person wrote, with its text."""
    for path in sorted(ROOT.rglob("*")):
        outermost = path.relative_to(ROOT).parts[0]
        made = outermost in ("build", "dist") or (outermost.startswith(".") and outermost != ".ci")  # caches, too
        if path.is_file() and not made and path.suffix not in (".c", ".so", ".gz", ".pyc"):
            yield path, path.read_text(errors="replace")


def imported_from_compiled(sources: Iterable[str]) -> set[str]:
    """Return the names of the compiled modules that Python code imports."""
    found: set[str] = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qcowfs._"):
            found.add((node.module or "").removeprefix("qcowfs."))
        elif isinstance(node, ast.ImportFrom) and node.module == "qcowfs":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("qcowfs.")}
    return found & {path.stem for path in MODULES}


def bodies_and_docstrings(stub: str) -> list[str]:
    """Return what a stub with bare signatures does not have: docstrings, and bodies other than "..."."""
    bare = [f"line {node.lineno}" for node in ast.walk(ast.parse(stub)) if not _is_bare(node)]
    return bare + (["a docstring of the module"] if ast.get_docstring(ast.parse(stub)) else [])


def _is_bare(node: ast.AST) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [ast.unparse(line) for line in node.body] == ["..."]
    return not isinstance(node, ast.ClassDef) or ast.get_docstring(node) is None


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.stem))
def test_both_ways_of_building_link_the_same_libraries(path: Path) -> None:
    entry = extension_modules()[f"qcowfs.{path.stem}"]

    assert entry.get("libraries", []) == libraries_in_head(path.read_text())


def test_every_module_is_built_by_pip_and_nothing_else_is() -> None:
    sources = {name: entry["sources"] for name, entry in extension_modules().items()}

    assert {f"qcowfs.{path.stem}": [str(path.relative_to(ROOT))] for path in MODULES} == sources


def test_every_module_that_python_imports_has_a_stub() -> None:
    python = [path.read_text() for path in (ROOT / "qcowfs").rglob("*.py")]
    python += [path.read_text() for path in (ROOT / "qcowfs").rglob("*.pyi")]
    imported = imported_from_compiled(python)

    assert len(imported) >= 4
    assert set() == {name for name in imported if not (ROOT / f"qcowfs/{name}.pyi").exists()}


@pytest.mark.parametrize("path", sorted((ROOT / "qcowfs").glob("_*.pyi")), ids=lambda path: str(path.name))
def test_a_stub_has_a_module_and_only_signatures(path: Path) -> None:
    assert path.with_suffix(".pyx") in MODULES
    assert [] == bodies_and_docstrings(path.read_text())


def test_every_decision_that_is_named_is_written_down() -> None:
    named = {name for _, text in written_text() for name in decisions_named_in(text)}

    assert len(named) >= 4
    assert set() == {name for name in named if not (ROOT / "docs/decisions" / name).exists()}


def test_decisions_have_numbers_of_their_own_and_say_them() -> None:
    written = {path.name: path.read_text() for path in (ROOT / "docs/decisions").glob("[0-9]*.md")}
    numbers = [name[:4] for name in written]

    assert sorted(set(numbers)) == sorted(numbers)
    assert [] == [name for name, text in written.items() if not text.startswith(f"# {name[:4]}: ")]


class TestTheChecks:
    """Each of them sees what it is there for."""

    def test_libraries_are_found_in_the_head_only(self) -> None:
        head = '# cython: x=1\n# distutils: libraries = deflate z\n"""Docs."""\n'

        assert ["deflate", "z"] == libraries_in_head(head + "# distutils: libraries = other\n")
        assert [] == libraries_in_head('"""Docs."""\n# distutils: libraries = deflate\n')
        assert any(libraries_in_head(path.read_text()) for path in MODULES)

    def test_imports_are_found_in_every_form(self) -> None:
        forms = ["from qcowfs._core import Disk", "import qcowfs._cache", "def f():\n    from qcowfs import _tables"]

        assert {"_core", "_cache", "_tables"} == imported_from_compiled([*forms, "from qcowfs import __version__"])

    @pytest.mark.parametrize(
        "stub",
        ['"""Docs."""', 'class A:\n    """Docs."""', 'def f():\n    """Docs."""\n    ...', "def f():\n    return 1"],
    )
    def test_more_than_a_signature_is_seen(self, stub: str) -> None:
        assert [] != bodies_and_docstrings(stub)
        assert [] == bodies_and_docstrings("class A:\n    x: int\n    def f(self) -> int: ...\n")

    def test_a_decision_is_found_wherever_it_is_named(self) -> None:
        name = "0000-no-such-thing.md"

        assert {name} == decisions_named_in(f"see docs/decisions/{name}.")

"""What the project says of itself in several places agrees, and a plain `pip install .` makes a command that works."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import need
from tests.support.qemu import qemu

ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted((ROOT / "qcowfs").glob("_*.pyx"))
HEAD = re.compile(r"^# distutils: libraries = (.+)$", re.MULTILINE)
DECISION = re.compile(r"docs/decisions/(\d{4}-[\w-]+\.md)")
OF_THE_CHECKOUT = ("qcowfs", "man", "completion", "pyproject.toml", "README.md", "LICENSE")


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


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment into which `pip install .` installed a copy of this checkout."""
    need("gcc", "pkg-config")
    directory = tmp_path_factory.mktemp("installed")
    _copy_checkout(directory / "checkout")
    base = sys.base_prefix
    python = next(path for path in (f"{base}/bin/python3", sys.executable) if os.access(path, os.X_OK))
    subprocess.run([python, "-m", "venv", directory / "venv"], check=True, timeout=120)
    pip = [directory / "venv/bin/pip", "--disable-pip-version-check", "install", "--quiet", "."]
    # How fast the code would be does not matter here, and compiling it well takes minutes.
    (directory / "build.cfg").write_text(f"[build_ext]\nparallel = {os.cpu_count()}\n")
    quickly = {**_plain(), "CFLAGS": "-O0", "DIST_EXTRA_CONFIG": str(directory / "build.cfg")}
    done = subprocess.run(pip, cwd=directory / "checkout", env=quickly, timeout=560, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory / "venv"


def _copy_checkout(target: Path) -> None:
    """Copy what pip needs, and no extension: one that lies there could hide one that is not built.

    What Cython made comes with it, at its own times: it is made again where it is older than its source, and takes half
    of the time where it is not.
    """
    unwanted = shutil.ignore_patterns("*.so", "__pycache__")
    target.mkdir()
    for name in OF_THE_CHECKOUT:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=unwanted)
        else:
            shutil.copy(source, target / name)


def _plain() -> dict[str, str]:
    """Return an environment in which nothing of this checkout can be imported by chance."""
    return {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
class TestPipInstall:
    """Evidence: own fixture; qemu-img made the image."""

    def test_makes_a_command_that_works_elsewhere(self, installed: Path, tmp_path: Path) -> None:
        need("qemu-img")
        qemu("qemu-img", "create", "-q", "-f", "qcow2", tmp_path / "image.qcow2", "1M")
        qemu("qemu-img", "snapshot", "-c", "before-upgrade", tmp_path / "image.qcow2")

        done = _run(installed / "bin/qcowfs", "list", "image.qcow2", cwd=tmp_path)

        assert (done.returncode, done.stderr) == (0, "")
        assert ["current", "before-upgrade"] == [line.split()[0] for line in done.stdout.splitlines()[1:]]

    def test_installs_the_compiled_modules_and_not_the_checkouts(self, installed: Path, tmp_path: Path) -> None:
        program = "import qcowfs._core, sys; print(qcowfs._core.__file__)"

        done = _run(installed / "bin/python", "-c", program, cwd=tmp_path)

        assert done.stdout.startswith(str(installed))

    def test_installs_the_manual_the_completions_and_the_helper_of_mount(self, installed: Path) -> None:
        pages = {path.name for path in (ROOT / "man").glob("*.[178]")}

        assert pages == {path.name for path in (installed / "share/man").rglob("*.[178]") if "qcowfs" in path.name}
        assert (installed / "share/bash-completion/completions/qcowfs").exists()
        assert (installed / "share/zsh/site-functions/_qcowfs").exists()
        assert (installed / "share/fish/vendor_completions.d/qcowfs.fish").exists()
        assert os.access(installed / "bin/mount.qcowfs", os.X_OK)


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=_plain(), timeout=60, capture_output=True, text=True, check=False)

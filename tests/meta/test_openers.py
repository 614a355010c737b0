"""The gate is the only place that opens what an image names: nothing else in the package opens a path it did not know.

The other calls of open are listed, each with what it opens; a new one fails here until somebody has looked at it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "qcowfs"
OPENERS = {
    "open",
    "fopen",
    "openat",
    "openat2",
    "FileIO",
    "FileHandler",
    "WatchedFileHandler",
    "read_bytes",
    "read_text",
}
STARTERS = {"Popen", "run_process", "check_call", "check_output", "system", "execv", "execvp", "posix_spawn"}
NOT_OF_FILES = {("fuse.py", "node.open")}  # a method of ours that is called so
C_CALL = re.compile(r"\b(?:open|openat|fopen|creat)\s*\(")

KNOWN = {
    ("cli/__init__.py", "_drop_stdout"): "/dev/null",
    ("daemon.py", "inherited_descriptors"): "/dev/null",
    ("daemon.py", "log_to_file"): "the log that a person named",
    ("daemon.py", "ready"): "/dev/null",
    ("export/backing.py", "_virtual_size"): "the backing file that a person named",
    ("export/target.py", "__init__"): "a new file under the name of a person, and its directory",
    ("gate.py", "_file_system"): "the kernel's facts about a descriptor",
    ("gate.py", "_open_by_person"): "what a person named",
    ("gate.py", "_open_without_links"): "what an image names, once it was judged",
    ("gate.py", "_reopen"): "what a descriptor stands for",
    ("gate.py", "open_image_url"): "a URL that a person named",
    ("gate.py", "open_named_url"): "a URL that an image names, once it was judged",
    ("inside/forker.py", "_become_small"): "the kernel's setting of a process",
    ("inside/forker.py", "_keep_only"): "/dev/null",
    ("inside/worker.py", "_mapped"): "the kernel's facts about a process",
    ("mount.py", "_others_allowed"): "FUSE's configuration",
    ("mount.py", "_read_ahead"): "the kernel's setting of a mount",
    ("mountpoint.py", "_loop_devices"): "the kernel's facts about loop devices",
    ("mountpoint.py", "_mapped_paths"): "the kernel's facts about a process",
    ("mountpoint.py", "_process_name"): "the kernel's facts about a process",
    ("mountpoint.py", "mounts"): "the kernel's table of mounts",
    ("policy.py", "_read"): "a configuration file",
    ("policy.py", "_without_waiting"): "a configuration file",
    ("qmp/address.py", "_short"): "the directory of a socket that a person named",
    ("qmp/files.py", "_can_be_read"): "the kernel's facts about a descriptor",
    ("restore/destination.py", "_opened"): "where a person wants files",
    ("restore/directory.py", "opened"): "directories that are written into",
    ("restore/draft.py", "__init__"): "files that are written",
    ("restore/draft.py", "_nameless"): "files that are written",
    ("restore/links.py", "_reopened"): "directories that were written into",
    ("restore/restorer.py", "_equip"): "what was just made",
    ("source/cachedir.py", "_alone"): "the directory for blocks that a person named",
    ("source/cachedir.py", "_file"): "files in it that have a name of ours",
    ("source/cachedir.py", "_open_directory"): "the directory for blocks that a person named",
    ("source/cachedir.py", "_opened"): "a file in it under a name of ours",
    ("source/childsource.py", "_listen"): "a socket of its own, for a moment",
    ("source/launch.py", "_see_only"): "where programs and libraries are, to be seen by the program",
    ("watcher.py", "_let_go_of_everything_but"): "/dev/null",
}


def calls(tree: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """Yield (innermost function, what it calls) for each call in `tree`."""
    for node in ast.iter_child_nodes(tree):
        inside = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(node, ast.Call):
            yield inside, ast.unparse(node.func)
        yield from calls(node, inside)


def callers(source: str, names: set[str], file: str = "") -> set[str]:
    """Return the functions in `source` that call one of `names`, whatever object they find it in."""
    found = {(function, called) for function, called in calls(ast.parse(source)) if called.rpartition(".")[2] in names}
    return {function for function, called in found if (file, called) not in NOT_OF_FILES}


def openers_of_the_package() -> set[tuple[str, str]]:
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    return {(file, function) for file, source in files.items() for function in callers(source, OPENERS, file)}


def test_nothing_but_the_gate_opens_what_an_image_names() -> None:
    assert KNOWN.keys() == openers_of_the_package()


def test_only_the_chain_asks_the_gate_to_open_a_name() -> None:
    asking = {
        path.name for path in PACKAGE.rglob("*.py") if callers(path.read_text(), {"open_named_file", "open_image"})
    }

    assert {"chain.py"} == asking


def test_no_program_is_started_that_could_open_a_name() -> None:
    starting = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if callers(path.read_text(), STARTERS) or "subprocess.run" in path.read_text()
    }

    why = "fusermount3, which gets the mount point's name; qemu-nbd, which gets a descriptor, and can open nothing else"
    assert {"mountpoint.py", "childsource.py", "launch.py"} == starting, why


def test_compiled_rooms_open_nothing() -> None:
    compiled = [path for kind in ("pyx", "pxd") for path in PACKAGE.rglob(f"*.{kind}")]

    assert [] == [path.name for path in compiled if C_CALL.search(path.read_text())]
    assert len(compiled) > 10


@pytest.mark.parametrize(
    "call", ["open(name)", "os.open(name, 0)", "io.open(name)", "Path(name).read_bytes()", "[f.open() for f in names]"]
)
def test_a_new_opener_would_be_seen(call: str) -> None:
    assert {"peek"} == callers(f"def peek(name):\n    return {call}\n", OPENERS)

"""The completions that are committed are those of the parser as it is now."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import need
from tools import completion

SCRIPTS = completion.scripts()


@pytest.mark.parametrize("path", SCRIPTS)
def test_the_file_is_up_to_date(path: str) -> None:
    assert SCRIPTS[path] == (completion.ROOT / path).read_text(), "`make completion` writes it anew"


def test_no_hidden_option_is_offered() -> None:
    offered = [path for path, text in SCRIPTS.items() if "--fake" in text or "--sloppy" in text]

    assert [] == offered


def test_bash_understands_its_file() -> None:
    need("bash")

    subprocess.run(["bash", "-n", _path("bash")], check=True, timeout=30)


def test_bash_offers_the_options_of_a_verb() -> None:
    need("bash")
    script = f"""
        source {_path("bash")}
        COMP_WORDS=(qcowfs umount --) COMP_CWORD=2
        _shtab_qcowfs
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """

    offered = subprocess.run(["bash", "-c", script], check=True, timeout=30, capture_output=True, text=True).stdout

    assert {"--help", "--lazy"} == set(offered.split())


def _path(shell: str) -> Path:
    return completion.ROOT / completion.FILES[shell]

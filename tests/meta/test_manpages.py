"""The man pages say what the code does: options, mount options, exit codes, attributes; and mandoc finds them right."""

from __future__ import annotations

import argparse
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import qcowfs.cli
from qcowfs import errors, mountoptions
from qcowfs.cli import mount
from qcowfs.vfs import xattrs
from tests.support import need

MAN = Path(__file__).resolve().parents[2] / "man"
PAGES = sorted(MAN.glob("*.[1-8]"))
FLAG = re.compile(r"\bFl (Fl )?([a-zA-Z][\w-]*)")
EXIT_CODE = re.compile(r"^\.It (\d+)$", re.MULTILINE)
MOUNT_OPTION = re.compile(r"^\.It Cm (\w+)", re.MULTILINE)
ATTRIBUTE = re.compile(r"^\.It Sy (user\.qcowfs\.\w+)", re.MULTILINE)
SECTIONS = ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "FILES", "EXIT STATUS", "EXAMPLES", "LIMITS", "SEE ALSO")
OF_THE_SHELL = {130, 141}  # 128 + SIGINT, 128 + SIGPIPE
VERB_PAGES = {verb: f"qcowfs-{verb}.1" for verb in qcowfs.cli.VERBS}


def text(page: str) -> str:
    return (MAN / page).read_text()


def section(page: str, title: str) -> str:
    """Return the text of one section, without its heading."""
    return text(page).partition(f"\n.Sh {title}\n")[2].partition("\n.Sh ")[0] + "\n"


def documented(source: str) -> set[str]:
    """Return the options that mdoc text names, as they are typed."""
    lines = [line for line in source.splitlines() if line.startswith(".")]
    return {f"--{name}" if long else f"-{name}" for line in lines for long, name in FLAG.findall(line)}


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of `parser` that are not hidden."""
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    return {option for action in shown for option in action.option_strings}


def verb_parser(verb: str) -> argparse.ArgumentParser:
    subparsers = [a for a in qcowfs.cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    parser = subparsers[0].choices[verb]
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def error_classes(top: type[errors.QcowfsError] = errors.QcowfsError) -> Iterator[type[errors.QcowfsError]]:
    yield top
    for below in top.__subclasses__():
        yield from error_classes(below)


def exit_codes(page: str) -> set[int]:
    return {int(code) for code in EXIT_CODE.findall(section(page, "EXIT STATUS"))}


def only(names: Iterable[str]) -> set[str]:
    """Return option names without `--help`, which the pages of verbs leave to qcowfs(1)."""
    return set(names) - {"-h", "--help"}


@pytest.mark.parametrize("verb", qcowfs.cli.VERBS)
def test_the_page_of_a_verb_has_its_options_and_no_others(verb: str) -> None:
    assert only(options(verb_parser(verb))) == documented(section(VERB_PAGES[verb], "OPTIONS"))


@pytest.mark.parametrize("verb", qcowfs.cli.VERBS)
def test_the_synopsis_of_a_verb_has_its_options_and_no_others(verb: str) -> None:
    assert only(options(verb_parser(verb))) == documented(section(VERB_PAGES[verb], "SYNOPSIS"))


@pytest.mark.parametrize("verb", qcowfs.cli.VERBS)
def test_no_page_of_a_verb_names_an_option_that_does_not_exist(verb: str) -> None:
    assert set() == documented(text(VERB_PAGES[verb])) - options(verb_parser(verb))


def test_the_main_page_has_the_options_of_the_command_itself() -> None:
    assert options(qcowfs.cli.build_parser()) == documented(section("qcowfs.1", "OPTIONS"))


def test_the_main_page_names_no_option_that_does_not_exist() -> None:
    known = options(qcowfs.cli.build_parser()).union(*(options(verb_parser(verb)) for verb in qcowfs.cli.VERBS))

    assert set() == documented(text("qcowfs.1")) - known


def test_the_main_page_has_every_verb() -> None:
    verbs = re.findall(r"^\.It Cm (\w+)$", section("qcowfs.1", "DESCRIPTION"), re.MULTILINE)

    assert list(qcowfs.cli.VERBS) == verbs


def test_the_page_of_mount_has_the_mount_options_and_no_others() -> None:
    known = [word.partition("=")[0] for word in mountoptions.KNOWN]

    assert known == MOUNT_OPTION.findall(section("qcowfs-mount.1", "OPTIONS"))


def test_the_helpers_page_has_its_options_and_no_others() -> None:
    assert only(options(mount._helper_parser())) == documented(section("mount.qcowfs.8", "OPTIONS"))


def test_the_exit_codes_are_those_of_the_errors() -> None:
    codes = {error.exit_code for error in error_classes()}

    assert {0} | codes | OF_THE_SHELL == exit_codes("qcowfs.1")


def test_the_exit_codes_of_the_helper_are_those_of_mount() -> None:
    assert {*mount.MOUNT_CODES.values(), mount.MOUNT_FAILED} == exit_codes("mount.qcowfs.8")


def test_the_layout_has_the_attributes_and_no_others() -> None:
    source = Path(xattrs.__file__).read_text()
    keys = set(re.findall(r'"(\w+)": ', source))

    assert {xattrs.CHANGED.decode(), *(f"user.qcowfs.{key}" for key in keys)} == set(
        ATTRIBUTE.findall(text("qcowfs-layout.7"))
    )


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_the_sections_come_in_order(page: str) -> None:
    found = [title for title in re.findall(r"^\.Sh (.+)$", text(page), re.MULTILINE) if title in SECTIONS]

    assert [title for title in SECTIONS if title in found] == found


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_references_to_pages_of_qcowfs_lead_somewhere(page: str) -> None:
    named = re.findall(r"^\.?.*\bXr (\S*qcowfs\S*) (\d)", text(page), re.MULTILINE)

    assert [] == [f"{name}.{number}" for name, number in named if not (MAN / f"{name}.{number}").exists()]


def test_mandoc_finds_nothing() -> None:
    need("mandoc")

    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", *PAGES], timeout=60, capture_output=True, text=True)

    assert "" == done.stdout + done.stderr

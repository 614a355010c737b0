"""Write completion/ for bash, zsh and fish from the command line's own parser, so that they cannot disagree.

`make completion` runs it; tests/meta/test_project.py compares what it would write with what is there.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from qcowfs.cli import build_parser  # noqa: E402

BASH = """\
# bash completion of qcowfs; made by `make completion`, changes here will be lost
_qcowfs() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD - 1]}}" verb="${{COMP_WORDS[1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{verbs} --help --version"
    fi
    case "$verb $before" in
{choices}
    esac
    if [ -z "$words" ] && [[ "$word" == -* ]]; then
        case "$verb" in
{options}
        esac
    fi
    if [ -n "$words" ]; then
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
    else
        mapfile -t COMPREPLY < <(compgen -f -- "$word")
    fi
}}
complete -o filenames -F _qcowfs qcowfs
"""

ZSH = """\
#compdef qcowfs
# zsh completion of qcowfs; made by `make completion`, changes here will be lost
_qcowfs() {{
    local -a verbs=(
{verbs}
    )
    if (( CURRENT == 2 )); then
        _describe verb verbs
        return
    fi
    local verb="$words[2]"
    shift words
    (( CURRENT-- ))
    case "$verb" in
{options}
    esac
}}
_qcowfs "$@"
"""

FISH = """\
# fish completion of qcowfs; made by `make completion`, changes here will be lost
{verbs}
{options}
"""


@dataclass(frozen=True)
class Option:
    """One option: its spellings, the name of its value (None: it takes none), its choices, and what it is for."""

    spellings: tuple[str, ...]
    value: str | None
    choices: tuple[str, ...]
    repeatable: bool
    help: str


@dataclass(frozen=True)
class Verb:
    """One verb, with its options."""

    name: str
    help: str
    options: tuple[Option, ...]

    @property
    def spellings(self) -> str:
        return " ".join(spelling for option in self.options for spelling in option.spellings)


def verbs() -> list[Verb]:
    """Return the verbs of the command line, in its own order."""
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in commands._choices_actions}
    return [Verb(name, helps[name], tuple(_options(parser))) for name, parser in commands.choices.items()]


def _options(parser: argparse.ArgumentParser) -> Iterator[Option]:
    for action in parser._actions:
        if action.option_strings and action.help != argparse.SUPPRESS:
            value = None if action.nargs == 0 else str(action.metavar or action.dest.upper())
            choices = tuple(map(str, action.choices or ()))
            repeatable = isinstance(action, argparse._AppendAction)
            yield Option(tuple(action.option_strings), value, choices, repeatable, (action.help or "") % vars(action))


def bash(known: list[Verb]) -> str:
    """Return the completion for bash."""
    return BASH.format(
        verbs=" ".join(verb.name for verb in known),
        choices="\n".join(line for verb in known for line in _bash_choices(verb)),
        options="\n".join(f'            {verb.name}) words="{verb.spellings}" ;;' for verb in known),
    )


def _bash_choices(verb: Verb) -> Iterator[str]:
    for option in verb.options:
        if option.choices:
            patterns = "|".join(f'"{verb.name} {spelling}"' for spelling in option.spellings)
            yield f'        {patterns}) words="{" ".join(option.choices)}" ;;'


def zsh(known: list[Verb]) -> str:
    """Return the completion for zsh."""
    return ZSH.format(
        verbs="\n".join(f"        {_quoted(f'{verb.name}:{verb.help}')}" for verb in known),
        options="\n".join(_zsh_case(verb) for verb in known),
    )


def _zsh_case(verb: Verb) -> str:
    specifications = [_zsh_option(option, spelling) for option in verb.options for spelling in option.spellings]
    words = ["_arguments", *map(_quoted, specifications), "'*:file:_files'"]
    return f"        {verb.name})\n            " + " \\\n                ".join(words) + "\n            ;;"


def _zsh_option(option: Option, spelling: str) -> str:
    others = f"({' '.join(option.spellings)})" if not option.repeatable else "*"
    text = option.help.translate(str.maketrans({"[": "(", "]": ")", ":": "\\:"}))
    if option.value is None:
        return f"{others}{spelling}[{text}]"
    values = f"({' '.join(option.choices)})" if option.choices else "_files"
    return f"{others}{spelling}[{text}]:value:{values}"


def fish(known: list[Verb]) -> str:
    """Return the completion for fish."""
    return FISH.format(
        verbs="\n".join(
            f"complete -c qcowfs -n __fish_use_subcommand -a {verb.name} -d {_quoted(verb.help)}" for verb in known
        ),
        options="\n".join(_fish_option(verb, option) for verb in known for option in verb.options),
    )


def _fish_option(verb: Verb, option: Option) -> str:
    spelled = [f"-l {text[2:]}" if text.startswith("--") else f"-s {text[1:]}" for text in option.spellings]
    value = f" -x -a {_quoted(' '.join(option.choices))}" if option.choices else " -r" if option.value else ""
    seen = _quoted(f"__fish_seen_subcommand_from {verb.name}")
    return f"complete -c qcowfs -n {seen} {' '.join(spelled)}{value} -d {_quoted(option.help)}"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def completions() -> dict[str, str]:
    """Return path below completion/ and content of each file."""
    known = verbs()
    return {"bash/qcowfs": bash(known), "zsh/_qcowfs": zsh(known), "fish/qcowfs.fish": fish(known)}


def main() -> None:
    """Write the files."""
    for name, content in completions().items():
        path = REPOSITORY / "completion" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        print(path.relative_to(REPOSITORY))


if __name__ == "__main__":
    main()

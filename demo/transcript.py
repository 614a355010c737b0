"""A transcript: every command that is shown is the one that ran, with what it said. Used by story.py and its test."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TextIO

from tests.support.mounts import Person, me, script
from tests.support.vm import Machine

COMMAND_SECONDS = 60.0
WIDTH = 110


class StoryFailed(Exception):
    """Something was not as the story tells it."""


class Transcript:
    """Runs commands on the host and in the guest, and prints them. `out` None prints nothing."""

    def __init__(self, directory: Path, out: TextIO | None = sys.stdout) -> None:
        self._directory = directory
        self._out = out
        self._person = me()
        self._programs = ""

    def become(self, person: Person) -> None:
        """Let `person` run what comes from now on, and own what is in the story's directory."""
        self._person = person
        if not person.is_me:
            for path in (self._directory, *self._directory.iterdir()):
                person.own(path)
            programs = self._directory / "bin"
            programs.mkdir()
            script(programs / "qcowfs", person=person)
            self._programs = f"{programs}:"

    def say(self, text: str) -> None:
        """Print a paragraph for the reader."""
        self._print("\n" + textwrap.fill(text, WIDTH, initial_indent="# ", subsequent_indent="# "))

    def show(self, prompt: str, command: str) -> None:
        """Print a command that somebody else runs."""
        words = f"{prompt} {command}"
        lines = textwrap.wrap(words, WIDTH, subsequent_indent="      ", break_on_hyphens=False, break_long_words=False)
        self._print(" \\\n".join(lines))

    def host(self, *words: str, status: int = 0) -> str:
        """Run a command in the story's directory; anything but exit status `status` ends the story."""
        return self.shell(shlex.join(words), status=status)

    def shell(self, command: str, status: int = 0) -> str:
        """The same for a command line of the shell."""
        self.show("$" if self._person.is_me else f"{self._person.name}$", command)
        done = subprocess.run(  # type: ignore[call-overload]
            ["sh", "-c", command],
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=COMMAND_SECONDS,
            env=self._person.environment({"PATH": self._programs + os.environ["PATH"]}),
            **self._person.popen_arguments(),
        )
        self._output(done.stdout)
        if done.returncode != status:
            raise StoryFailed(f"{command}: exit status {done.returncode} instead of {status}: {done.stdout}")
        return str(done.stdout)

    def guest(self, machine: Machine, command: str) -> str:
        """Run a command in the guest."""
        self.show("guest#", command)
        output = machine.run(command)
        self._output(output)
        return output

    def _output(self, text: str) -> None:
        if text.strip():
            self._print(text.rstrip("\n"))

    def _print(self, text: str) -> None:
        if self._out is not None:
            print(text, file=self._out, flush=True)

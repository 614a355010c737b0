"""The command line: one verb per file, and the only room that prints.

`main` finds the verb, imports just that one, and turns every error into one line and an exit code. Only
`mount` imports pyfuse3 and trio.
"""

from __future__ import annotations

import argparse
import errno
import gc
import importlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, NoReturn

from qcowfs import __version__
from qcowfs.errors import QcowfsError, UsageError, printable

__all__ = ["VERBS", "build_parser", "command", "main", "report"]

VERBS = ("mount", "umount", "list", "ls", "cat", "diff", "history", "restore", "export", "info", "map", "snapshot")
DIFF_FAILED = 3  # what other verbs end with 1 for
INTERRUPTED = 130  # 128 + SIGINT, as a shell tells it
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what only writing can meet, and all that is written is output

DESCRIPTION = "Show every snapshot in a qcow2 disk image, side by side and read-only: the disks, and the files inside."
EXAMPLES = """\
examples:
  qcowfs list image.qcow2                   which points in time the image holds
  qcowfs ls image.qcow2 NAME:p2/etc         look into one of them, without a mount
  qcowfs cat image.qcow2 NAME:p2/etc/fstab  and print a file
  qcowfs diff image.qcow2 NAME current      which files have changed since then
  qcowfs restore image.qcow2 NAME:p2/etc .  and copy a tree out of it, as cp -a does
  qcowfs mount image.qcow2 /mnt             show them all: /mnt/NAME.raw, and the files inside in /mnt/NAME
  cp -a /mnt/NAME/p2/etc/fstab .            give one file back
  cmp /mnt/current.raw /mnt/NAME.raw        use any tool that reads raw disks
  qcowfs umount /mnt                        unmount, and wait until the image is free

'qcowfs VERB --help' tells more about each; so does qcowfs(1).
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """argparse's, which is made for each argument that is added, and imports shutil to know the width: 10 ms."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=_width())


def _width() -> int:
    """Return the columns of a line of help, as argparse does."""
    try:
        return max(int(os.environ.get("COLUMNS", "")), 13) - 2
    except ValueError:
        pass
    try:
        return max(os.get_terminal_size(sys.__stdout__.fileno()).columns, 13) - 2  # type: ignore[union-attr]
    except (AttributeError, ValueError, OSError):
        return 78


class Parser(argparse.ArgumentParser):
    """argparse's, with errors as qcowfs prints them."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(_escaped(message), hint=f"'{self.prog} --help' tells more")


class _VerbParser(Parser):
    """A verb's, whose options may stand anywhere: argparse takes what may be left out for missing once one comes."""

    _is_mixed = False

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        found, left = super().parse_known_args(args, namespace)
        if not left or self._is_mixed or args is None or "--" in args:
            return found, left
        self._is_mixed = True  # it calls this
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_mixed = False


def _escaped(message: str) -> str:
    """Escape what cannot be shown; backslashes stay: argparse has quoted some of the words already."""
    return "".join(character if character == "\\" else printable(character) for character in message)


class _LineFormatter(logging.Formatter):
    """One line on standard error for each message, as the errors have."""

    def format(self, record: logging.LogRecord) -> str:
        return f"qcowfs: {record.levelname.lower()}: {super().format(record)}"


def command() -> NoReturn:
    """`qcowfs` as a process of its own: run the command line, and end at once.

    The interpreter is not taken down: with pyfuse3 and trio in it that takes 40 ms, and nothing here waits for it.
    """
    gc.disable()  # what is imported stays; looking through it again and again takes 10 ms of a mount
    code = main()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError, ValueError):  # closed, full, or not there: main() has told
            stream.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return its exit code."""
    # Not list(...): once the verb is imported, that name is the module qcowfs.cli.list here.
    words = [*(sys.argv[1:] if argv is None else argv)]
    debug = "--debug" in words
    _log_to_stderr(debug=debug)
    _escape_on_stdout()
    try:
        code = _run(words)
        if sys.stdout is not None:  # it is where the caller closed descriptor 1
            sys.stdout.flush()
        return code
    except QcowfsError as error:
        report(error)
        return _failed(words, error.exit_code)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return 128 + 13  # what SIGPIPE would have made of it
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            return _failed(words, _cannot_print(error))
        if debug:
            raise
        _tell(f"qcowfs: internal error: {printable(repr(error))}", "hint: --debug shows where; please report it")
        return _failed(words)


def _failed(words: Sequence[str], code: int = QcowfsError.exit_code) -> int:
    """Return what an error ends with: 1 is an answer of diff, as it is one of diff(1)."""
    return DIFF_FAILED if code == QcowfsError.exit_code and _verb(words) == "diff" else code


def report(error: QcowfsError) -> None:
    """Print `error` for a person: one line, and a second one where a hint helps."""
    _tell(f"qcowfs: {error}", *([f"hint: {error.hint}"] if error.hint else []))


def _tell(*lines: str) -> None:
    """Print `lines` on standard error; that it is closed or full must not change the exit code."""
    if sys.stderr is not None:  # print() would take None for standard output
        with suppress(OSError):
            print(*lines, sep="\n", file=sys.stderr)


def build_parser(verbs: Sequence[str] = VERBS) -> argparse.ArgumentParser:
    """Return the parser with the arguments of `verbs`; each of them is imported."""
    parser = Parser(
        prog="qcowfs",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=_Formatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qcowfs {__version__}")
    parser.add_argument("--debug", action="store_true", help="log more, and show tracebacks")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_VerbParser)
    for verb in verbs:
        module = _module(verb)
        description = getattr(module, "DESCRIPTION", None) or f"{module.HELP[0].upper()}{module.HELP[1:]}."
        command = commands.add_parser(
            verb,
            help=module.HELP,
            description=description,
            epilog=getattr(module, "EXAMPLES", f"See qcowfs-{verb}(1)."),
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        module.configure(command)
    return parser


def _run(words: list[str]) -> int:
    verb = _verb(words)
    if "--version" in words and verb is None:
        return _print_version()
    if verb is None or verb in VERBS:
        args = build_parser((verb,) if verb else VERBS).parse_args(words)
        return int(_module(args.verb).run(args))
    import difflib  # 5 ms, for those who mistype

    near = difflib.get_close_matches(verb, VERBS, 1)
    if _looks_like_mount(words, verb) and (not near or os.path.exists(verb)):
        return int(_module("mount").run_bare(words))
    hint = f"did you mean '{near[0]}'?" if near else f"verbs are {', '.join(VERBS)}"
    raise UsageError(f"'{printable(verb)}' is not a verb of qcowfs", hint=hint)


def _verb(words: Sequence[str]) -> str | None:
    return next((word for word in words if not word.startswith("-")), None)


def _looks_like_mount(words: Sequence[str], image: str) -> bool:
    """`qcowfs IMAGE MOUNTPOINT [-o ...]`, as mount.fuse3 calls it for `mount -t fuse.qcowfs`."""
    rest = words[words.index(image) + 1 :]
    return bool(rest) and not rest[0].startswith("-")


def _module(verb: str) -> ModuleType:
    return importlib.import_module(f"qcowfs.cli.{verb}")


def _print_version() -> int:
    with suppress(ImportError):
        import pyfuse3

        print(f"qcowfs {__version__} (pyfuse3 {pyfuse3.__version__})")
        return 0
    print(f"qcowfs {__version__} (pyfuse3 cannot be imported: no mounts)")
    return 0


def _log_to_stderr(*, debug: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter())
    logger = logging.getLogger("qcowfs")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.DEBUG if debug else logging.WARNING)


def _cannot_print(error: OSError) -> int:
    """Nothing else is written than standard output: the log's errors stay with the log."""
    _drop_stdout()
    report(QcowfsError(f"standard output: {error.strerror}"))
    return QcowfsError.exit_code


def _escape_on_stdout() -> None:
    """Show the escape of a character that this locale does not have; standard error does so by itself."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_stdout() -> None:
    """Nobody can have our output: let the interpreter's last flush go nowhere."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)

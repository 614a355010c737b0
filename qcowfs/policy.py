"""The policy of the gate: which files, beside those near an image, may be opened because an image names them.

Used by gate and by the command line. It is what a person said: `--allow-backing` and two configuration files, whose
words add up. Immutable; any thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qcowfs import limits
from qcowfs.errors import UsageError, printable
from qcowfs.source.url import Url, is_url, parse_url

__all__ = ["Policy", "load_policy"]

logger = logging.getLogger("qcowfs")

ANY = "any"
OPTION = "--allow-backing"
SYSTEM_CONFIGURATION = "/etc/qcowfs.conf"
SECTION, KEY = "backing", "allow"


@dataclass(frozen=True, slots=True)
class Policy:
    """Attributes:
    allow: real paths: a directory with everything below it, or a single file or block device.
    allow_any: everything that the person may read.
    allow_urls: an image on a server, or a folder with everything below it.
    """

    allow: tuple[str, ...] = ()
    allow_any: bool = False
    allow_urls: tuple[Url, ...] = ()

    def covers(self, place: str) -> bool:
        """Tell whether a person's word allows the real path `place`."""
        return self.allow_any or any(place == word or place.startswith(word.rstrip("/") + "/") for word in self.allow)

    def covers_url(self, url: Url) -> bool:
        """Tell whether a person's word allows `url`."""
        return self.allow_any or any(url.is_below(folder) for folder in self.allow_urls)


def load_policy(allow_backing: Sequence[str] = (), configuration: Iterable[str] | None = None) -> Policy:
    """Return the policy of the command line's `--allow-backing` words and of the configuration files.

    Raises:
        UsageError: a word names nothing, or a configuration file cannot be understood.
    """
    files = _configuration_files() if configuration is None else configuration
    configured = [word for path in files for word in _configured(path)]
    urls = [_url(word) for word in (*allow_backing, *configured) if is_url(word)]
    allow = [_given(word) for word in allow_backing if word != ANY and not is_url(word)]
    allow += [os.path.realpath(word) for word in configured if word != ANY and not is_url(word)]
    allow_any = ANY in (*allow_backing, *configured)
    return Policy(allow=tuple(allow), allow_any=allow_any, allow_urls=tuple(urls))


def _url(word: str) -> Url:
    try:
        return parse_url(word)
    except ValueError as error:
        raise UsageError(f"{OPTION} {printable(word)}: {error}") from error


def _given(word: str) -> str:
    """Resolve a word of the command line, where a mistake is told at once."""
    resolved = os.path.realpath(os.path.expanduser(word))
    if not os.path.exists(resolved):
        hint = f"DIR or URL for everything below it, or {ANY} for every file"
        raise UsageError(f"{OPTION} {printable(word)}: not a directory, a file or a block device", hint=hint)
    return resolved


def _configuration_files() -> tuple[str, ...]:
    home = os.environ.get("XDG_CONFIG_HOME", "")
    if not home.startswith("/"):  # XDG: a relative one is to be ignored
        home = os.path.expanduser("~/.config")
    return SYSTEM_CONFIGURATION, os.path.join(home, "qcowfs", "config")


def _configured(path: str) -> Iterator[str]:
    """Yield the words of a configuration file: absolute paths, which need not exist today, URLs, or ANY."""
    try:
        words = _words(_read(path))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return  # another user's home, say; without it less is allowed, never more
    except (OSError, ValueError) as error:
        raise _unusable(path, str(error).splitlines()[0]) from error
    for word in words:
        expanded = os.path.expanduser(word.strip())
        if not expanded:
            continue
        if is_url(expanded):
            yield expanded
            continue
        if (expanded != ANY and not expanded.startswith("/")) or "\0" in expanded:
            raise _unusable(path, f"{word.strip()}: an absolute path, ~ or {ANY} was expected")
        yield expanded


def _unusable(path: str, why: str) -> UsageError:
    return UsageError(f"{printable(path)}: cannot be used: {printable(why)}")


def _read(path: str) -> str:
    with open(path, encoding="utf-8", opener=_without_waiting) as file:
        owner = os.fstat(file.fileno()).st_uid
        if path != SYSTEM_CONFIGURATION and owner not in (0, os.geteuid()):
            logger.warning("%s: not used: it belongs to another user", printable(path))
            return ""
        text = file.read(limits.MAX_CONFIGURATION + 1)
    if len(text) > limits.MAX_CONFIGURATION:
        raise ValueError("it is too long")
    return text


def _without_waiting(path: str, flags: int) -> int:
    """Root may run in somebody's home, and there may be a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK)


def _words(text: str) -> list[str]:
    """Parse, and find what is misspelt: a word that means nothing would be a policy that somebody relies on."""
    import configparser  # 5 ms, and hardly anybody has such a file

    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read_string(text)
    except configparser.Error as error:
        raise ValueError(str(error)) from error
    unknown = [f"[{section}]" for section in parser.sections() if section != SECTION]
    unknown += [key for section in ("DEFAULT", SECTION) if section in parser for key in parser[section] if key != KEY]
    if unknown:
        raise ValueError(f"{unknown[0]}: only {KEY} in [{SECTION}] is known")
    lines = [line.strip() for line in parser.get(SECTION, KEY, fallback="").splitlines()]
    return [word for line in lines for word in ([line] if is_url(line) else line.split(":"))]

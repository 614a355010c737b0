"""The words after `-o`: which of them qcowfs knows, which come from mount(8) and mean nothing here.

Used by cli/mount.py. Pure functions. Unknown words are errors, because an option that is silently ignored (a
misspelt allow_other) is found out much later; the words that mount(8) and mount.fuse3 add by themselves are not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qcowfs import limits
from qcowfs.errors import UsageError, printable

__all__ = ["KNOWN", "MountOptions", "byte_count", "cache_size", "parse"]

_FLAGS = {
    "allow_other": "allow_other",
    "allow_root": "allow_root",
    "auto_unmount": "auto_unmount",
    "live": "live",
    "no_data_plane": "no_data_plane",
    "no_lock": "no_lock",
    "nolock": "no_lock",
    "nonempty": "nonempty",
    "norecovery": "norecovery",
    "qmp": "qmp",
    "rw": "rw",
}
_VALUES = {word: word for word in ("cache_dir", "cache_dir_size", "image_format", "log_file", "source_timeout")}
_CHOICES = {"symlinks": ("raw", "contain")}
_SIZES = {"cache_size": "cache_size"}
_IDS = ("uid", "gid")
_LISTS = {"allow_backing": "allow_backing", "with": "others"}
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}  # as qemu-img takes them, and with "iB" as it prints them
_SIZE = re.compile(r"(\d{1,12})([KMG]?)(?:iB)?", re.IGNORECASE | re.ASCII)

LAST_ID = (1 << 32) - 2  # of users and groups; one more means "none" to the kernel

KNOWN = (
    *("allow_backing=DIR|URL|any", "allow_other", "allow_root", "auto_unmount", "cache_dir=DIR", "cache_dir_size=SIZE"),
    *("cache_size=SIZE", "gid=N", "image_format=FORMAT", "live", "log_file=FILE", "no_data_plane", "no_lock"),
    *("nonempty", "norecovery", "qmp", "ro", "source_timeout=SECONDS", "symlinks=raw|contain", "uid=N", "umask=OCTAL"),
    "with=IMAGE",
)

# Kernel mount flags and fstab's own words (mount(8), FILESYSTEM-INDEPENDENT MOUNT OPTIONS). A FUSE mount is nosuid
# and nodev and this one is read-only, whatever they say; the rest is about who mounts and when.
_FROM_MOUNT = frozenset(
    (
        *("async", "auto", "defaults", "dirsync", "group", "loud", "mand", "noauto", "nofail", "nogroup", "nomand"),
        *("noowner", "nouser", "nousers", "owner", "_netdev", "ro", "silent", "sync", "user", "users"),
        *("dev", "nodev", "suid", "nosuid", "exec", "noexec", "symfollow", "nosymfollow", "iversion", "noiversion"),
        *("atime", "noatime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime"),
        *("lazytime", "nolazytime"),
    )
)
_Found = dict[str, bool | int | str | tuple[str, ...]]

_FROM_MOUNT_WITH_VALUE = re.compile(r"(?:[xX]-.*|comment=.*|user=.*|helper=.*|uhelper=.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class MountOptions:
    """What `-o` said; the options of the command line with the same names mean the same.

    Attributes:
        allow_other, allow_root: let others, or root, into a mount (FUSE's own words).
        auto_unmount: let the mount vanish when its daemon dies, instead of staying dead.
        nonempty: mount over a directory that is not empty, or over another mount.
        norecovery: show the files inside as they are on the disk, with no journal replayed.
        qmp: IMAGE is SOCKET:DEVICE, as --qmp takes it.
        rw: somebody asked for a writable mount; there is none.
        symlinks: "raw", as they are stored, or "contain", so that none leads out of its tree.
        uid, gid: of all files inside; -1: as stored.
        umask: bits that are taken from the modes of the files and directories inside.
        others: images of further disks of the same volume groups.
        allow_backing, cache_dir, cache_dir_size, cache_size, no_data_plane, no_lock, live, image_format, log_file,
            source_timeout: as the options of `qcowfs mount`.
    """

    allow_other: bool = False
    allow_root: bool = False
    auto_unmount: bool = False
    live: bool = False
    no_data_plane: bool = False
    no_lock: bool = False
    nonempty: bool = False
    norecovery: bool = False
    qmp: bool = False
    rw: bool = False
    symlinks: str = "raw"
    uid: int = -1
    gid: int = -1
    umask: int = 0
    others: tuple[str, ...] = ()
    allow_backing: tuple[str, ...] = ()
    cache_size: int = limits.DEFAULT_CACHE_SIZE
    cache_dir: str | None = None
    cache_dir_size: str | None = None
    image_format: str | None = None
    log_file: str | None = None
    source_timeout: str | None = None


def parse(texts: Iterable[str], *, sloppy: bool = False) -> MountOptions:
    """Return what the `-o` arguments `texts` say. Later words win over earlier ones.

    Args:
        sloppy: ignore unknown words, as mount(8)'s -s asks.

    Raises:
        UsageError: a word is not known, or lacks its value; the message lists the known ones.
    """
    found: _Found = {}
    for word in _words(texts):
        if not _take(word, found) and not sloppy:
            raise UsageError(f"unknown mount option '{printable(word)}'", hint=f"known are {', '.join(KNOWN)}")
    if found.get("allow_other") and found.get("allow_root"):
        raise UsageError("the mount options allow_other and allow_root exclude each other")
    return MountOptions(**found)  # type: ignore[arg-type]  # keys and types are those of the tables above


def cache_size(text: str) -> int:
    """Return the bytes that `text` ("48M", say) stands for.

    Raises:
        UsageError: it is no size, or not one that a cache can have.
    """
    size = byte_count(text)
    if not limits.MIN_CACHE_SIZE <= size <= limits.MAX_CACHE_SIZE:
        hint = f"from {limits.MIN_CACHE_SIZE >> 20}M on, with K, M or G behind it"
        raise UsageError(f"'{printable(text)}' is not a size for the cache", hint=hint)
    return size


def byte_count(text: str) -> int:
    """Return the bytes that a number stands for, with K, M or G behind it or without; 0 if it is none."""
    match = _SIZE.fullmatch(text)
    return int(match[1]) * _UNITS[match[2].upper()] if match else 0


def _take(word: str, found: _Found) -> bool:
    """Enter `word` into `found`; False if nobody knows it."""
    key, equals, value = word.partition("=")
    if word in _FLAGS:
        found[_FLAGS[word]] = True
    elif equals and key in _VALUES:
        found[_VALUES[key]] = _required(key, value)
    elif equals and key in _SIZES:
        found[_SIZES[key]] = cache_size(_required(key, value))
    elif equals and key in _CHOICES:
        found[key] = _chosen(key, value)
    elif equals and key in _IDS:
        found[key] = _number(key, value, 10, LAST_ID)
    elif equals and key == "umask":
        found[key] = _number(key, value, 8, 0o777)
    elif equals and key in _LISTS:
        before = found.get(_LISTS[key], ())
        assert isinstance(before, tuple)
        found[_LISTS[key]] = (*before, _required(key, value))
    elif word == "ro":
        found.pop("rw", None)
    else:
        return word in _FROM_MOUNT or _FROM_MOUNT_WITH_VALUE.fullmatch(word) is not None
    return True


def _required(key: str, value: str) -> str:
    if not value:
        raise UsageError(f"the mount option {key} needs a value")
    return value


def _chosen(key: str, value: str) -> str:
    if value not in _CHOICES[key]:
        raise UsageError(f"the mount option {key} is {' or '.join(_CHOICES[key])}, not '{printable(value)}'")
    return value


def _number(key: str, value: str, base: int, last: int) -> int:
    digits = "01234567" if base == 8 else "0123456789"
    if not value or value.strip(digits) or len(value) > 10 or int(value, base) > last:
        kind = "an octal number" if base == 8 else "a number"
        raise UsageError(
            f"the mount option {key} is {kind} up to {last:{'o' if base == 8 else 'd'}}, not '{printable(value)}'"
        )
    return int(value, base)


def _words(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield from filter(None, split(text))


def split(text: str) -> Sequence[str]:
    """Split at commas. A backslash takes the next character as it is, and so do double quotes for what is in them.

    libfuse's rule and mount(8)'s rule: both are needed for a directory with a comma in its name.
    """
    words: list[str] = []
    word, quoted = "", False
    characters = iter(text)
    for character in characters:
        if character == "\\":
            word += next(characters, "\\")
        elif character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            words.append(word)
            word = ""
        else:
            word += character
    return [*words, word]

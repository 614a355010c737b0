"""The arguments that every verb about an image has, and opening the image as they say.

Used by the other files of this room.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from functools import partial

from qcowfs import chain, gate, mountoptions
from qcowfs.errors import UsageError, printable
from qcowfs.limits import DEFAULT_CACHE_DIRECTORY, DEFAULT_PATIENCE, MAX_PATIENCE, MIN_PATIENCE
from qcowfs.source.remote import Remotes, RemoteSettings

__all__ = [
    "add_image_options",
    "add_inside_options",
    "add_json_option",
    "add_opening_options",
    "open_chain",
    "remotes_of",
    "reopener",
]

logger = logging.getLogger("qcowfs")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add IMAGE and how it may be opened."""
    parser.add_argument("image", metavar="IMAGE", help="a qcow2 image; qcow version 1 and raw work too")
    add_opening_options(parser)


def add_opening_options(parser: argparse.ArgumentParser) -> None:
    """Add how an image may be opened."""
    parser.add_argument(
        "--allow-backing",
        metavar="DIR|URL|any",
        action="append",
        default=[],
        help="what images name may also lie below DIR or URL, or anywhere; may be given more than once",
    )
    parser.add_argument("--image-format", choices=chain.FORMATS, help="the format of IMAGE, instead of finding out")
    parser.add_argument(
        "--no-lock", action="store_true", help="do not keep QEMU from changing the image meanwhile (no lock is taken)"
    )
    add_remote_options(parser)


def add_remote_options(parser: argparse.ArgumentParser) -> None:
    """Add how servers are asked, for an image or a backing file that is a URL."""
    parser.add_argument(
        "--source-timeout",
        metavar="SECONDS",
        help=f"how long a read waits for a server that does not answer (default {DEFAULT_PATIENCE:g})",
    )
    parser.add_argument(
        "--cache-dir", metavar="DIR", help="keep what was read from servers in DIR, for other mounts too"
    )
    parser.add_argument(
        "--cache-dir-size",
        metavar="SIZE",
        help=f"how much is kept there (default {DEFAULT_CACHE_DIRECTORY >> 30}G)",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON document, for programs")


def add_inside_options(parser: argparse.ArgumentParser) -> None:
    """Add how what is inside a disk is read."""
    parser.add_argument(
        "--norecovery", action="store_true", help="show file systems as they are, without replaying their journals"
    )
    parser.add_argument(
        "--with",
        dest="others",
        metavar="OTHER",
        action="append",
        default=[],
        help="another disk's image, which holds parts of the same LVM volume groups; may be given more than once",
    )


def open_chain(args: argparse.Namespace, other: str | None = None, *, other_format: str | None = None) -> chain.Chain:
    """Open the image that `args` names, or another one, with what it is based on; warnings go to the log.

    Raises:
        QcowfsError: it cannot be opened, or is not allowed to be.
    """
    policy = gate.load_policy(args.allow_backing)
    image, image_format = (args.image, args.image_format) if other is None else (other, other_format)
    opened = chain.open_chain(
        image,
        policy,
        lock=not args.no_lock,
        image_format=image_format,
        remotes=remotes_of(args),
        written=other is None and getattr(args, "written", False),
    )
    for warning in opened.warnings:
        logger.warning("%s", warning)
    return opened


def remotes_of(args: argparse.Namespace) -> Remotes:
    """Return what opens URLs as `args` say: one for all images of a command, which share its caches."""
    if "remotes" not in args:
        args.remotes = Remotes(_remote_settings(args))
    remotes: Remotes = args.remotes
    return remotes


def _remote_settings(args: argparse.Namespace) -> RemoteSettings:
    """Return what `args` say about servers.

    Raises:
        UsageError: a number makes no sense.
    """
    timeout, size = args.source_timeout, args.cache_dir_size
    return RemoteSettings(
        patience=DEFAULT_PATIENCE if timeout is None else _seconds(timeout),
        cache_directory=args.cache_dir,
        cache_directory_size=DEFAULT_CACHE_DIRECTORY if size is None else mountoptions.cache_size(size),
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not MIN_PATIENCE <= seconds <= MAX_PATIENCE:  # false for NaN, too
        hint = f"seconds from {MIN_PATIENCE:g} to {MAX_PATIENCE:g} were expected"
        raise UsageError(f"--source-timeout {printable(text)}: not a time to wait", hint=hint)
    return seconds


def reopener(
    args: argparse.Namespace, opened: Sequence[chain.Chain], reopen_image: Callable[[], chain.Chain] | None = None
) -> Callable[[], list[chain.Chain]]:
    """Return what opens all of `opened` again, without locks, wherever this process stands by then.

    Args:
        opened: the image that `args` names, and the others.
        reopen_image: opens the image, if it may be another file by then.
    """
    policy = gate.load_policy(args.allow_backing)
    formats = [args.image_format, *([None] * (len(opened) - 1))]
    words = [found.layers[0].url.text if found.layers[0].url else found.layers[0].path for found in opened]
    openers = [
        partial(chain.open_chain, word, policy, lock=False, image_format=image_format, remotes=remotes_of(args))
        for word, image_format in zip(words, formats, strict=True)
    ]

    def reopen() -> list[chain.Chain]:
        return [(reopen_image or openers[0])(), *(opener() for opener in openers[1:])]

    return reopen

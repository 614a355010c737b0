"""The arguments that every verb about an image has, and opening the image as they say.

Used by the other files of this room.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from functools import partial

from qcowfs import chain, gate

__all__ = [
    "add_image_options",
    "add_inside_options",
    "add_json_option",
    "add_opening_options",
    "open_chain",
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
        metavar="DIR|any",
        action="append",
        default=[],
        help="files that images name may also lie below DIR, or anywhere; may be given more than once",
    )
    parser.add_argument("--image-format", choices=chain.FORMATS, help="the format of IMAGE, instead of finding out")
    parser.add_argument(
        "--no-lock", action="store_true", help="do not keep QEMU from changing the image meanwhile (no lock is taken)"
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
    opened = chain.open_chain(image, policy, lock=not args.no_lock, image_format=image_format)
    for warning in opened.warnings:
        logger.warning("%s", warning)
    return opened


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
    openers = [
        partial(chain.open_chain, found.layers[0].path, policy, lock=False, image_format=image_format)
        for found, image_format in zip(opened, formats, strict=True)
    ]

    def reopen() -> list[chain.Chain]:
        return [(reopen_image or openers[0])(), *(opener() for opener in openers[1:])]

    return reopen

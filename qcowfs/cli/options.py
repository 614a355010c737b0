"""The arguments that every verb about an image has, and opening the image as they say.

Used by the other files of this room.
"""

from __future__ import annotations

import argparse
import logging

from qcowfs import chain, gate

__all__ = ["add_image_options", "add_json_option", "open_chain"]

logger = logging.getLogger("qcowfs")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Add IMAGE and how it may be opened."""
    parser.add_argument("image", metavar="IMAGE", help="a qcow2 image; qcow version 1 and raw work too")
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


def open_chain(args: argparse.Namespace) -> chain.Chain:
    """Open the image that `args` names, with what it is based on; warnings go to the log.

    Raises:
        QcowfsError: it cannot be opened, or is not allowed to be.
    """
    policy = gate.load_policy(args.allow_backing)
    opened = chain.open_chain(args.image, policy, lock=not args.no_lock, image_format=args.image_format)
    for warning in opened.warnings:
        logger.warning("%s", warning)
    return opened

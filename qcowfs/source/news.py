"""What a remote source has to say while it is read: the server is gone, it is back, a range cannot be read.

Used by the rooms of protocols. A thread of its own waits for it: the one that talks to the server runs no Python.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qcowfs._requests import QueuedSource

__all__ = ["log_news"]

logger = logging.getLogger("qcowfs.source")


def log_news(source: QueuedSource, worded: Callable[[str], str] = str) -> None:
    """Write into the log what `source` tells, until it is closed.

    Args:
        worded: puts a library's words into those of a person.
    """
    threading.Thread(target=_log, args=(source, worded), name="qcowfs-news", daemon=True).start()


def _log(source: QueuedSource, worded: Callable[[str], str]) -> None:
    while (news := source.news()) is not None:
        _, text = news
        logger.warning("%s: %s", source.name, worded(text))  # an end, too, or nobody learns of it
